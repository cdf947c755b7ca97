// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Development tasks: `cargo xtask <command>`.
//!
//! Builds what the tests need and a user does not (a patched QEMU, a guest's kernel and
//! initramfs), runs the whole check, and shows what it is all for. Knows nothing of images, faults
//! or messages, but the command lines of the demo.

mod apt;
mod arch;
mod bench;
mod boot;
mod cache;
mod crash;
mod demo;
mod error;
mod failures;
mod fuzz;
mod guest;
mod initramfs;
mod lab;
mod modules;
mod packages;
mod qemu;
mod run;
mod series;
mod soak;
mod sources;
mod test;
mod vmlinux;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::cache::Cache;
use crate::error::{Error, Result};

/// Development tasks of pcow.
///
/// Everything fetched or built is kept under $PCOW_CACHE, else $XDG_CACHE_HOME/pcow, else
/// ~/.cache/pcow, and done again only when what it is made from has changed.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Fetch QEMU's source, apply the patch series and build qemu-system-x86_64
    ///
    /// With QEMU_SRC=DIR in the environment, a source tree of your own is patched (unless it
    /// already is) and built.
    Qemu(qemu::Arguments),
    /// Make a kernel and an initramfs for test guests from Debian's packages
    Guest(guest::Arguments),
    /// Run what needs real KVM and real DAX filesystems, in an emulated host that has both
    Lab(lab::Arguments),
    /// Search for crashes that break a promise of the image format
    Crash(crash::Arguments),
    /// Feed what comes from outside with what nobody thought of
    Fuzz(fuzz::Arguments),
    /// Measure what pcow costs, and print tables
    Bench(bench::Arguments),
    /// Kill the backend again and again under load, and count what is wrong afterwards
    Soak(soak::Arguments),
    /// Set everything up, then show step by step what pcow is for
    Demo(demo::Arguments),
    /// Set everything up, then run the formatter, the linter and all tests
    Test(test::Arguments),
}

fn main() -> ExitCode {
    match Arguments::parse().task.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

impl Task {
    fn run(self) -> Result<()> {
        let cache = Cache::open()?;
        match self {
            Self::Qemu(arguments) => qemu::command(&cache, &arguments),
            Self::Guest(arguments) => guest::command(&cache, &arguments),
            Self::Lab(arguments) => lab::command(&cache, &arguments),
            Self::Crash(arguments) => crash::command(&arguments),
            Self::Fuzz(arguments) => fuzz::command(&arguments),
            Self::Bench(arguments) => bench::command(&cache, &arguments),
            Self::Soak(arguments) => soak::command(&arguments),
            Self::Demo(arguments) => demo::command(&cache, &arguments),
            Self::Test(arguments) => test::command(&cache, &arguments),
        }
    }
}

/// Prints `error` and its causes, outermost first.
fn report(error: &Error) {
    eprintln!("error: {error}");
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        eprintln!("  because: {inner}");
        cause = inner.source();
    }
}
