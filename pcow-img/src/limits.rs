// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Limits of the process.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Allows as many open files as this process may have: a chain of layers takes two for each.
pub fn raise_open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // If it is refused, an image that needs more files says so itself.
    let _ = setrlimit(Resource::Nofile, limit);
}
