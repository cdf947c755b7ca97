// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A backend that does not answer a flush that a guest with a virtio-pmem device waits for, and what may happen meanwhile.

use std::fs;
use std::path::PathBuf;

use pcow_tests::backend::Backend;
use pcow_tests::guest::Guest;
use pcow_tests::qemu::PATIENCE;
use pcow_tests::scratch::Scratch;
use pcow_tests::waiting::wait_until;
use rustix::io::ioctl_fionread;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};
use serde_json::json;

use crate::flushes::{CLUSTER, Held, MIB, NO_INTERVAL, STORE, open_in_another_boot, with_pmem};

/// Bytes that were sent to a process through sockets and that it has not received.
fn unread_bytes(process: u32) -> u64 {
    let pid = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
    let pid = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let mut sum = 0;
    for entry in fs::read_dir(format!("/proc/{process}/fd")).unwrap() {
        let link = entry.unwrap().path();
        let target = fs::read_link(&link).unwrap();
        if !target.to_str().unwrap().starts_with("socket:") {
            continue;
        }
        let number = link.file_name().unwrap().to_str().unwrap();
        let number = number.parse().unwrap();
        let socket = pidfd_getfd(&pid, number, PidfdGetfdFlags::empty()).unwrap();
        // One that only listens has nothing to say.
        sum += ioctl_fionread(socket).unwrap_or(0);
    }
    sum
}

/// A guest that waits for a flush of what [`STORE`] stores, because its backend is stopped.
struct Flushing {
    guest: Guest,
    backend: Backend,
    image: PathBuf,
    _scratch: Scratch,
}

impl Flushing {
    fn new() -> Self {
        let scratch = Scratch::new();
        let image = scratch.image("image", 256 * MIB, CLUSTER);
        let backend = Backend::start(&image, NO_INTERVAL);
        let script = format!(
            "
{STORE}
echo stored
read -r line
dd if=/dev/null of=/dev/pmem0 conv=fsync
echo flushed
read -r line
"
        );
        let mut guest = Guest::boot(with_pmem(&backend), &script);
        guest.wait_for("stored\n");
        backend.signal(Signal::STOP);
        let before = unread_bytes(backend.pid());
        guest.qemu().send_line("flush");
        wait_until("the backend is asked", PATIENCE, || {
            unread_bytes(backend.pid()) > before
        });
        Self {
            guest,
            backend,
            image,
            _scratch: scratch,
        }
    }

    fn is_told(&mut self) -> bool {
        self.guest.qemu().serial().contains("flushed")
    }
}

#[test]
fn a_flush_whose_backend_is_killed_is_carried_out_by_the_next_one() {
    let mut flushing = Flushing::new();
    flushing.backend.kill();
    flushing
        .guest
        .qemu()
        .wait_for_message("the session with the backend has ended");
    assert!(!flushing.is_told());
    flushing.backend.restart(&flushing.image, NO_INTERVAL);
    flushing.guest.wait_for("flushed\n");
    // Before QEMU, at whose end it would flush.
    flushing.backend.kill();
    drop(flushing.guest);
    let image = open_in_another_boot(&flushing.image);
    assert_eq!(image.recovery().discarded_clusters, 0);
    assert_eq!(Held::by(&image), Held::Records);
}

/// All that the guest touches when it boots again is mapped already, so that its driver has begun anew when the answer comes:
/// to nothing that it knows of.
#[test]
fn a_flush_that_a_reset_has_overtaken_is_forgotten_and_the_next_one_works() {
    let mut flushing = Flushing::new();
    let mut qmp = flushing.guest.qemu().qmp();
    qmp.execute("set-action", &json!({ "reboot": "reset" }))
        .unwrap();
    qmp.command("system_reset");
    qmp.wait_for_event("RESET");
    wait_until("the guest has booted again", PATIENCE, || {
        flushing.guest.qemu().serial().matches("stored\n").count() == 2
    });
    assert!(!flushing.is_told());
    flushing.backend.signal(Signal::CONT);
    wait_until("the backend has been asked", PATIENCE, || {
        unread_bytes(flushing.backend.pid()) == 0
    });
    flushing.guest.qemu().send_line("flush");
    flushing.guest.wait_for("flushed\n");
    flushing.guest.qemu().send_line("end");
    flushing.guest.finish();
    assert!(flushing.backend.terminate().success());
}

#[test]
fn qemu_quits_while_a_flush_is_not_answered() {
    let mut flushing = Flushing::new();
    flushing.guest.qemu().qmp().command("quit");
    assert!(flushing.guest.qemu().wait().success());
    assert!(!flushing.is_told());
    flushing.backend.signal(Signal::CONT);
    assert!(flushing.backend.terminate().success());
    let image = open_in_another_boot(&flushing.image);
    assert_eq!(Held::by(&image), Held::Records);
}
