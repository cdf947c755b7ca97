// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel answers to copies, one outcome at a time.
#![allow(clippy::unwrap_used)]

use std::os::fd::OwnedFd;

use pcow_protocol::uffd::{CopyMode, CopyOutcome, Event, EventBuffer, Uffd};
use rustix::event::{PollFd, PollFlags, poll};

#[allow(dead_code)] // shared with the tests of the frontend
#[path = "frontend/backend.rs"]
mod backend;

use backend::{CLUSTER, PAGE, attach, file, load, map, region, spawn_load, wait_until};

#[test]
fn a_copy_over_pages_that_are_there_stops_before_them() {
    let (frontend, backend) = attach(region(0), &[]);
    assert_eq!(backend.copy(2 * PAGE, &[1; 4096]), CopyOutcome::Done);
    let cluster = vec![2; CLUSTER.try_into().unwrap()];
    assert_eq!(backend.copy(0, &cluster), CopyOutcome::Partial(2 * PAGE));
    assert_eq!(backend.copy(2 * PAGE, &cluster), CopyOutcome::Exists);
    assert_eq!(backend.copy(3 * PAGE, &cluster[..4096]), CopyOutcome::Done);
    assert_eq!(load(frontend.region(), 2 * PAGE), 0x0101_0101_0101_0101);
    assert_eq!(load(frontend.region(), 3 * PAGE), 0x0202_0202_0202_0202);
}

#[test]
fn a_copy_to_what_is_mapped_finds_no_entry() {
    let data = file();
    let (_frontend, mut backend) = attach(region(0), &[&data]);
    backend.ask(&map(0, CLUSTER), None);
    assert_eq!(backend.copy(0, &[1; 4096]), CopyOutcome::NoEntry);
    assert_eq!(backend.copy(CLUSTER, &[1; 4096]), CopyOutcome::Done);
}

#[test]
fn a_copy_that_does_not_wake_leaves_the_waiter_asleep_until_the_wake() {
    let (frontend, mut backend) = attach(region(0), &[]);
    let loading = spawn_load(&frontend, 0);
    backend.fault();
    let mode = CopyMode {
        write_protect: true,
        dont_wake: true,
    };
    let base = backend.fault_fd.base;
    assert_eq!(
        backend.uffd.copy(base, &[3; 4096], mode).unwrap(),
        CopyOutcome::Done
    );
    assert_eq!(load(frontend.region(), 0), 0x0303_0303_0303_0303);
    assert!(!loading.is_finished());
    backend.uffd.wake(base, PAGE).unwrap();
    assert_eq!(loading.join().unwrap(), 0x0303_0303_0303_0303);
}

#[test]
fn a_misaligned_copy_is_an_error() {
    let (_frontend, backend) = attach(region(0), &[]);
    let copied = backend
        .uffd
        .copy(backend.fault_fd.base + 1, &[0; 4096], CopyMode::default());
    assert_eq!(copied.unwrap_err().errno(), Some(libc::EINVAL));
    assert!(backend.uffd.wake(backend.fault_fd.base + 1, PAGE).is_err());
}

#[test]
fn many_faults_come_with_one_read() {
    let (frontend, backend) = attach(region(0), &[]);
    let loads: Vec<_> = (0..16)
        .map(|index| spawn_load(&frontend, index * CLUSTER))
        .collect();
    let mut buffer = EventBuffer::default();
    let mut addresses = Vec::new();
    wait_until("16 faults", || {
        for event in backend.uffd.read_events(&mut buffer).unwrap() {
            let Event::Fault {
                address,
                write: false,
                wp: false,
                ..
            } = event
            else {
                panic!("{event:?}");
            };
            addresses.push(address);
        }
        addresses.len() == 16
    });
    for address in addresses {
        let outcome = backend
            .uffd
            .copy(address, &[4; 4096], CopyMode::default())
            .unwrap();
        assert_eq!(outcome, CopyOutcome::Done);
    }
    for loading in loads {
        assert_eq!(loading.join().unwrap(), 0x0404_0404_0404_0404);
    }
    assert_eq!(backend.uffd.read_events(&mut buffer).unwrap().count(), 0);
}

#[test]
fn a_passed_descriptor_that_is_no_userfaultfd_is_refused() {
    let pipe: OwnedFd = std::io::pipe().unwrap().0.into();
    assert_eq!(
        Uffd::from_peer(pipe).unwrap_err().errno(),
        Some(libc::EINVAL)
    );
    assert!(Uffd::from_peer(file().into()).is_err());
}

#[test]
fn a_passed_userfaultfd_is_made_non_blocking() {
    let uffd = Uffd::create(None).unwrap();
    let fd = rustix::io::fcntl_dupfd_cloexec(&uffd, 0).unwrap();
    rustix::io::ioctl_fionbio(&fd, false).unwrap();
    let passed = Uffd::from_peer(fd).unwrap();
    assert_eq!(
        passed
            .read_events(&mut EventBuffer::default())
            .unwrap()
            .count(),
        0
    );
    let mut fds = [PollFd::new(&passed, PollFlags::IN)];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    assert_eq!(poll(&mut fds, Some(&now)).unwrap(), 0);
}
