// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask soak`: builds the backend and the soak program, optimised, and runs it.
//!
//! What is done and counted is that program's own affair (`tests/src/soak`).

use crate::error::{Error, Result};
use crate::run;

const PROGRAMS: [&str; 8] = [
    "--package",
    "pcow-backend",
    "--bin",
    "pcow-backend",
    "--package",
    "pcow-tests",
    "--bin",
    "pcow-soak",
];

/// Arguments of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How often the backend is killed; the long form is 10000
    #[arg(long, default_value_t = 200)]
    kills: u32,
    /// Have frontends come and go for an hour instead, and compare what the backend takes
    #[arg(long, conflicts_with_all = ["kills", "minutes"])]
    hour: bool,
    /// As --hour, for so many minutes
    #[arg(long, conflicts_with = "kills")]
    minutes: Option<u32>,
    /// Repeat the run of this seed
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs it; its last line is the figure.
///
/// # Errors
/// Something was wrong; what was printed says what.
pub fn command(arguments: &Arguments) -> Result<()> {
    let mut build = run::cargo(&["build", "--release"]);
    let mut soak = run::cargo(&["run", "--quiet", "--release", "--package", "pcow-tests"]);
    soak.args(["--bin", "pcow-soak", "--", "--kills"]);
    soak.arg(arguments.kills.to_string());
    let minutes = arguments.hour.then_some(60).or(arguments.minutes);
    for (name, value) in [
        ("--minutes", minutes.map(u64::from)),
        ("--seed", arguments.seed),
    ] {
        if let Some(value) = value {
            soak.arg(name).arg(value.to_string());
        }
    }
    for command in [build.args(PROGRAMS), &mut soak] {
        if !run::shown(command)? {
            return Err(Error::Failed("see above".into()));
        }
    }
    Ok(())
}
