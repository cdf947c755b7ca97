// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `completions` and `man`: made of the definitions that the command line is read by.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use serde::Serialize;

use crate::cli::Cli;
use crate::console::Console;
use crate::failure::Failure;

const NAME: &str = "pcow-img";

/// Print what a shell needs to complete command lines of this program
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// A script for a shell.
#[derive(Debug, Serialize)]
struct Script {
    /// The shell.
    shell: String,
    /// The text for it.
    script: String,
}

impl Completions {
    /// Prints the script.
    pub fn run(&self, console: &mut Console) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), NAME, &mut script);
        console.show(&Script {
            shell: self.shell.to_string(),
            script: String::from_utf8_lossy(&script).into_owned(),
        })
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.script)
    }
}

/// Write the man pages into a directory
#[derive(Debug, Args)]
pub struct Man {
    /// The directory
    directory: PathBuf,
}

/// What `man` wrote.
#[derive(Debug, Serialize)]
struct Pages {
    /// The files.
    files: Vec<PathBuf>,
}

impl Man {
    /// Writes one page for the program and one for each command.
    pub fn run(&self, console: &mut Console) -> Result<(), Failure> {
        let mut program = Cli::command();
        program.build();
        let mut files = vec![self.write(&program, NAME)?];
        for command in program.get_subcommands().filter(|c| !c.is_hide_set()) {
            let name = format!("{NAME}-{}", command.get_name());
            files.push(self.write(&command.clone().display_name(&name), &name)?);
        }
        console.confirm(&Pages { files })
    }

    fn write(&self, command: &clap::Command, name: &str) -> Result<PathBuf, Failure> {
        let path = self.directory.join(format!("{name}.1"));
        write_page(command, &path)
            .map_err(|e| Failure::refused(format!("cannot write {}: {e}", path.display())))?;
        Ok(path)
    }
}

fn write_page(command: &clap::Command, path: &Path) -> io::Result<()> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    std::fs::write(path, page)
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.files
            .iter()
            .try_for_each(|file| writeln!(f, "{}", file.display()))
    }
}
