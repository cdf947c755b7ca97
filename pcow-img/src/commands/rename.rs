// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `rename`: another name for a snapshot.

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
use crate::snapshots::SnapshotInfo;

/// Give a snapshot another name; its number stays
///
/// Works while the image is served, too: its backend does it then.
#[derive(Debug, Args)]
pub struct Rename {
    /// The image
    image: PathBuf,

    /// Name or number of the snapshot
    snapshot: String,

    /// Its new name; digits alone are a number, not a name
    name: String,
}

/// What `rename` did.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Renamed {
    /// The image's directory.
    filename: PathBuf,
    /// The snapshot with its new name.
    snapshot: SnapshotInfo,
}

const PURPOSE: &str = "cannot rename a snapshot of";

impl Rename {
    /// Renames the snapshot.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        // On a copy, before anything is locked: a refused command changes nothing.
        let mut root = stored.root().clone();
        let number = root
            .rename_snapshot(&self.snapshot, &self.name)
            .doing(context)?;
        if let Some(mut backend) = Backend::find(&self.image, &stored, global)? {
            let arguments = json!({ "snapshot": number.to_string(), "name": self.name });
            backend.order("snapshot-rename", arguments, PURPOSE)?;
        } else {
            let mut image = open::for_writing(&self.image, &global.base_dirs, PURPOSE)?;
            let root = image
                .write_renamed(&self.snapshot, &self.name)
                .doing(context)?;
            image.adopt_root(root);
        }
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        let renamed = stored.root().snapshot(&number.to_string()).doing(context)?;
        let snapshot = SnapshotInfo::from(renamed);
        console.confirm(&Renamed {
            filename: self.image,
            snapshot,
        })
    }
}

impl fmt::Display for Renamed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (image, s) = (self.filename.display(), &self.snapshot);
        writeln!(f, "{image}: snapshot {} is called '{}' now", s.id, s.name)
    }
}
