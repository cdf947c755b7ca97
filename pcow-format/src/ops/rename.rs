// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Another name for a snapshot. Changes the root only.

use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, write_root};
use crate::root::{Root, check_name};

impl Root {
    /// Calls the snapshot `target` (name or number) `name`; returns its number.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` or `Exists` for the name.
    pub fn rename_snapshot(&mut self, target: &str, name: &str) -> Result<u64> {
        check_name(name)?;
        let number = self.snapshot(target)?.number;
        for snapshot in &mut self.snapshots {
            if snapshot.number == number {
                name.clone_into(&mut snapshot.name);
            } else if snapshot.name == name {
                let what = format!("the image already has a snapshot '{name}'");
                return Err(Error::new(ErrorKind::Exists, what));
            }
        }
        Ok(number)
    }
}

impl Image {
    /// Commits another name for a snapshot; returns the root that has it, for [`Image::adopt_root`]. Nobody else may change
    /// the layer tree until then.
    ///
    /// # Errors
    /// As [`Root::rename_snapshot`]; `NoSpace` or `Io`.
    pub fn write_renamed(&self, target: &str, name: &str) -> Result<Root> {
        let mut root = self.root().clone();
        root.rename_snapshot(target, name)?;
        write_root(self.directory(), &root)?;
        Ok(root)
    }
}
