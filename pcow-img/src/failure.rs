// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a command ends: exit codes, and the one line that a failure prints.

use std::error::Error;
use std::fmt;
use std::io;

use pcow_format::ErrorKind;
use rustix::io::Errno;

/// Exit codes. They are part of the interface; the table in `cli` explains them to users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done; `check` found no fault.
    Ok,
    /// The operation failed, or a check could not look at everything.
    Failed,
    /// `compare` found a difference (as `qemu-img`).
    Different,
    /// `compare` could not compare (as `qemu-img`).
    Trouble,
    /// `check` found corruptions.
    Corrupt,
    /// `check` found space that is taken for nothing, and no other fault.
    Leaks,
    /// `check` met a version or feature that this program does not know (as `qemu-img`).
    Unsupported,
    /// The command line is wrong (`EX_USAGE` of sysexits(3)).
    Usage,
}

impl Status {
    /// The number that the process ends with.
    pub fn code(self) -> u8 {
        match self {
            Status::Ok => 0,
            Status::Failed | Status::Different => 1,
            Status::Corrupt | Status::Trouble => 2,
            Status::Leaks => 3,
            Status::Unsupported => 63,
            Status::Usage => 64,
        }
    }
}

/// Why a command ended early: one line, with what the user can do about it.
#[derive(Debug)]
pub enum Failure {
    /// Something was refused or went wrong.
    Refused {
        /// What failed and why, outermost first.
        message: String,
        /// What the user can do.
        advice: Option<String>,
        /// The exit code.
        status: Status,
    },
    /// Whoever read the output is gone, as in `pcow-img map IMAGE | head`.
    OutputClosed,
}

impl Failure {
    /// A fault in the command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Refused {
            message: message.into(),
            advice: None,
            status: Status::Usage,
        }
    }

    /// The same failure with other advice.
    #[must_use]
    pub fn advising(self, advice: impl Into<String>) -> Self {
        match self {
            Self::Refused {
                message, status, ..
            } => Self::Refused {
                message,
                advice: Some(advice.into()),
                status,
            },
            Self::OutputClosed => self,
        }
    }

    /// Prints the failure to standard error, and returns the exit code.
    pub fn report(self) -> Status {
        match &self {
            Self::Refused { status, .. } => {
                eprintln!("pcow-img: {self}");
                *status
            }
            Self::OutputClosed => Status::Ok,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Refused {
            message, advice, ..
        } = self
        else {
            return f.write_str("nobody reads the output");
        };
        f.write_str(message)?;
        advice
            .as_ref()
            .map_or(Ok(()), |advice| write!(f, "; {advice}"))
    }
}

impl From<io::Error> for Failure {
    /// Only output is written through `io` directly.
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::OutputClosed;
        }
        Self::Refused {
            message: format!("cannot write the output: {error}"),
            advice: None,
            status: Status::Failed,
        }
    }
}

/// An error and its causes in one line.
pub fn one_line(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&e| e.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Gives an error of `pcow-format` the command's view of it.
pub trait Doing<T> {
    /// Says what the command was about to do, for example `cannot open vm.pcow`.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T> Doing<T> for pcow_format::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|e| Failure::Refused {
            message: format!("{}: {}", what(), one_line(&e)),
            advice: advice(&e).map(str::to_owned),
            status: Status::Failed,
        })
    }
}

fn advice(error: &pcow_format::Error) -> Option<&'static str> {
    match error.kind() {
        ErrorKind::Exists => Some("choose another name"),
        ErrorKind::Io if is_out_of_files(error) => {
            Some("allow more open files with 'ulimit -n': a chain of layers takes two for each")
        }
        _ => error.advice(),
    }
}

fn is_out_of_files(error: &pcow_format::Error) -> bool {
    let cause = error.source().and_then(|e| e.downcast_ref::<io::Error>());
    cause.and_then(io::Error::raw_os_error) == Some(Errno::MFILE.raw_os_error())
}
