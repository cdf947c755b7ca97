// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `rebase`: the image gets another base.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use clap::Args;
use pcow_format::ErrorKind;
use pcow_format::ops::{Base, Rebased, rebase_unsafe};
use serde::Serialize;

use crate::base::{self, BaseOptions};
use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure};
use crate::open;
use crate::size::Bytes;

/// Put an image on another base, or on none
///
/// The disk shows the same bytes as before, unless --unsafe is given: what the new base shows differently is first
/// written into the image. Snapshots keep the layers that they have. The image must not be in use.
///
/// With 'none' or '' instead of a base the image becomes independent: it gets all that it needs of its base. (An image
/// called none is written ./none.)
#[derive(Debug, Args)]
pub struct Rebase {
    /// The image
    image: PathBuf,

    /// The new base: IMAGE, IMAGE@SNAPSHOT, a raw file, or none
    #[arg(required_unless_present_any = ["backing", "flatten"])]
    base: Option<OsString>,

    /// The new base, as with 'qemu-img rebase'
    #[arg(short = 'b', value_name = "BASE", conflicts_with = "base")]
    backing: Option<OsString>,

    /// No base: the image gets all that it needs
    #[arg(long, conflicts_with_all = ["base", "backing", "is_unsafe"])]
    flatten: bool,

    #[command(flatten)]
    base_options: BaseOptions,

    /// Only change the link: the disk shows the new base's bytes where the image has none of its own
    #[arg(short = 'u', long = "unsafe")]
    is_unsafe: bool,
}

/// What `rebase` did.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    /// The image's directory.
    filename: PathBuf,
    /// The new base as it was given, or null for none.
    base: Option<PathBuf>,
    /// Whether the disk shows the same bytes as before for certain.
    safe: bool,
    /// Bytes that were written into the image to keep what the disk shows.
    written_size: u64,
    /// Bytes of the new base that had to be copied.
    copied_size: u64,
    /// Name of the snapshot of the new base that was made to fix its present state, or null.
    sealed_base_as: Option<String>,
}

const PURPOSE: &str = "cannot rebase";

impl Rebase {
    /// Changes the base.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        // What can be refused is, before anything is locked or sealed.
        open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        let base = self.new_base(&global.base_dirs)?;
        let rebased = self.rebase(base.as_ref(), &global.base_dirs)?;
        console.confirm(&Done {
            filename: self.image.clone(),
            base: base.is_some().then(|| PathBuf::from(self.named())),
            safe: !self.is_unsafe,
            written_size: rebased.written_bytes,
            copied_size: rebased.copied_bytes,
            sealed_base_as: rebased.sealed_base_as,
        })
    }

    /// The base as it was named; empty for none.
    fn named(&self) -> &OsStr {
        let named = self.base.as_ref().or(self.backing.as_ref());
        named.map_or(OsStr::new(""), OsString::as_os_str)
    }

    fn new_base(&self, base_dirs: &[PathBuf]) -> Result<Option<Base>, Failure> {
        if self.named().is_empty() || self.named() == "none" {
            return Ok(None);
        }
        let base = base::find(self.named(), &self.base_options, base_dirs)?;
        if let Base::Image { path, snapshot, .. } = &base
            && snapshot.is_none()
            && same_directory(path, &self.image)
        {
            let what = "an image cannot be its own base; a snapshot of it can: IMAGE@SNAPSHOT";
            return Err(Failure::usage(what));
        }
        Ok(Some(base))
    }

    fn rebase(&self, base: Option<&Base>, base_dirs: &[PathBuf]) -> Result<Rebased, Failure> {
        let rebased = if self.is_unsafe {
            // The old base may be gone: that is what this form is for.
            rebase_unsafe(&self.image, base, base_dirs)
        } else {
            let name = file_name(&self.image)?;
            open::for_writing(&self.image, base_dirs, PURPOSE)?.rebase(base, &name)
        };
        let locked = matches!(&rebased, Err(e) if e.kind() == ErrorKind::Locked);
        let rebased = rebased.doing(|| {
            let base = self.named().display();
            format!("{PURPOSE} {} on '{base}'", self.image.display())
        });
        rebased.map_err(|f| {
            if locked {
                f.advising("stop that process, or give a snapshot of it: IMAGE@SNAPSHOT")
            } else {
                f
            }
        })
    }
}

/// The image's own name, also if it was given as `.`.
fn file_name(path: &Path) -> Result<String, Failure> {
    let full = path.canonicalize();
    let full = full.as_deref().unwrap_or(path);
    let name = full.file_name().and_then(OsStr::to_str);
    let no_name = || Failure::usage(format!("{} is not the name of an image", path.display()));
    name.map(str::to_owned).ok_or_else(no_name)
}

fn same_directory(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let image = self.filename.display();
        match &self.base {
            Some(base) => writeln!(f, "{image}: its base is now {}", base.display())?,
            None => writeln!(f, "{image}: independent of any base now")?,
        }
        if let Some(name) = &self.sealed_base_as {
            writeln!(f, "the base's present state is now its snapshot '{name}'")?;
        }
        if self.safe {
            let written = Bytes(self.written_size);
            writeln!(
                f,
                "the disk shows what it showed; {written} written for that"
            )?;
        }
        if self.copied_size > 0 {
            let copied = Bytes(self.copied_size);
            writeln!(
                f,
                "copied {copied} of the base, which is on another filesystem"
            )?;
        }
        Ok(())
    }
}
