// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opening the image that a command names.

use std::path::{Path, PathBuf};

use pcow_format::{ErrorKind, Image, ImageLock, Result as FormatResult, Stored};

use crate::console::warn;
use crate::failure::{Doing, Failure};

/// Opens the image as it stands, without a lock. `purpose` reads like `cannot show`.
///
/// # Errors
/// If there is no image that can be read.
pub fn for_reading(path: &Path, base_dirs: &[PathBuf], purpose: &str) -> Result<Stored, Failure> {
    explain(Stored::open(path, base_dirs), path, purpose)
}

/// Opens the image and keeps writers out for as long as the lock lives.
///
/// # Errors
/// As [`for_reading`], and if another process writes to the image.
pub fn for_reading_alone(
    path: &Path,
    base_dirs: &[PathBuf],
    purpose: &str,
) -> Result<(Stored, Option<ImageLock>), Failure> {
    let lock = for_reading(path, base_dirs, purpose)?.lock_shared();
    let lock = explain(lock, path, purpose)?;
    // Again: what was read before the lock may have changed since.
    Ok((for_reading(path, base_dirs, purpose)?, lock))
}

/// Takes the image for writing.
///
/// # Errors
/// As [`for_reading`], and if the image is in use, lacks its base or may not be written.
pub fn for_writing(path: &Path, base_dirs: &[PathBuf], purpose: &str) -> Result<Image, Failure> {
    let image = explain(Image::open(path, base_dirs), path, purpose)?;
    let lost = image.recovery().discarded_clusters;
    if lost > 0 {
        warn(&format!(
            "{}: {lost} clusters were not flushed before the machine went down; what was written to them since \
             their last flush is lost",
            path.display()
        ));
    }
    Ok(image)
}

fn explain<T>(result: FormatResult<T>, path: &Path, purpose: &str) -> Result<T, Failure> {
    let kind = result.as_ref().err().map(pcow_format::Error::kind);
    let result = result.doing(|| format!("{purpose} {}", path.display()));
    match kind {
        // Whoever can be asked to do it was looked for already.
        Some(ErrorKind::Locked) => result.map_err(|f| {
            f.advising("stop that process first; a backend that has its socket elsewhere is asked with --control PATH; or work on a clone made with 'create --base'")
        }),
        Some(ErrorKind::NotFound) => result
            .map_err(|f| f.advising("check the path, or make the image with 'pcow-img create'")),
        _ => result,
    }
}
