// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the demo plays: a folder, commands that are shown before they are run, guests, and claims.
//!
//! Does not know the story.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::cache;
use crate::error::{Error, Result};
use crate::run;

const BOOT_SCRIPT: &str = include_str!("boot.sh");

/// What a guest's init says last; its script's exit status follows.
const EXIT_MARK: &str = "PCOW-GUEST-EXIT ";

/// A folder with programs that are found by name, and with what a guest boots.
#[derive(Debug)]
pub struct Stage {
    folder: PathBuf,
    path: OsString,
}

/// What a guest said.
#[derive(Debug)]
pub struct Answers(Vec<String>);

impl Stage {
    /// Empties `folder` and puts links to `programs`, and to the other `files` under their names, there.
    ///
    /// # Errors
    /// A file or link cannot be made.
    pub fn set(folder: &Path, programs: &[PathBuf], files: &[(&str, &Path)]) -> Result<Self> {
        cache::remove_folder(folder)?;
        let bin = folder.join("bin");
        cache::create_folder(&bin)?;
        for program in programs {
            let name = program.file_name().unwrap_or_default();
            link(program, &bin.join(name))?;
        }
        for (name, file) in files {
            link(file, &folder.join(name))?;
        }
        let boot = folder.join("boot.sh");
        fs::write(&boot, BOOT_SCRIPT).map_err(Error::file("write", &boot))?;
        let others = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths([bin].into_iter().chain(env::split_paths(&others)))
            .map_err(|_| Error::Unusable("the name of the cache folder has a colon".into()))?;
        Ok(Self {
            folder: folder.to_path_buf(),
            path,
        })
    }

    /// Shows and runs a command line, shows what it says, and returns that.
    ///
    /// # Errors
    /// It cannot be run or fails.
    pub fn shell(&self, line: &str) -> Result<String> {
        println!("  $ {line}");
        let output = run::capture(self.command("sh").args(["-c", line]))?;
        for line in output.lines() {
            println!("  {line}");
        }
        Ok(output)
    }

    /// Boots a guest that runs `script`, with a backend for the image `<name>.pcow`. Shows the script and what the
    /// guest says, and returns that.
    ///
    /// # Errors
    /// Backend, QEMU or script fail.
    pub fn boot(&self, name: &str, script: &str) -> Result<Answers> {
        println!("  $ pcow-backend --socket {name}.sock --image {name}.pcow 2> {name}.log &");
        let backend = Backend::start(self, name)?;
        println!("  $ sh boot.sh {name}.sock << 'END'");
        for line in script.lines() {
            println!("      {line}");
        }
        println!("  END");
        let answers = self.guest(name, script)?;
        println!("  $ kill %1");
        backend.stop()?;
        Ok(answers)
    }

    fn guest(&self, name: &str, script: &str) -> Result<Answers> {
        let mut command = self.command("sh");
        command
            .args(["boot.sh", &format!("{name}.sock")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut guest = Running::start(&mut command)?;
        guest.feed(script)?;
        let answers = guest.listen()?;
        guest.end()?;
        Ok(answers)
    }

    /// A command that runs in the folder and finds the programs.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.folder).env("PATH", &self.path);
        command
    }
}

fn link(target: &Path, name: &Path) -> Result<()> {
    symlink(target, name).map_err(Error::file("link", name))
}

impl Answers {
    /// What follows `key` on its line.
    ///
    /// # Errors
    /// The guest did not say it.
    pub fn value(&self, key: &str) -> Result<&str> {
        let after = |line| str::strip_prefix(line, key)?.strip_prefix(": ");
        self.0
            .iter()
            .find_map(|line| after(line))
            .ok_or_else(|| Error::Failed(format!("the guest did not say '{key}'")))
    }
}

/// Shows a claim that holds.
///
/// # Errors
/// It does not hold.
pub fn claim(text: &str, holds: bool) -> Result<()> {
    if holds {
        println!("  => {text}");
        return Ok(());
    }
    Err(Error::Failed(format!("this is not so: {text}")))
}

/// A backend in the background; killed when dropped.
#[derive(Debug)]
struct Backend {
    process: Running,
    log: PathBuf,
}

impl Backend {
    fn start(stage: &Stage, name: &str) -> Result<Self> {
        let log = stage.folder.join(format!("{name}.log"));
        let mut command = stage.command("pcow-backend");
        command
            .args(["--socket", &format!("{name}.sock")])
            .args(["--image", &format!("{name}.pcow")])
            .stderr(File::create(&log).map_err(Error::file("create", &log))?);
        let process = Running::start(&mut command)?;
        Ok(Self { process, log })
    }

    fn stop(mut self) -> Result<()> {
        let id = i32::try_from(self.process.0.id()).ok();
        if let Some(pid) = id.and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM)
                .map_err(|errno| run::start_error("kill")(errno.into()))?;
        }
        self.process.end().map_err(|error| {
            let said = fs::read_to_string(&self.log).unwrap_or_default();
            Error::Failed(format!("{error}; it said:\n{said}"))
        })
    }
}

/// A process; killed when dropped.
#[derive(Debug)]
struct Running(Child, String);

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().map_err(run::start_error(&name))?;
        Ok(Self(child, name))
    }

    /// Writes all of its standard input.
    fn feed(&mut self, text: &str) -> Result<()> {
        let Some(mut input) = self.0.stdin.take() else {
            return Ok(());
        };
        let written = input.write_all(text.as_bytes());
        written.map_err(run::start_error(&self.1))
    }

    /// Shows and collects what a guest says, whose script has to succeed.
    fn listen(&mut self) -> Result<Answers> {
        let mut answers = Vec::new();
        let mut lines = self.0.stdout.take().into_iter().flat_map(lines);
        let status = lines.find_map(|line| {
            if let Some(status) = line.strip_prefix(EXIT_MARK) {
                return Some(status.to_owned());
            }
            println!("  {line}");
            answers.push(line);
            None
        });
        // The kernel's last words.
        lines.for_each(drop);
        match status.as_deref() {
            Some("0") => Ok(Answers(answers)),
            Some(status) => Err(Error::Failed(format!("the guest's script ({status})"))),
            None => Err(Error::Failed("the guest ended before its script".into())),
        }
    }

    fn end(&mut self) -> Result<()> {
        let status = self.0.wait().map_err(run::start_error(&self.1))?;
        if status.success() {
            return Ok(());
        }
        Err(Error::Failed(format!("{} ended with {status}", self.1)))
    }
}

fn lines(output: ChildStdout) -> impl Iterator<Item = String> {
    BufReader::new(output)
        .split(b'\n')
        .map_while(std::result::Result::ok)
        .map(|line| String::from_utf8_lossy(&line).trim_end().to_owned())
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
