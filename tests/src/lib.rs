// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The harness of the end-to-end tests: real backends, real images, and what looks at them from outside.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod backend;
pub mod causal;
pub mod files;
pub mod guest;
pub mod handshake;
pub mod loop_mount;
pub mod memory;
#[cfg(target_arch = "x86_64")]
pub mod micro_vm;
pub mod old_kernel;
pub mod output;
pub mod pattern;
pub mod proc;
pub mod qemu;
pub mod qmp;
pub mod random;
pub mod records;
pub mod scratch;
pub mod soak;
pub mod strace;
pub mod tpm;
pub mod trace;
#[cfg(target_arch = "x86_64")]
pub mod tracer;
pub mod waiting;

use std::path::PathBuf;

/// A program of the workspace, beside the running test or program.
///
/// # Panics
/// If it was not built: `cargo build --bins` (with `--release` for release tests) does that, and `cargo xtask test` does
/// it by itself.
pub fn program(name: &str) -> PathBuf {
    let running = std::env::current_exe().unwrap();
    // A test is in a folder below that of the programs.
    let mut found = running
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name));
    let missing = "build it with 'cargo build --workspace --bins' first";
    found
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("{name} is not there: {missing}"))
}
