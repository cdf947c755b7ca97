// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why the program ends: one line for the user and an exit code.

use std::error::Error as StdError;

use crate::connection::{chain, with_advice};

/// Exit code of a usage error: arguments that cannot be used (as in sysexits.h).
pub const EXIT_USAGE: u8 = 64;
/// Exit code of everything else that failed.
pub const EXIT_FAILURE: u8 = 1;

/// Why the program ends.
#[derive(Debug)]
pub struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    /// Something failed.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: EXIT_FAILURE,
        }
    }

    /// The arguments cannot be used.
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: EXIT_USAGE,
        }
    }

    /// With what lies behind it.
    #[must_use]
    pub fn caused_by(mut self, error: &dyn StdError) -> Self {
        self.message = format!("{}: {}", self.message, chain(error));
        self
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        self.code
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<pcow_format::Error> for Failure {
    fn from(error: pcow_format::Error) -> Self {
        Self::new(with_advice(&error))
    }
}
