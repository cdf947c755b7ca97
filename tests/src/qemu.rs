// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU processes: a command line in the making, and the machine that runs.
//!
//! Knows nothing of what runs inside.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use tempfile::TempDir;

use crate::backend::Backend;
use crate::old_kernel;
use crate::output::Output;
use crate::qmp::Qmp;
use crate::waiting::wait_until;

/// Longer than anything here takes on a slow machine; only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// As an emulated machine keeps a core busy, no more than this many run at once.
const MOST_AT_ONCE: usize = 2;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

/// What `cargo xtask test` made for the tests.
///
/// # Panics
/// If this is not such a run.
pub fn provided(variable: &str) -> OsString {
    std::env::var_os(variable).unwrap_or_else(|| {
        panic!("{variable} is not set: tests with guests are run by 'cargo xtask test'")
    })
}

/// A machine that is not running yet: q35 with one emulated core, an NVDIMM slot, a serial line and nothing else.
#[derive(Debug)]
pub struct Qemu {
    command: Command,
    folder: TempDir,
}

impl Default for Qemu {
    fn default() -> Self {
        Self::new()
    }
}

impl Qemu {
    /// The machine without any device of its own.
    pub fn new() -> Self {
        let mut command = Command::new(provided("PCOW_QEMU"));
        for firmware in std::env::split_paths(&provided("PCOW_QEMU_FIRMWARE")) {
            command.arg("-L").arg(firmware);
        }
        let qemu = Self {
            command,
            folder: tempfile::tempdir().unwrap(),
        };
        qemu.args(&["-machine", "q35,nvdimm=on,accel=tcg", "-cpu", "max"])
            .args(&["-m", "512M,slots=2,maxmem=256G"])
            .args(&["-nodefaults", "-display", "none", "-no-reboot"])
            .args(&["-serial", "stdio"])
    }

    /// Adds arguments.
    pub fn args<T: AsRef<OsStr>>(mut self, arguments: &[T]) -> Self {
        self.command.args(arguments);
        self
    }

    /// Adds a memory that `backend` serves, with the name `pm`, and the NVDIMM `nv` with it.
    pub fn pcow(self, backend: &Backend) -> Self {
        self.chardev(backend.socket())
            .args(&["-object", "memory-backend-pcow,id=pm,chardev=c0"])
            .args(&["-device", "nvdimm,id=nv,memdev=pm"])
    }

    /// Adds the socket `path` as the chardev `c0`.
    pub fn chardev(self, path: &Path) -> Self {
        self.args(&["-chardev".into(), with_path("socket,id=c0,path=", path)])
    }

    /// Adds an NVDIMM that is the raw file `file` of `size` bytes.
    pub fn raw_nvdimm(self, file: &Path, size: u64) -> Self {
        let object = format!("memory-backend-file,id=pm,share=on,size={size},mem-path=");
        self.args(&["-object".into(), with_path(&object, file)])
            .args(&["-device", "nvdimm,memdev=pm"])
    }

    /// Adds a virtio disk that is the raw file `file`, opened with more `options` of `-drive`.
    pub fn disk(self, file: &Path, options: &str) -> Self {
        let drive = format!("if=virtio,format=raw,{options},file=");
        self.args(&["-drive".into(), with_path(&drive, file)])
    }

    /// Has it run on a kernel whose userfaultfd lacks a feature.
    pub fn on_old_kernel(mut self) -> Self {
        old_kernel::run_on(&mut self.command);
        self
    }

    /// A file for the machine, removed when it has ended.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts it, as soon as few enough others run.
    pub fn start(mut self) -> Running {
        let slot = Slot::wait();
        let monitor = with_path("unix:server=on,wait=off,path=", &self.file("qmp"));
        let mut child = self
            .command
            .arg("-qmp")
            .arg(monitor)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Running {
            serial: Output::of(child.stdout.take().unwrap()),
            messages: Output::of(child.stderr.take().unwrap()),
            child,
            folder: self.folder,
            _slot: slot,
        }
    }

    /// Runs it to the end that it is expected to come to at once, a failure, and returns what it said about it.
    pub fn refusal(self) -> String {
        let mut running = self.start();
        let status = running.wait();
        assert_eq!(status.code(), Some(1), "how QEMU ended");
        running.messages()
    }
}

/// An argument that ends with a path.
pub(crate) fn with_path(text: &str, path: &Path) -> OsString {
    let mut argument = OsString::from(text);
    argument.push(path);
    argument
}

/// A QEMU process. Killed when dropped; what it said is shown when a test fails.
#[derive(Debug)]
pub struct Running {
    child: Child,
    serial: Output,
    messages: Output,
    folder: TempDir,
    _slot: Slot,
}

impl Running {
    /// What came through the serial line so far.
    pub fn serial(&self) -> String {
        self.serial.text()
    }

    /// What QEMU itself said so far.
    pub fn messages(&self) -> String {
        self.messages.text()
    }

    /// Waits until QEMU itself has said `text`.
    pub fn wait_for_message(&self, text: &str) {
        let said = || self.messages().contains(text);
        wait_until(&format!("QEMU says '{text}'"), PATIENCE, said);
    }

    /// Sends a line through the serial line.
    pub fn send_line(&mut self, text: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{text}").unwrap();
    }

    /// Connects to its monitor.
    pub fn qmp(&mut self) -> Qmp {
        let path = self.folder.path().join("qmp");
        wait_until("QEMU has a monitor", PATIENCE, || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "QEMU ended instead");
            path.exists()
        });
        Qmp::connect(&path, PATIENCE)
    }

    /// Whether a thread waits for memory that is missing (proc(5), `wchan`).
    pub fn waits_for_memory(&self) -> bool {
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        threads.map_while(Result::ok).any(|thread| {
            let place = fs::read_to_string(thread.path().join("wchan"));
            place.is_ok_and(|place| place == "handle_userfault")
        })
    }

    /// Whether the thread that runs the main loop waits for memory that is missing.
    pub fn main_loop_waits_for_memory(&self) -> bool {
        let pid = self.child.id();
        let place = fs::read_to_string(format!("/proc/{pid}/task/{pid}/wchan"));
        place.is_ok_and(|place| place == "handle_userfault")
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end, and for all of what it said.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("QEMU ends", PATIENCE, || {
            status = self.child.try_wait().unwrap();
            status.is_some() && self.serial.is_complete() && self.messages.is_complete()
        });
        status.unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("== serial line\n{}", self.serial());
            eprintln!("== QEMU's messages\n{}", self.messages());
        }
    }
}

/// The right to run one machine.
#[derive(Debug)]
struct Slot;

impl Slot {
    fn wait() -> Self {
        let running = RUNNING.lock().unwrap();
        let mut running = ENDED
            .wait_while(running, |running| *running == MOST_AT_ONCE)
            .unwrap();
        *running += 1;
        Self
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap() -= 1;
        ENDED.notify_one();
    }
}
