// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line as a whole: global options, help, and usage errors in one line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser};

use crate::commands::Command;
use crate::console::Form;
use crate::failure::Failure;

const AFTER_HELP: &str = "\
Sizes are bytes, or a number with K, M, G or T (1024 and its powers).

Exit codes:
  0   done; check: no fault found; compare: no difference
  1   refused or failed; check: not everything could be looked at; compare: they differ
  2   check: the image is corrupt; compare: refused or failed
  3   check: space is taken for nothing, no other fault
  63  check: the image needs a version or feature that this program does not know
  64  the command line is wrong";

/// Makes, shows and changes pcow images: persistent memory for virtual machines, with bases and snapshots.
///
/// An image is a directory. A base may be another image or a raw file; formats are never guessed.
#[derive(Debug, Parser)]
#[command(name = "pcow-img", version, after_help = AFTER_HELP, subcommand_required = true)]
#[command(arg_required_else_help = false)]
#[command(disable_help_subcommand = true)]
pub struct Cli {
    /// Options of all commands.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of all commands.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of all commands")]
pub struct Global {
    /// Form of the output
    #[arg(
        long,
        global = true,
        value_enum,
        default_value = "human",
        value_name = "FORM"
    )]
    pub output: Form,

    /// Say nothing about success
    #[arg(short, long, global = true)]
    pub quiet: bool,

    /// Directory below which the files of bases may be, besides the one that the image lies in; may be repeated
    #[arg(long = "base-dir", global = true, value_name = "DIR")]
    pub base_dirs: Vec<PathBuf>,

    /// Socket of the backend that serves the image, if it is not control.sock in the image's directory
    #[arg(long, global = true, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

/// Reads the command line. Prints help or version and ends the process if that is what was asked for.
///
/// # Errors
/// One line for a command line that is wrong.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Cli, Failure> {
    Cli::try_parse_from(args).map_err(|error| {
        if !error.use_stderr() {
            error.exit();
        }
        Failure::usage(one_line(&error.to_string())).advising(format!("see '{}'", help_call()))
    })
}

/// The first paragraphs of a message of the parser, without usage and pointer to the help.
fn one_line(text: &str) -> String {
    let is_end = |l: &&str| l.starts_with("Usage:") || l.starts_with("For more information");
    let mut line = String::new();
    for part in text.lines().map(str::trim).take_while(|l| !is_end(l)) {
        if part.starts_with("tip:") {
            line.push(';');
        }
        if !part.is_empty() && !line.is_empty() {
            line.push(' ');
        }
        line.push_str(part);
    }
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

/// How to get the help that fits the command line.
fn help_call() -> String {
    let name = std::env::args().nth(1).unwrap_or_default();
    if Command::exists(&name) {
        format!("pcow-img {name} --help")
    } else {
        "pcow-img --help".to_owned()
    }
}
