// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arguments that name a base: `IMAGE`, `IMAGE@SNAPSHOT` or a raw file. Formats are never guessed.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use pcow_format::{ErrorKind, Stored, ops};

use crate::failure::{Doing, Failure, Status};

/// What kind of file a base is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BaseFormat {
    /// Another pcow image
    Pcow,
    /// A file that holds the bytes of a disk
    Raw,
}

/// How a base is to be used.
#[derive(Debug, Args)]
pub struct BaseOptions {
    /// Format of the base [default: pcow]; it is never guessed
    #[arg(short = 'F', long, value_enum, value_name = "FORMAT")]
    pub base_format: Option<BaseFormat>,

    /// Refer to the base's files where they are, instead of giving them a second name in the image
    ///
    /// The image then depends on the base: moving or deleting it breaks the image. Raw bases are always referred to.
    #[arg(long)]
    pub reference: bool,
}

/// Finds the base that `text` names, and makes sure that it is there and of the given format. Changes nothing.
///
/// # Errors
/// One line that says what is wrong with it.
pub fn find(
    text: &OsStr,
    options: &BaseOptions,
    base_dirs: &[PathBuf],
) -> Result<ops::Base, Failure> {
    match options.base_format.unwrap_or(BaseFormat::Pcow) {
        BaseFormat::Raw => raw(Path::new(text)),
        BaseFormat::Pcow => {
            let (path, snapshot) = split(text)?;
            image(path, snapshot, base_dirs).map(|()| ops::Base::Image {
                path: path.to_owned(),
                snapshot: snapshot.map(str::to_owned),
                reference: options.reference,
            })
        }
    }
}

/// Splits `IMAGE@SNAPSHOT`. What follows the last `@` is a snapshot unless it has a `/`, so that directories may have
/// an `@` in their names; an image that has one itself is written with a `/` at its end.
///
/// # Errors
/// If one of the two is empty.
pub fn split(text: &OsStr) -> Result<(&Path, Option<&str>), Failure> {
    let bytes = text.as_bytes();
    let Some(at) = bytes.iter().rposition(|b| *b == b'@') else {
        return Ok((Path::new(text), None));
    };
    let (path, snapshot) = (&bytes[..at], &bytes[at + 1..]);
    if snapshot.contains(&b'/') {
        return Ok((Path::new(text), None));
    }
    match std::str::from_utf8(snapshot) {
        Ok(name) if !name.is_empty() && !path.is_empty() => {
            Ok((Path::new(OsStr::from_bytes(path)), Some(name)))
        }
        _ => Err(Failure::usage(format!(
            "'{}' names no base: write IMAGE or IMAGE@SNAPSHOT",
            text.display()
        ))),
    }
}

fn raw(path: &Path) -> Result<ops::Base, Failure> {
    if look_at(path)?.is_dir() {
        return Err(refused(
            path,
            "it is a directory, not a raw file",
            "leave out '--base-format raw' if it is a pcow image",
        ));
    }
    Ok(ops::Base::Raw {
        path: path.to_owned(),
    })
}

fn image(path: &Path, snapshot: Option<&str>, base_dirs: &[PathBuf]) -> Result<(), Failure> {
    if !look_at(path)?.is_dir() {
        return Err(refused(
            path,
            "it is a file, not a pcow image",
            "give '--base-format raw' if it holds the bytes of a disk",
        ));
    }
    let stored = Stored::open(path, base_dirs);
    let foreign = matches!(&stored, Err(e) if e.kind() == ErrorKind::NotAnImage);
    let context = || format!("cannot use the base {}", path.display());
    let stored = stored.doing(context).map_err(|f| {
        if foreign {
            f.advising("give the directory of a pcow image")
        } else {
            f
        }
    })?;
    snapshot
        .map_or(Ok(()), |name| stored.root().snapshot(name).map(drop))
        .doing(context)
}

fn look_at(path: &Path) -> Result<std::fs::Metadata, Failure> {
    std::fs::metadata(path).map_err(|e| refused(path, &e.to_string(), "check the path of the base"))
}

fn refused(path: &Path, why: &str, advice: &str) -> Failure {
    Failure::Refused {
        message: format!("cannot use the base {}: {why}", path.display()),
        advice: Some(advice.to_owned()),
        status: Status::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_snapshot_follows_the_last_at_sign_unless_a_slash_follows_that() {
        let cases = [
            ("vm", "vm", None),
            ("vm@old", "vm", Some("old")),
            ("vm@3", "vm", Some("3")),
            ("/home/me@work/vm", "/home/me@work/vm", None),
            ("/home/me@work/vm@old", "/home/me@work/vm", Some("old")),
            ("vm@1/", "vm@1/", None),
        ];
        for (text, path, snapshot) in cases {
            let found = split(OsStr::new(text)).unwrap();
            assert_eq!(found, (Path::new(path), snapshot));
        }
        assert!(split(OsStr::new("vm@")).is_err());
        assert!(split(OsStr::new("@old")).is_err());
    }
}
