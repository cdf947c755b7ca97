// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The folder where fetched and built things are kept, and keys that say what they were made from.
//!
//! Does not know what is kept there.

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};
use crate::run;

/// The user's cache folder.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
}

/// Keeps other runs out of one part of the cache until dropped.
#[derive(Debug)]
pub struct CacheLock {
    _file: File,
}

impl Cache {
    /// Opens `$PCOW_CACHE`, else `$XDG_CACHE_HOME/pcow`, else `~/.cache/pcow`, and makes it if
    /// it is not there.
    ///
    /// # Errors
    /// None of these variables nor `HOME` is set, or the folder cannot be made.
    pub fn open() -> Result<Self> {
        let root = absolute_variable("PCOW_CACHE")
            .or_else(|| absolute_variable("XDG_CACHE_HOME").map(|home| home.join("pcow")))
            .or_else(|| absolute_variable("HOME").map(|home| home.join(".cache/pcow")))
            .ok_or_else(|| {
                Error::Unusable(
                    "no cache folder: set HOME or PCOW_CACHE to an absolute path".into(),
                )
            })?;
        create_folder(&root)?;
        Ok(Self { root })
    }

    /// Makes and returns the folder `name` of the cache.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.root.join(name);
        create_folder(&folder)?;
        Ok(folder)
    }

    /// Waits until no other run works on the part `name`, and keeps others out.
    ///
    /// # Errors
    /// The lock file cannot be made or locked.
    pub fn lock(&self, name: &str) -> Result<CacheLock> {
        let path = self.root.join(format!("{name}.lock"));
        let file = File::create(&path).map_err(Error::file("create", &path))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!("waiting for another run that holds {}", path.display());
            flock(&file, FlockOperation::LockExclusive)
                .map_err(|errno| Error::file("lock", &path)(errno.into()))?;
        }
        Ok(CacheLock { _file: file })
    }
}

/// Makes `path` and the folders above it.
///
/// # Errors
/// What the system said.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::file("create", path))
}

/// Removes the folder `path` with all that is in it; that it is not there is fine.
///
/// # Errors
/// What the system said.
pub fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Returns a short key, which is another one as soon as any of `parts` changes.
///
/// # Errors
/// `sha256sum` cannot be run.
pub fn key<T: AsRef<[u8]>>(parts: &[T]) -> Result<String> {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(run::start_error("sha256sum"))?;
    if let Some(mut input) = child.stdin.take() {
        for part in parts {
            feed(&mut input, part.as_ref()).map_err(run::start_error("sha256sum"))?;
        }
    }
    let output = child
        .wait_with_output()
        .map_err(run::start_error("sha256sum"))?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .chars()
        .take(16)
        .collect())
}

/// Writes `part` behind its length, so that no two lists of parts read the same.
fn feed(input: &mut impl Write, part: &[u8]) -> std::io::Result<()> {
    writeln!(input, "{}", part.len())?;
    input.write_all(part)
}

fn absolute_variable(name: &str) -> Option<PathBuf> {
    env::var_os(name)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}

#[cfg(test)]
mod tests {
    use super::key;

    #[test]
    fn a_key_tells_apart_lists_that_concatenate_to_the_same_bytes() {
        let one = key(&["ab", "c"]).unwrap();
        assert_eq!(one.len(), 16);
        assert_eq!(one, key(&["ab", "c"]).unwrap());
        assert_ne!(one, key(&["a", "bc"]).unwrap());
    }
}
