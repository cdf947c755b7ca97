// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The crate's error type.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

/// Result of every fallible operation of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a task could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file failed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program could not be started or spoken to.
    #[error("cannot run {program}")]
    Start {
        /// The program's name.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program whose output was captured ended unsuccessfully.
    #[error("{program} failed ({status}): {output}")]
    Program {
        /// The program's name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        output: String,
    },
    /// A stage with a log failed.
    #[error(
        "{stage} failed ({status}); the last lines of {}:\n{tail}\nthe whole output is in {}",
        log.display(),
        log.display()
    )]
    Stage {
        /// The stage's title.
        stage: String,
        /// How its program ended.
        status: ExitStatus,
        /// The log with the whole output.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// System packages are missing and cannot be installed without being root.
    #[error("system packages are missing; as root, run:\n  {command}")]
    Packages {
        /// The command that installs them.
        command: String,
    },
    /// The lab host did not do all that it should.
    #[error("the lab host with the kernel of {kernel}: {fault}\n{tail}\nthe whole output is in {}", log.display())]
    Lab {
        /// The Debian release of its kernel.
        kernel: &'static str,
        /// What is wrong.
        fault: String,
        /// The last lines that the log has of each failed step.
        tail: String,
        /// The log with the whole output.
        log: PathBuf,
    },
    /// The test run ended with failed stages.
    #[error("failed: {0}")]
    Failed(String),
    /// Something about this machine or the input does not allow the task.
    #[error("{0}")]
    Unusable(String),
}

impl Error {
    /// Makes a closure for `map_err` that says what was tried on `path`.
    pub fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}
