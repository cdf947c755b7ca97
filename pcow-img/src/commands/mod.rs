// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands, one file each: arguments, what is done, and what is printed.

mod check;
mod commit;
mod compact;
mod compare;
mod completions;
mod convert;
mod create;
mod delete;
mod diff;
mod doctor;
mod flush;
mod info;
mod list;
mod map;
mod measure;
mod read;
mod rebase;
mod receive;
mod rename;
mod resize;
mod rollback;
mod send;
mod snapshot;
mod write;

use clap::Subcommand;

use crate::cli::Cli;
use crate::console::Console;
use crate::failure::{Failure, Status};

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    Create(create::Create),
    Info(info::Info),
    List(list::List),
    Snapshot(snapshot::Snapshot),
    Rollback(rollback::Rollback),
    Delete(delete::Delete),
    Rename(rename::Rename),
    Rebase(rebase::Rebase),
    Map(map::Map),
    Check(check::Check),
    Compare(compare::Compare),
    Diff(diff::Diff),
    Read(read::Read),
    Write(write::Write),
    Flush(flush::Flush),
    Commit(commit::Commit),
    Doctor(doctor::Doctor),
    Completions(completions::Completions),
    #[command(hide = true)]
    Man(completions::Man),
    Convert(convert::Convert),
    Measure(measure::Measure),
    Send(send::Send),
    Receive(receive::Receive),
    Resize(resize::Resize),
    Compact(compact::Compact),
}

impl Command {
    /// Whether there is a command of this name.
    pub fn exists(name: &str) -> bool {
        Self::has_subcommand(name)
    }
}

/// Does what the command line says.
///
/// # Errors
/// One line that says what was refused or went wrong.
pub fn run(cli: Cli) -> Result<Status, Failure> {
    let global = &cli.global;
    let mut console = Console::new(global.output, global.quiet);
    match cli.command {
        Command::Create(c) => c.run(global, &mut console),
        Command::Info(c) => c.run(global, &mut console),
        Command::List(c) => c.run(global, &mut console),
        Command::Snapshot(c) => c.run(global, &mut console),
        Command::Rollback(c) => c.run(global, &mut console),
        Command::Delete(c) => c.run(global, &mut console),
        Command::Rename(c) => c.run(global, &mut console),
        Command::Rebase(c) => c.run(global, &mut console),
        Command::Map(c) => c.run(global, &mut console),
        Command::Check(c) => return c.run(global, &mut console),
        Command::Compare(c) => return c.run(global, &mut console),
        Command::Diff(c) => c.run(global, &mut console),
        Command::Read(c) => c.run(global, &mut console),
        Command::Write(c) => c.run(global, &mut console),
        Command::Flush(c) => c.run(global, &mut console),
        Command::Commit(c) => c.run(global, &mut console),
        Command::Doctor(c) => return c.run(&mut console),
        Command::Completions(c) => c.run(&mut console),
        Command::Man(c) => c.run(&mut console),
        Command::Resize(c) => c.run(global, &mut console),
        Command::Measure(c) => c.run(global, &mut console),
        Command::Convert(c) => c.run(global, &mut console),
        Command::Send(c) => c.run(global, &mut console),
        Command::Receive(c) => c.run(global, &mut console),
        Command::Compact(c) => c.run(global, &mut console),
    }?;
    Ok(Status::Ok)
}
