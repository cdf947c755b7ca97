// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `snapshot`: fixes what the disk shows now.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::delete::Delete;
use super::list::List;
use super::rollback::Rollback;
use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure, Status};
use crate::live::Backend;
use crate::open;
use crate::snapshots::SnapshotInfo;

/// Take a snapshot
///
/// An image that is served is no obstacle: its backend does it, and the guest goes on running. What it stores afterwards is not
/// in the snapshot, and nothing that it stored before is missing.
#[derive(Debug, Args)]
pub struct Snapshot {
    /// The image
    image: PathBuf,

    /// Name of the snapshot [default: snapshot-NUMBER]; digits alone are a number, not a name
    name: Option<String>,

    #[command(flatten)]
    older: Older,
}

/// What `qemu-img snapshot` calls its commands.
#[derive(Debug, Default, Args)]
#[group(multiple = false, conflicts_with = "name")]
struct Older {
    /// Take one of this name, as with 'qemu-img snapshot'
    #[arg(short = 'c', value_name = "NAME")]
    create: Option<String>,

    /// As 'list'
    #[arg(short = 'l')]
    list: bool,

    /// As 'rollback'
    #[arg(short = 'a', value_name = "SNAPSHOT")]
    apply: Option<String>,

    /// As 'delete'
    #[arg(short = 'd', value_name = "SNAPSHOT")]
    delete: Option<String>,
}

/// What `snapshot` made.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Taken {
    /// The image's directory.
    filename: PathBuf,
    /// The new snapshot.
    snapshot: SnapshotInfo,
}

const PURPOSE: &str = "cannot take a snapshot of";

impl Snapshot {
    /// Takes the snapshot.
    pub fn run(mut self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let older = std::mem::take(&mut self.older);
        if older.list {
            return List { image: self.image }.run(global, console);
        }
        if let Some(snapshot) = older.apply {
            return Rollback::new(self.image, snapshot).run(global, console);
        }
        if let Some(snapshot) = older.delete {
            let image = self.image;
            return Delete { image, snapshot }.run(global, console);
        }
        self.name = self.name.or(older.create);
        let context = || format!("{PURPOSE} {}", self.image.display());
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        if let Some(name) = &self.name {
            // On a copy, before anything is locked: a refused command changes nothing.
            let mut root = stored.root().clone();
            root.add_snapshot(name, root.active, 0).doing(context)?;
        }
        let snapshot = match Backend::find(&self.image, &stored, global)? {
            Some(backend) => self.take_live(backend)?,
            None => self.take(global)?,
        };
        console.confirm(&Taken {
            filename: self.image,
            snapshot,
        })
    }

    fn take(&self, global: &Global) -> Result<SnapshotInfo, Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let mut image = open::for_writing(&self.image, &global.base_dirs, PURPOSE)?;
        let number = image.snapshot(self.name.as_deref()).doing(context)?;
        let taken = image.root().snapshot(&number.to_string()).doing(context)?;
        Ok(SnapshotInfo::from(taken))
    }

    /// Of a guest that runs.
    fn take_live(&self, mut backend: Backend) -> Result<SnapshotInfo, Failure> {
        let arguments = json!({ "name": self.name });
        let answer = backend.order("snapshot-create", arguments, PURPOSE)?;
        SnapshotInfo::from_backend(&answer).ok_or_else(|| Failure::Refused {
            message: format!(
                "{PURPOSE} {}: the backend's answer says nothing",
                self.image.display()
            ),
            advice: Some("see 'pcow-img list'".to_owned()),
            status: Status::Failed,
        })
    }
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (image, s) = (self.filename.display(), &self.snapshot);
        writeln!(f, "{image}: took snapshot {} '{}'", s.id, s.name)
    }
}
