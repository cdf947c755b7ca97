// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files that get their name when they are complete.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use uuid::Uuid;

use crate::failure::Failure;

/// A name of a file that is removed when this goes.
#[derive(Debug)]
pub struct Temporary(pub PathBuf);

impl Temporary {
    /// `<path>.<uuid>.part`.
    pub fn beside(path: &Path) -> Self {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.part", Uuid::new_v4()));
        Self(PathBuf::from(name))
    }

    /// Gives the complete file the name `target`, durably, without replacing anything.
    ///
    /// # Errors
    /// If it cannot be made durable, or there is a file of that name.
    pub fn settle(&self, target: &Path) -> Result<(), Failure> {
        let fail = |e: io::Error| cannot_write(target, &e);
        let file = File::open(&self.0).map_err(fail)?;
        file.sync_all().map_err(fail)?;
        let renamed = renameat_with(CWD, &self.0, CWD, target, RenameFlags::NOREPLACE);
        renamed.map_err(|e| fail(e.into()))?;
        let parent = match target.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        let parent = File::open(parent).map_err(fail)?;
        parent.sync_all().map_err(fail)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may have another name by now, or may never have been made.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Why a file could not be written.
pub fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    Failure::refused(format!("cannot write {}: {error}", path.display()))
}
