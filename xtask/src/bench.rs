// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask bench`: builds the backend and the bench program, optimised, and runs it.
//!
//! What is measured and how is the bench program's own affair (`tests/src/bin/pcow-bench`).

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::run;

/// What is built: the program that measures, and the one that is measured.
const PROGRAMS: [&str; 8] = [
    "--package",
    "pcow-backend",
    "--bin",
    "pcow-backend",
    "--package",
    "pcow-tests",
    "--bin",
    "pcow-bench",
];

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Fewer rounds: a minute or two in all
    #[arg(long)]
    quick: bool,
    /// A folder on the filesystem to measure besides tmpfs, instead of that for temporary files
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Prints the tables to standard output.
///
/// # Errors
/// Something cannot be built or measured; the reason was printed.
pub fn command(arguments: &Arguments) -> Result<()> {
    let mut build = run::cargo(&["build", "--release"]);
    finish(build.args(PROGRAMS))?;
    let mut bench = run::cargo(&["run", "--quiet", "--release", "--package", "pcow-tests"]);
    bench.args(["--bin", "pcow-bench", "--"]);
    if arguments.quick {
        bench.arg("--quick");
    }
    if let Some(dir) = &arguments.dir {
        // The program runs in the repository's folder.
        let dir = std::path::absolute(dir).map_err(Error::file("find", dir))?;
        bench.arg("--dir").arg(dir);
    }
    finish(&mut bench)
}

fn finish(command: &mut std::process::Command) -> Result<()> {
    if run::shown(command)? {
        return Ok(());
    }
    Err(Error::Failed("see above".into()))
}
