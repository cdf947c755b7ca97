// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The crate's one error type: a kind for programs, a message for people, and the cause.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use crate::medium::Hindrance;

/// What went wrong, as far as a caller may want to act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The image, snapshot or file does not exist.
    NotFound,
    /// The target of a creation exists already.
    Exists,
    /// The path is not a pcow image.
    NotAnImage,
    /// The image needs a version or feature that this program does not know.
    Unsupported,
    /// The image contradicts itself or fails a checksum.
    Corrupt,
    /// A base image or one of its layers is not where the image says.
    BaseMissing,
    /// A raw base is not the file that it was when the image was made.
    BaseChanged,
    /// A base lies outside the directories that may be used.
    BaseForbidden,
    /// Another process holds the image.
    Locked,
    /// A frontend has the image in use, and no backend serves it.
    Orphaned,
    /// A file that is about to be written has more than one name.
    Linked,
    /// Of the two files of the active layer only one is on DAX.
    MixedDomains,
    /// What was to be a stream is none, or is damaged.
    Stream,
    /// A stream ends too early.
    StreamCut,
    /// Another stream into this image was begun and is not complete.
    Unfinished,
    /// An argument is out of its range.
    InvalidArgument,
    /// The filesystem has no space left.
    NoSpace,
    /// A flush failed earlier, so what is durable is not known any more.
    FlushFailed,
    /// The operating system refused an operation.
    Io,
}

/// An error of an image operation: a sentence that says what failed and on what, with its cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Result of an image operation.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a deeper cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// The same error with `source` as its cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// What kind of error this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What the user can do about an error of this kind, where there is a general answer.
    pub fn advice(&self) -> Option<&'static str> {
        match self.kind {
            ErrorKind::NotAnImage => Some(
                "give the image's directory; a raw file is used as a base with --base-format raw",
            ),
            ErrorKind::Unsupported => Some("use a newer pcow"),
            ErrorKind::Corrupt => Some("run 'pcow-img check' on it; restore it from a backup"),
            ErrorKind::BaseMissing => Some(
                "put the base back, or link the image to another one with 'pcow-img rebase --unsafe'",
            ),
            ErrorKind::BaseChanged => {
                Some("restore the base's old content, or make a new image on the changed base")
            }
            ErrorKind::BaseForbidden => {
                Some("allow its directory with --base-dir DIR if the image can be trusted")
            }
            ErrorKind::Locked => {
                Some("stop that process first, or work on a clone made with 'create --base'")
            }
            ErrorKind::Orphaned => Some("start a backend for it, or stop the virtual machine"),
            ErrorKind::Linked => Some(
                "this looks like a copy made with 'cp -al'; copy the image with 'cp -a' or clone it",
            ),
            ErrorKind::MixedDomains => Hindrance::NotEnabled.advice(),
            ErrorKind::Stream => Some("send it again"),
            ErrorKind::StreamCut => Some(
                "send the rest with 'pcow-img send --resume', and what 'pcow-img receive --token' prints",
            ),
            ErrorKind::Unfinished => Some(
                "go on with that one ('pcow-img receive --token'), or give it up with 'pcow-img receive --abort'",
            ),
            ErrorKind::NoSpace => Some("free space on the filesystem and try again"),
            ErrorKind::FlushFailed => {
                Some("make sure that the medium works, and run 'pcow-img check --repair'")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|e| e as &(dyn StdError + 'static))
    }
}

/// Gives an operating-system error its context.
pub(crate) trait IoContext<T> {
    /// Wraps the error with the operation that failed, for example `cannot write a.map`.
    fn context(self, operation: impl FnOnce() -> String) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, operation: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| {
            let kind = match e.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
                Some(libc::ENOENT) => ErrorKind::NotFound,
                Some(libc::EEXIST) => ErrorKind::Exists,
                _ => ErrorKind::Io,
            };
            Error::new(kind, operation()).caused_by(e)
        })
    }
}

/// An error and its causes in one line.
pub(crate) fn chain_text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = StdError::source(error);
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}
