// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `resize`: the disk becomes larger, or smaller if that is said.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure};
use crate::open;
use crate::size::{self, Bytes};

/// Change the size of the disk
///
/// What is added reads zero, also if it was cut off earlier. Snapshots keep their size. The image must not be in use.
#[derive(Debug, Args)]
pub struct Resize {
    /// The image
    image: PathBuf,

    /// The new size, or with + or - in front the difference: a multiple of 2M
    #[arg(allow_hyphen_values = true)]
    size: String,

    /// Allow the disk to become smaller: what is past its new end is not shown any more
    #[arg(long)]
    shrink: bool,
}

/// What `resize` did.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    /// The image's directory.
    filename: PathBuf,
    /// Size of the disk in bytes.
    virtual_size: u64,
    /// Its size before.
    old_size: u64,
}

const PURPOSE: &str = "cannot resize";

impl Resize {
    /// Resizes.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        let old = stored.root().active_layer().doing(context)?.virtual_size;
        let wanted = self.wanted(old).map_err(Failure::usage)?;
        let new = size::virtual_size(wanted).map_err(Failure::usage)?;
        if new.bytes() < old && !self.shrink {
            let what = format!(
                "{PURPOSE} {}: the disk has {old} bytes, and would lose what is past {}",
                self.image.display(),
                new.bytes()
            );
            return Err(Failure::refused(what).advising("say --shrink if that is meant"));
        }
        let mut image = open::for_writing(&self.image, &global.base_dirs, PURPOSE)?;
        image.resize(new).doing(context)?;
        console.confirm(&Done {
            filename: self.image,
            virtual_size: new.bytes(),
            old_size: old,
        })
    }

    fn wanted(&self, old: u64) -> Result<u64, String> {
        let difference = |text| size::bytes(text);
        let out_of_range = || format!("'{}' is out of range", self.size);
        if let Some(more) = self.size.strip_prefix('+') {
            return old.checked_add(difference(more)?).ok_or_else(out_of_range);
        }
        if let Some(less) = self.size.strip_prefix('-') {
            return old.checked_sub(difference(less)?).ok_or_else(out_of_range);
        }
        size::bytes(&self.size)
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {}, was {}",
            self.filename.display(),
            Bytes(self.virtual_size),
            Bytes(self.old_size)
        )
    }
}
