// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A running `pcow-backend` with its log.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::program;
use crate::waiting::wait_until;

/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A backend process. Killed when dropped.
#[derive(Debug)]
pub struct Backend {
    child: Child,
    socket: PathBuf,
    log: Arc<Mutex<Vec<String>>>,
    log_reader: JoinHandle<()>,
}

impl Backend {
    /// Starts a backend for `image` with more arguments, and waits until it listens.
    pub fn start(image: &Path, arguments: &[&str]) -> Self {
        let mut socket = image.as_os_str().to_owned();
        socket.push(".sock");
        Self::start_at(Path::new(&socket), image, arguments)
    }

    /// Starts a backend that listens at `socket`, and waits until it does.
    pub fn start_at(socket: &Path, image: &Path, arguments: &[&str]) -> Self {
        let mut backend = Self::spawn(image, socket, arguments);
        wait_until("the backend listens", PATIENCE, || {
            let ended = backend.child.try_wait().unwrap();
            assert!(ended.is_none(), "the backend ended: {:#?}", backend.log());
            UnixStream::connect(socket).is_ok()
        });
        backend
    }

    /// Starts another one in the place of this one, which has ended, and does not wait for it.
    pub fn restart(&mut self, image: &Path, arguments: &[&str]) {
        *self = Self::spawn(image, &self.socket, arguments);
    }

    /// Starts one that listens at `socket`, and does not wait for it.
    pub fn spawn(image: &Path, socket: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(program("pcow-backend"))
            .arg("--socket")
            .arg(socket)
            .arg("--image")
            .arg(image)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let sink = Arc::clone(&log);
        let log_reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                sink.lock().unwrap().push(line);
            }
        });
        Self {
            child,
            socket: socket.to_owned(),
            log,
            log_reader,
        }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// What the last session that is over did, as the log says.
    pub fn session_counts(&self) -> SessionCounts {
        let log = self.log();
        let line = log.iter().rfind(|line| line.contains("session over: "));
        let line = line.expect("a session is over");
        let (_, text) = line.split_once("session over: ").unwrap();
        let mut numbers = text
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse().ok());
        let mut next = || numbers.next().unwrap();
        SessionCounts {
            faults: next(),
            loads: next(),
            stores: next(),
            unknown: next(),
            maps: next(),
            unmaps: next(),
            read_copies: next(),
            evictions: next(),
            runs: next(),
        }
    }

    /// Waits until a log line contains `text`.
    pub fn wait_for_log(&self, text: &str) {
        let found = || self.log().iter().any(|line| line.contains(text));
        wait_until(&format!("the log says '{text}'"), PATIENCE, found);
    }

    /// Asks it to end, and waits for that and for all of its log.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Waits for its end and for all of its log.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the backend ends", PATIENCE, || {
            status = self.child.try_wait().unwrap();
            status.is_some() && self.log_reader.is_finished()
        });
        status.unwrap()
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }
}

/// What happened in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionCounts {
    /// Fault events.
    pub faults: u64,
    /// Of those, the ones that are loads.
    pub loads: u64,
    /// The ones that are stores.
    pub stores: u64,
    /// The ones that may be either.
    pub unknown: u64,
    /// MAPs.
    pub maps: u64,
    /// UNMAPs.
    pub unmaps: u64,
    /// Read copies made.
    pub read_copies: u64,
    /// Read copies evicted.
    pub evictions: u64,
    /// Runs that were mapped at the end.
    pub runs: u64,
}

impl Drop for Backend {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            for line in self.log() {
                eprintln!("backend: {line}");
            }
        }
    }
}
