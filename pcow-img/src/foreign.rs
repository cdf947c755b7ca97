// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Formats of other programs, which `qemu-img` reads and writes for this one. It is told the format: it never guesses.
//!
//! A file is read by turning it into a raw one without a name, sparse, in the directory for temporary files (`TMPDIR`).

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use pcow_format::medium::File;
use pcow_format::medium::real::RealFile;
use uuid::Uuid;

use crate::disk::Format;
use crate::failure::Failure;

/// The raw content of a file of another format.
///
/// # Errors
/// If `qemu-img` is not there or refuses the file.
pub fn read(path: &Path, format: Format, purpose: &str) -> Result<Arc<dyn File>, Failure> {
    let temporary = Temporary::beside(&std::env::temp_dir().join("pcow-img"));
    convert((path, format), (&temporary.0, Format::Raw), purpose)?;
    // The open file lives on without its name.
    RealFile::open_raw(&temporary.0)
        .map_err(|e| Failure::refused(format!("{purpose} {}: {e}", path.display())))
}

/// Turns one file into another.
///
/// # Errors
/// If `qemu-img` is not there or fails.
pub fn convert(
    (from, from_format): (&Path, Format),
    (to, to_format): (&Path, Format),
    purpose: &str,
) -> Result<(), Failure> {
    let refused = |why: &str| Failure::refused(format!("{purpose} {}: {why}", from.display()));
    let child = Command::new("qemu-img")
        .args(["convert", "-f", from_format.name(), "-O", to_format.name()])
        .arg(operand(from))
        .arg(operand(to))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output();
    match child {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let what = format!(
                "the format {} needs qemu-img, which is not there",
                other(from_format, to_format).name()
            );
            Err(refused(&what).advising("install it (qemu-utils), or convert to raw elsewhere"))
        }
        Err(e) => Err(refused(&format!("cannot start qemu-img: {e}"))),
        Ok(done) if done.status.success() => Ok(()),
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stderr);
            Err(refused(said.lines().last().unwrap_or("qemu-img failed")))
        }
    }
}

fn other(from: Format, to: Format) -> Format {
    if from == Format::Raw { to } else { from }
}

/// A path that `qemu-img` does not take for an option or a protocol.
fn operand(path: &Path) -> OsString {
    if path.is_absolute() {
        return path.as_os_str().to_owned();
    }
    Path::new(".").join(path).into_os_string()
}

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
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may have another name by now, or may never have been made.
        let _ = std::fs::remove_file(&self.0);
    }
}
