// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the demo plays: a folder, commands that are shown before they are run, guests, and claims.
//!
//! Does not know the story.

use std::cell::Cell;
use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Split, Write};
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
    /// How many jobs would run in the background of a shell that all of this is typed into.
    jobs: Cell<u32>,
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
            jobs: Cell::new(0),
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
        self.start(name, None, script)?.finish()
    }

    /// The same, for a guest that runs in the background and reads what is written to the FIFO `keyboard`.
    ///
    /// # Errors
    /// Backend or QEMU cannot be started.
    pub fn boot_in_background(
        &self,
        name: &str,
        keyboard: &str,
        script: &str,
    ) -> Result<Guest<'_>> {
        self.start(name, Some(keyboard), script)
    }

    fn start(&self, name: &str, keyboard: Option<&str>, script: &str) -> Result<Guest<'_>> {
        println!("  $ pcow-backend --socket {name}.sock --image {name}.pcow 2> {name}.log &");
        let backend = Backend::start(self, name)?;
        let socket = format!("{name}.sock");
        match keyboard {
            Some(keyboard) => println!("  $ sh boot.sh {socket} {keyboard} << 'END' &"),
            None => println!("  $ sh boot.sh {socket} << 'END'"),
        }
        for line in script.lines() {
            println!("      {line}");
        }
        println!("  END");
        let mut command = self.command("sh");
        command
            .args(["boot.sh", &socket])
            .args(keyboard)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = Running::start(&mut command)?;
        process.feed(script)?;
        let job = self.jobs.get() + 1;
        self.jobs.set(job + u32::from(keyboard.is_some()));
        Ok(Guest {
            lines: process.0.stdout.take().map(Lines::new),
            process,
            backend,
            answers: Vec::new(),
            stage: self,
            job,
        })
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

/// A guest that runs, and its backend.
#[derive(Debug)]
pub struct Guest<'a> {
    process: Running,
    backend: Backend,
    lines: Option<Lines>,
    answers: Vec<String>,
    stage: &'a Stage,
    /// The number of the backend's job; that of a guest in the background follows.
    job: u32,
}

impl Guest<'_> {
    /// Shows what the guest says until it has said something after `key`, and returns that.
    ///
    /// # Errors
    /// The guest ended before.
    pub fn wait_for(&mut self, key: &str) -> Result<String> {
        while let Some(line) = self.next_line() {
            let after = line
                .strip_prefix(key)
                .and_then(|rest| rest.strip_prefix(": "));
            let value = after.map(str::to_owned);
            self.show(line);
            if let Some(value) = value {
                return Ok(value);
            }
        }
        Err(Error::Failed(format!("the guest did not say '{key}'")))
    }

    /// Waits for the end of the guest, whose script has to succeed, and ends the backend.
    ///
    /// # Errors
    /// Backend, QEMU or script have failed.
    pub fn finish(mut self) -> Result<Answers> {
        if self.stage.jobs.get() > self.job {
            println!("  $ wait %{}", self.job + 1);
        }
        let status = self.listen();
        // The kernel's last words.
        self.lines.into_iter().flatten().for_each(drop);
        match status.as_deref() {
            Some("0") => {}
            Some(status) => return Err(Error::Failed(format!("the guest's script ({status})"))),
            None => return Err(Error::Failed("the guest ended before its script".into())),
        }
        self.process.end()?;
        println!("  $ kill %{}", self.job);
        self.stage.jobs.set(self.job - 1);
        self.backend.stop()?;
        Ok(Answers(self.answers))
    }

    /// Shows and collects what the guest says, and returns the status of its script.
    fn listen(&mut self) -> Option<String> {
        while let Some(line) = self.next_line() {
            if let Some(status) = line.strip_prefix(EXIT_MARK) {
                return Some(status.to_owned());
            }
            self.show(line);
        }
        None
    }

    fn next_line(&mut self) -> Option<String> {
        self.lines.as_mut()?.next()
    }

    fn show(&mut self, line: String) {
        println!("  {line}");
        self.answers.push(line);
    }
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

    fn end(&mut self) -> Result<()> {
        let status = self.0.wait().map_err(run::start_error(&self.1))?;
        if status.success() {
            return Ok(());
        }
        Err(Error::Failed(format!("{} ended with {status}", self.1)))
    }
}

/// The lines of a process's output.
#[derive(Debug)]
struct Lines(Split<BufReader<ChildStdout>>);

impl Lines {
    fn new(output: ChildStdout) -> Self {
        Self(BufReader::new(output).split(b'\n'))
    }
}

impl Iterator for Lines {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let line = self.0.next()?.ok()?;
        Some(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
