// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask crash`: builds the search for crashes that break a promise, optimised, and runs it.
//!
//! What is searched and how is its own affair (`tests/crash`). With `--errors` the calls below the format's seam fail, too:
//! those that `pcow-img` and a backend that serves make to the kernel (`tests/tests/failing_calls`).

use crate::error::{Error, Result};
use crate::run;

/// Arguments of `cargo xtask crash`.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// What the search is given: --help tells
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    search: Vec<String>,
}

/// Prints what the search says.
///
/// # Errors
/// It cannot be built, or it found something.
pub fn command(arguments: &Arguments) -> Result<()> {
    search(&arguments.search)?;
    if arguments.search.iter().any(|word| word == "--errors") {
        fail_system_calls()?;
    }
    Ok(())
}

fn fail_system_calls() -> Result<()> {
    let mut build = run::cargo(&["build", "--release", "--bins"]);
    let mut all = run::cargo(&["test", "--release", "--package", "pcow-tests"]);
    all.args(["--test", "failing_calls", "--", "--ignored", "--nocapture"]);
    // Each of them uses all processors.
    all.arg("--test-threads=1");
    for command in [&mut build, &mut all] {
        if !run::shown(command)? {
            return Err(Error::Failed("see above".into()));
        }
    }
    Ok(())
}

/// Runs the search with `arguments`.
///
/// # Errors
/// As [`command`].
pub fn search(arguments: &[String]) -> Result<()> {
    let mut search = run::cargo(&[
        "run",
        "--quiet",
        "--release",
        "--package",
        "pcow-crash",
        "--",
    ]);
    if run::shown(search.args(arguments))? {
        return Ok(());
    }
    Err(Error::Failed("see above".into()))
}
