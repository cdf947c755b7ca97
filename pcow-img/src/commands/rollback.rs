// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `rollback`: the disk shows a snapshot again.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use pcow_format::Holder;
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure, Status};
use crate::live;
use crate::open;
use crate::snapshots::SnapshotInfo;

/// Make the disk show a snapshot again
///
/// No snapshot is lost. What was written since the last one becomes a snapshot itself, called before-rollback-TIME,
/// unless --discard is given. The image must not be in use.
#[derive(Debug, Args)]
pub struct Rollback {
    /// The image
    image: PathBuf,

    /// Name or number of the snapshot
    snapshot: String,

    /// Throw away what was written since the last snapshot
    #[arg(long)]
    discard: bool,
}

/// What `rollback` did.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    /// The image's directory.
    filename: PathBuf,
    /// The snapshot that the disk shows now.
    snapshot: SnapshotInfo,
    /// The snapshot that keeps what the disk showed before; null if there was nothing to keep, or with `--discard`.
    saved_as: Option<SnapshotInfo>,
}

const PURPOSE: &str = "cannot roll back";

impl Rollback {
    /// To `snapshot`, keeping what was written since.
    pub fn new(image: PathBuf, snapshot: String) -> Self {
        Self {
            image,
            snapshot,
            discard: false,
        }
    }

    /// Rolls back.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        // Before anything is locked: a refused command changes nothing.
        stored.root().snapshot(&self.snapshot).doing(context)?;
        if let Some(Holder::Writer(writer)) = live::held_by(&stored, &self.image)? {
            return Err(self.in_use(&writer.name));
        }
        let mut image = open::for_writing(&self.image, &global.base_dirs, PURPOSE)?;
        let target = image
            .root()
            .snapshot(&self.snapshot)
            .doing(context)?
            .clone();
        let rolled = image
            .rollback(&self.snapshot, self.discard)
            .doing(context)?;
        let number = rolled.saved_as.map(|(number, _)| number);
        let saved = |s: &&pcow_format::root::Snapshot| Some(s.number) == number;
        let saved_as = image.root().snapshots.iter().find(saved);
        console.confirm(&Done {
            filename: self.image,
            snapshot: SnapshotInfo::from(&target),
            saved_as: saved_as.map(SnapshotInfo::from),
        })
    }
}

impl Rollback {
    /// A running guest would find another disk under its feet.
    fn in_use(&self, holder: &str) -> Failure {
        let (image, snapshot) = (self.image.display(), &self.snapshot);
        Failure::Refused {
            message: format!("{PURPOSE} {image}: it is in use by {holder}"),
            advice: Some(format!(
                "shut the virtual machine down and stop that process first, or boot a clone: pcow-img create --base {image}@{snapshot} CLONE"
            )),
            status: Status::Failed,
        }
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (image, s) = (self.filename.display(), &self.snapshot);
        writeln!(f, "{image}: rolled back to snapshot {} '{}'", s.id, s.name)?;
        self.saved_as.as_ref().map_or(Ok(()), |s| {
            writeln!(
                f,
                "what it showed before is now snapshot {} '{}'",
                s.id, s.name
            )
        })
    }
}
