// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The harness of the end-to-end tests: real backends, real images, and what looks at them from outside.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod backend;
pub mod random;
pub mod scratch;
pub mod waiting;

use std::path::PathBuf;

/// A program of the workspace, beside the running test.
///
/// # Panics
/// If it was not built: `cargo build --bins` (with `--release` for release tests) does that, and `cargo xtask test` does
/// it by itself.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let dir = test.parent().and_then(|deps| deps.parent()).unwrap();
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} is not there: build it with 'cargo build --workspace --bins' first",
        path.display()
    );
    path
}
