// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `pcow-img`, the command-line tool for pcow images.
//!
//! It turns arguments into calls of `pcow-format` and results into text or JSON. What an image is, and in which order
//! it changes, is not known here.

mod base;
mod cli;
mod commands;
mod console;
mod date;
mod difference;
mod disk;
mod failure;
mod foreign;
mod layers;
mod limits;
mod live;
mod open;
mod progress;
mod size;
mod snapshots;
mod temporary;
mod tree;

use std::process::ExitCode;

fn main() -> ExitCode {
    limits::raise_open_files();
    let run = || commands::run(cli::parse(std::env::args_os())?);
    let status = run().unwrap_or_else(|failure| failure.report());
    ExitCode::from(status.code())
}
