// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The backend under a service manager: by its protocol, and the example's units as systemd reads them.
#![allow(missing_docs, clippy::unwrap_used)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::memory::Memory;
use pcow_tests::program;
use pcow_tests::scratch::Scratch;
use rustix::process::{Pid, Signal, kill_process};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A service manager's side: the socket that it listens on for a service, and the one that it is told things through.
struct Manager {
    scratch: Scratch,
    image: PathBuf,
    listener: OwnedFd,
    told: UnixDatagram,
}

impl Manager {
    fn new() -> Self {
        let scratch = Scratch::new();
        let image = scratch.image("a", 4 * MIB, 64 << 10);
        let listener = UnixListener::bind(scratch.path("socket")).unwrap();
        let told = UnixDatagram::bind(scratch.path("notify")).unwrap();
        told.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            // Away from the numbers that it is to have in the service.
            listener: rustix::io::fcntl_dupfd_cloexec(&listener, 10).unwrap(),
            scratch,
            image,
            told,
        }
    }

    fn socket(&self) -> PathBuf {
        self.scratch.path("socket")
    }

    /// A service with `sockets` descriptors from 3 on, whose `LISTEN_PID` is what the shell says.
    fn command(&self, sockets: i32, pid: &str) -> Command {
        let mut command = Command::new("sh");
        let script = format!("LISTEN_PID={pid} exec \"$0\" \"$@\"");
        command
            .args(["-c", &script])
            .arg(program("pcow-backend"))
            .arg("--image")
            .arg(&self.image)
            .env("LISTEN_FDS", sockets.to_string())
            .env("NOTIFY_SOCKET", self.scratch.path("notify"))
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        let listener = self.listener.as_raw_fd();
        let duplicate = move || {
            for number in 3..3 + sockets {
                // SAFETY: dup2(2) is async-signal-safe; in the child these numbers belong to nobody who needs them, and
                // what Rust opened for itself there is close-on-exec and at other numbers or was used already.
                if unsafe { libc::dup2(listener, number) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure only calls dup2(2).
        unsafe { command.pre_exec(duplicate) };
        command
    }

    fn start(&self) -> Child {
        self.command(1, "$$").stderr(Stdio::null()).spawn().unwrap()
    }

    /// Waits for the next message with this line.
    fn wait_for(&self, line: &str) {
        let mut raw = [0; 1024];
        loop {
            let got = self.told.recv(&mut raw).unwrap();
            let text = std::str::from_utf8(&raw[..got]).unwrap();
            if text.lines().any(|l| l == line) {
                return;
            }
        }
    }
}

fn terminate(mut child: Child) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_socket_that_is_handed_down_is_served_and_what_happens_is_told() {
    let manager = Manager::new();
    let service = manager.start();
    manager.wait_for("READY=1");
    let frontend = Frontend::connect(&manager.socket(), &FrontendOptions::default()).unwrap();
    manager.wait_for("STATUS=serving a virtual machine");
    let memory = Memory::new(frontend.region());
    memory.store(8, 7);
    terminate(service);
    manager.wait_for("STOPPING=1");
    assert!(manager.socket().exists(), "it is the manager's");
    // The next one is started by whoever comes: here the frontend, which has come back already.
    let service = manager.start();
    manager.wait_for("STATUS=serving a virtual machine");
    assert_eq!((memory.load(8), memory.load(MIB)), (7, 0));
    drop(frontend);
    manager.wait_for("STATUS=waiting for a virtual machine");
    terminate(service);
}

#[test]
fn sockets_for_another_process_and_several_of_them_are_no_place_for_frontends() {
    let manager = Manager::new();
    for (sockets, pid, wanted) in [
        (1, "1", "no service manager has handed a socket down"),
        (2, "$$", "several sockets"),
    ] {
        let output = manager.command(sockets, pid).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains(wanted), "'{wanted}' is not in: {errors}");
        assert_eq!(output.status.code(), Some(64));
    }
}

/// Copies the example's units, for programs that are where they are here.
fn installed_units(scratch: &Scratch) -> Vec<PathBuf> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/systemd");
    let here = program("pcow-backend");
    let install = |name: &str| {
        let text = std::fs::read_to_string(from.join(name)).unwrap();
        let text = text.replace("/usr/bin/pcow-backend", here.to_str().unwrap());
        std::fs::write(scratch.path(name), text).unwrap();
        scratch.path(name)
    };
    ["pcow-backend@.service", "pcow-backend@.socket"]
        .map(install)
        .into()
}

/// The value of `key` in a text of `key=value`, with or without quotes and more of the operator.
fn value<'a>(text: &'a str, key: &str) -> &'a str {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let mut fields = lines.flat_map(|line| line.split(','));
    let after = fields.find_map(|field| field.trim().strip_prefix(key)?.strip_prefix('='));
    let after = after.unwrap_or_else(|| panic!("no {key} in {text}"));
    after.trim_start_matches('=').trim_matches('"')
}

#[test]
fn the_udev_rule_gives_the_kernels_device_to_the_group_that_the_backend_runs_as() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/systemd");
    let read = |name: &str| std::fs::read_to_string(from.join(name)).unwrap();
    let rule = read("60-pcow.rules");
    let (subsystem, kernel) = (value(&rule, "SUBSYSTEM"), value(&rule, "KERNEL"));
    let device = Path::new("/sys/class").join(subsystem).join(kernel);
    let event = std::fs::read_to_string(device.join("uevent")).unwrap();
    assert_eq!(value(&event, "DEVNAME"), "userfaultfd");
    let unit = read("pcow-backend@.service");
    assert_eq!(value(&rule, "GROUP"), value(&unit, "Group"));
    assert_eq!(value(&rule, "MODE"), "0660");
    assert_eq!(value(&unit, "DeviceAllow"), "/dev/userfaultfd rw");
}

#[test]
fn systemd_understands_the_units_and_finds_nothing_to_say() {
    let scratch = Scratch::new();
    let units = installed_units(&scratch);
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no", "--recursive-errors=no"]);
    let output = match verify.args(&units).output() {
        Ok(output) => output,
        Err(e) => {
            assert!(std::env::var_os("CI").is_none(), "systemd-analyze: {e}");
            eprintln!("NOT RUN: there is no systemd-analyze here ({e})");
            return;
        }
    };
    let said = String::from_utf8_lossy(&output.stderr);
    // What it says of units that are installed here is not the example's matter.
    let ours: Vec<&str> = said.lines().filter(|l| l.contains("pcow")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}
