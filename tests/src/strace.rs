// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that is killed, held up or refused on its way into a chosen system call, by strace(1).

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::waiting::wait_until;

/// Longer than a thread takes to begin, or a program to end, on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process under observation. It runs on, without, when this is dropped.
#[derive(Debug)]
pub struct Strace {
    observed: u32,
    process: Child,
}

/// Which threads are concerned.
#[derive(Debug, Clone, Copy)]
enum Tasks {
    /// All of a process.
    All(u32),
    /// This one.
    One(u32),
}

impl Tasks {
    fn named(process: u32, name: &str) -> Self {
        let mut task = None;
        // It takes its name itself, after it was started.
        wait_until(&format!("a thread {name}"), PATIENCE, || {
            task = task_named(process, name);
            task.is_some()
        });
        Self::One(task.unwrap())
    }
}

impl Strace {
    /// Has `process` killed when one of its threads comes to its `number`th system call `call` from now on, which is not
    /// carried out.
    ///
    /// # Panics
    /// If strace is not there, or may not observe the process.
    pub fn kill_at(process: u32, call: &str, number: u32) -> Self {
        let what = format!("signal=KILL:when={number}");
        Self::inject(process, Tasks::All(process), call, &what)
    }

    /// Has the threads of `process` wait for `time` before each system call `call`, as for storage that hangs.
    ///
    /// # Panics
    /// If strace is not there, or may not observe the process.
    pub fn hold_up(process: u32, call: &str, time: Duration) -> Self {
        let what = format!("delay_enter={}", time.as_micros());
        Self::inject(process, Tasks::All(process), call, &what)
    }

    /// The same of the thread `name` of `process`.
    ///
    /// # Panics
    /// If strace is not there, or may not observe the process, or that has no thread of this name.
    pub fn hold_up_thread(process: u32, name: &str, call: &str, time: Duration) -> Self {
        let what = format!("delay_enter={}", time.as_micros());
        Self::inject(process, Tasks::named(process, name), call, &what)
    }

    /// Has each system call `call` of the thread `name` of `process` fail with `error`.
    ///
    /// # Panics
    /// If strace is not there, or may not observe the process, or that has no thread of this name.
    pub fn fail_in_thread(process: u32, name: &str, call: &str, error: &str) -> Self {
        let what = format!("error={error}");
        Self::inject(process, Tasks::named(process, name), call, &what)
    }

    /// A `program` each of whose system calls `call` fails with `error`, from its start. It ends as the program does, or with
    /// 124 if that does not end by itself.
    pub fn failing(call: &str, error: &str, program: &Path) -> Command {
        let mut command = Command::new("timeout");
        command
            .args([&PATIENCE.as_secs().to_string(), "strace"])
            .args(["-f", "-e", &format!("trace={call}"), "-e", "signal=none"])
            .args(["-e", &format!("inject={call}:error={error}")])
            .args(["-o", "/dev/null"])
            .arg(program);
        command
    }

    fn inject(process: u32, tasks: Tasks, call: &str, what: &str) -> Self {
        let (follow, task): (&[&str], u32) = match tasks {
            Tasks::All(process) => (&["-f"], process),
            Tasks::One(task) => (&[], task),
        };
        let mut strace = Command::new("strace")
            .args(follow)
            .args(["-e", &format!("trace={call}"), "-e", "signal=none"])
            .args(["-e", &format!("inject={call}:{what}")])
            .args(["-o", "/dev/null"])
            .args(["-p", &task.to_string()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("strace is needed and cannot be run: {e}"));
        let mut said = BufReader::new(strace.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "strace: {line}");
        // It must not wait for somebody who reads.
        std::thread::spawn(move || said.lines().for_each(drop));
        Self {
            observed: process,
            process: strace,
        }
    }

    /// Ends it.
    pub fn end(mut self) {
        if has_ended(self.observed) {
            // Then it ends by itself.
            self.process.wait().unwrap();
        }
    }

    fn stop(&mut self) {
        if self.process.try_wait().unwrap().is_some() {
            return;
        }
        let pid = Pid::from_child(&self.process);
        // It may have ended by itself meanwhile; its number is its own until somebody waits for it.
        let _ = kill_process(pid, Signal::TERM);
        let _ = self.process.wait();
    }
}

/// The thread of `process` that is called so. Others may end meanwhile.
fn task_named(process: u32, name: &str) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let mut tasks = tasks.filter_map(|task| Some(task.ok()?.path()));
    let named = tasks.find(|task| {
        let comm = fs::read_to_string(task.join("comm"));
        comm.is_ok_and(|comm| comm.trim() == name)
    });
    named?.file_name()?.to_str()?.parse().ok()
}

/// Whether there is nothing left of `process` but what its parent has to wait for.
pub fn has_ended(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let state = status.rsplit_once(") ").map(|(_, rest)| rest);
    state.is_none_or(|state| state.starts_with(['Z', 'X']))
}

impl Drop for Strace {
    fn drop(&mut self) {
        self.stop();
    }
}
