// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `delete`: a snapshot goes, and what others show of it stays.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::json;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure};
use crate::live::Backend;
use crate::open;
use crate::size::Bytes;
use crate::snapshots::SnapshotInfo;

/// Delete a snapshot; the disk and all other snapshots show what they showed
///
/// What only this snapshot shows is gone, and its space is free. What others show of it is kept: with one layer on it, that
/// takes as much space as it holds for a moment, or none where the filesystem can share storage. Clones of the snapshot keep
/// what they have.
///
/// Works while the image is served, too, except for the newest snapshot under the active layer.
#[derive(Debug, Args)]
pub struct Delete {
    /// The image
    pub image: PathBuf,

    /// Name or number of the snapshot
    pub snapshot: String,
}

/// What `delete` did.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Deleted {
    /// The image's directory.
    filename: PathBuf,
    /// The snapshot that was there.
    snapshot: SnapshotInfo,
    /// Bytes that had to be copied because others show them.
    copied_size: u64,
}

const PURPOSE: &str = "cannot delete a snapshot of";

impl Delete {
    /// Deletes the snapshot.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        let snapshot = stored.root().snapshot(&self.snapshot).doing(context)?;
        let snapshot = SnapshotInfo::from(snapshot);
        let copied_size = match Backend::find(&self.image, &stored, global)? {
            Some(mut backend) => {
                let arguments = json!({ "snapshot": snapshot.id });
                let answer = backend.order("snapshot-delete", arguments, PURPOSE)?;
                answer["copied-bytes"].as_u64().unwrap_or(0)
            }
            None => {
                let mut image = open::for_writing(&self.image, &global.base_dirs, PURPOSE)?;
                let deleted = image.delete_snapshot(&snapshot.id).doing(context)?;
                deleted.copied_bytes
            }
        };
        console.confirm(&Deleted {
            filename: self.image,
            snapshot,
            copied_size,
        })
    }
}

impl fmt::Display for Deleted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (image, s) = (self.filename.display(), &self.snapshot);
        writeln!(f, "{image}: deleted snapshot {} '{}'", s.id, s.name)?;
        if self.copied_size > 0 {
            writeln!(f, "copied {}, which others show", Bytes(self.copied_size))?;
        }
        Ok(())
    }
}
