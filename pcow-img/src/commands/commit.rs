// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `commit`: the snapshot under the active layer and what was written since become one.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use pcow_format::root::Root;
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure};
use crate::open;
use crate::size::Bytes;
use crate::snapshots::SnapshotInfo;

/// Give up the newest snapshot under the disk, and keep what was written since
///
/// The disk shows what it showed, with one layer less. (With qemu-img the layer below would be written to; here sealed
/// layers never are.) A snapshot that others need is refused, and so is a base: 'rebase' makes an image independent. The
/// image must not be in use.
#[derive(Debug, Args)]
pub struct Commit {
    /// The image
    image: PathBuf,
}

/// What `commit` did.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    /// The image's directory.
    filename: PathBuf,
    /// The snapshot that was there.
    snapshot: SnapshotInfo,
    /// Bytes that were copied into the active layer.
    copied_size: u64,
}

const PURPOSE: &str = "cannot commit";

impl Commit {
    /// Commits.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        self.parent(stored.root())?;
        let mut image = open::for_writing(&self.image, &global.base_dirs, PURPOSE)?;
        // Again, under the lock.
        let snapshot = self.parent(image.root())?;
        let deleted = image.delete_snapshot(&snapshot.id).doing(context)?;
        console.confirm(&Done {
            filename: self.image,
            snapshot,
            copied_size: deleted.copied_bytes,
        })
    }

    /// The one snapshot that the active layer lies on, if nothing else lies on it.
    fn parent(&self, root: &Root) -> Result<SnapshotInfo, Failure> {
        let refuse = |why: &str| {
            let what = format!("{PURPOSE} {}: {why}", self.image.display());
            Failure::refused(what)
        };
        let active = root.active_layer().doing(|| PURPOSE.to_owned())?;
        let of_parent = |s: &&pcow_format::root::Snapshot| Some(s.layer) == active.parent;
        let mut snapshots = root.snapshots.iter().filter(of_parent);
        let Some(snapshot) = snapshots.next() else {
            return Err(refuse("the disk lies on no snapshot of this image")
                .advising("'rebase IMAGE none' makes it independent of a base"));
        };
        let on_it = root.layers.iter().filter(|l| l.parent == active.parent);
        if snapshots.next().is_some() || on_it.count() > 1 {
            let why = format!("other snapshots need what '{}' holds", snapshot.name);
            return Err(refuse(&why).advising("delete them first"));
        }
        Ok(SnapshotInfo::from(snapshot))
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (image, s) = (self.filename.display(), &self.snapshot);
        let copied = Bytes(self.copied_size);
        writeln!(
            f,
            "{image}: snapshot {} '{}' and what was written since are one; copied {copied}",
            s.id, s.name
        )
    }
}
