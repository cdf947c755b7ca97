// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs programs as stages: one line and a spinner on the terminal, the whole output in a log.
//!
//! Progress goes to standard error; standard output stays free for a task's result.

use std::collections::VecDeque;
use std::env;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, IsTerminal, PipeReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::error::{Error, Result};

/// After so long without a line it is looked whether the program has ended.
const QUIET: Duration = Duration::from_millis(200);
/// Lines of a log that an error shows.
const TAIL_LINES: usize = 25;

/// The log of one task's stages.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
}

impl Log {
    /// Starts an empty log at `path`.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        File::create(path).map_err(Error::file("create", path))?;
        Ok(Self {
            path: path.to_path_buf(),
        })
    }

    /// Runs `command` to its end under the title `title`.
    ///
    /// # Errors
    /// The program cannot be started, or ends unsuccessfully: then the error carries the log's
    /// last lines.
    pub fn stage(&self, title: &str, command: &mut Command) -> Result<()> {
        let stage = Stage::begin(title);
        let status = self.run_logged(&stage, command)?;
        if !status.success() {
            return Err(self.failure(title, status)?);
        }
        stage.end();
        Ok(())
    }

    fn run_logged(&self, stage: &Stage, command: &mut Command) -> Result<ExitStatus> {
        let mut log = OpenOptions::new()
            .append(true)
            .open(&self.path)
            .map_err(Error::file("open", &self.path))?;
        writeln!(log, "+ {command:?}").map_err(Error::file("write", &self.path))?;
        let name = program(command);
        run_merged(command, |line| {
            stage.show(line);
            log.write_all(line)
        })
        .map_err(start_error(&name))
    }

    fn failure(&self, title: &str, status: ExitStatus) -> Result<Error> {
        Ok(Error::Stage {
            stage: title.to_string(),
            status,
            log: self.path.clone(),
            tail: tail(&self.path).map_err(Error::file("read", &self.path))?,
        })
    }
}

/// Runs `command` with both outputs joined, giving each line to `each`.
///
/// What a program has left behind may keep its output open for ever, so the end of the program counts, not that of its
/// output.
fn run_merged(
    command: &mut Command,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<ExitStatus> {
    let (reader, writer) = io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = command.spawn()?;
    // The command holds our copies of the pipe's write end, and the end of file comes only
    // after the last of them is closed.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (send, lines) = mpsc::channel();
    // Not joined: it may read for as long as anybody can write.
    std::thread::spawn(move || send_lines(reader, &send));
    let mut copied = Ok(());
    let mut status = None;
    loop {
        match lines.recv_timeout(QUIET) {
            Ok(line) => copied = copied.and_then(|()| each(&line?)),
            Err(RecvTimeoutError::Timeout) if status.is_none() => status = child.try_wait()?,
            // It had ended before the last line that there was.
            Err(_) => break,
        }
    }
    let status = status.map_or_else(|| child.wait(), Ok)?;
    copied.map(|()| status)
}

/// Sends each line of `reader`, until nobody listens any more.
fn send_lines(reader: PipeReader, to: &Sender<io::Result<Vec<u8>>>) {
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        let read = reader.read_until(b'\n', &mut line);
        let is_last = !matches!(read, Ok(1..));
        if matches!(read, Ok(0)) || to.send(read.map(|_| line)).is_err() || is_last {
            return;
        }
    }
}

/// A stage that is shown while it runs.
#[derive(Debug)]
struct Stage {
    title: String,
    start: Instant,
    spinner: ProgressBar,
}

impl Stage {
    fn begin(title: &str) -> Self {
        let spinner = ProgressBar::new_spinner()
            .with_style(spinner_style())
            .with_prefix(title.to_string());
        spinner.enable_steady_tick(Duration::from_millis(200));
        if !io::stderr().is_terminal() {
            eprintln!("{title} ...");
        }
        Self {
            title: title.to_string(),
            start: Instant::now(),
            spinner,
        }
    }

    fn show(&self, line: &[u8]) {
        let text = String::from_utf8_lossy(line).trim_end().to_string();
        self.spinner.set_message(text);
    }

    fn end(&self) {
        self.spinner.finish_and_clear();
        eprintln!("{}: done in {}", self.title, seconds(self.start.elapsed()));
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.spinner.finish_and_clear();
    }
}

fn spinner_style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg:.dim}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
}

/// Runs `command` on the terminal, its output unchanged, and says whether it succeeded.
///
/// # Errors
/// The program cannot be started.
pub fn shown(command: &mut Command) -> Result<bool> {
    let name = program(command);
    let status = command.status().map_err(start_error(&name))?;
    Ok(status.success())
}

/// Runs `command` with both outputs on standard error, as they come, giving each line to `each`,
/// too, and says whether it succeeded.
///
/// # Errors
/// The program cannot be started.
pub fn echoed(command: &mut Command, mut each: impl FnMut(&[u8])) -> Result<bool> {
    let name = program(command);
    let status = run_merged(command, |line| {
        each(line);
        io::stderr().write_all(line)
    });
    Ok(status.map_err(start_error(&name))?.success())
}

/// Runs `command` and returns what it wrote to standard output.
///
/// # Errors
/// The program cannot be started or ends unsuccessfully.
pub fn capture(command: &mut Command) -> Result<String> {
    let name = program(command);
    let output = command.output().map_err(start_error(&name))?;
    if !output.status.success() {
        return Err(Error::Program {
            program: name,
            status: output.status,
            output: String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
                .trim()
                .to_string(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Says whether `command` runs and succeeds; its output is thrown away.
pub fn succeeds(command: &mut Command) -> bool {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Makes a closure for `map_err` that says which program could not be run.
pub fn start_error(program: &str) -> impl FnOnce(io::Error) -> Error {
    let program = program.to_string();
    move |source| Error::Start { program, source }
}

/// A duration as people read it: `8.4 s`, `3 min 12 s`.
pub fn seconds(duration: Duration) -> String {
    let whole = duration.as_secs();
    if whole < 60 {
        return format!("{:.1} s", duration.as_secs_f64());
    }
    format!("{} min {} s", whole / 60, whole % 60)
}

/// Makes a command of the cargo that runs us, in the repository's root folder.
pub fn cargo(arguments: &[&str]) -> Command {
    let program = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(repository()).args(arguments);
    command
}

/// The repository's root folder.
pub fn repository() -> PathBuf {
    let package = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().map_or(package.clone(), Path::to_path_buf)
}

fn program(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn tail(path: &Path) -> io::Result<String> {
    let mut last = VecDeque::new();
    for line in BufReader::new(File::open(path)?).split(b'\n') {
        if last.len() == TAIL_LINES {
            last.pop_front();
        }
        last.push_back(format!("  {}", String::from_utf8_lossy(&line?)));
    }
    Ok(Vec::from(last).join("\n"))
}

#[cfg(test)]
mod tests {
    use super::{Log, run_merged, seconds, succeeds};
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn a_failing_stage_shows_the_end_of_its_log_with_both_outputs() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::create(&folder.path().join("log")).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "seq 1 100; echo last words >&2; exit 3"]);
        let error = log.stage("counting", &mut command).unwrap_err().to_string();
        assert!(error.contains("counting failed"), "{error}");
        assert!(error.contains("\n  100\n  last words\n"), "{error}");
        assert!(!error.contains("\n  50\n"), "{error}");
    }

    #[test]
    fn what_a_program_leaves_behind_is_not_waited_for() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & echo $!; exit 3"]);
        let mut lines = Vec::new();
        let status = run_merged(&mut command, |line| {
            lines.push(String::from_utf8_lossy(line).trim().to_string());
            Ok(())
        });
        assert_eq!(status.unwrap().code(), Some(3));
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(succeeds(Command::new("kill").args(&lines)), "it still runs");
    }

    #[test]
    fn durations_over_a_minute_are_told_in_minutes() {
        assert_eq!(seconds(Duration::from_millis(8_440)), "8.4 s");
        assert_eq!(seconds(Duration::from_secs(192)), "3 min 12 s");
    }
}
