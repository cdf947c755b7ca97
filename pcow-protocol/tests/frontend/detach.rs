// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The frontend outlives its backend, and its region outlives both.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pcow_protocol::ErrorKind;
use pcow_protocol::frontend::{Frontend, FrontendOptions, LinkStatus};
use pcow_protocol::message::{BackendRequest, Status};
use pcow_protocol::uffd::{CopyOutcome, Uffd};
use pcow_protocol::wire::{REGION_LOCK, REGION_UFFD_DEVICE};

use crate::backend::{
    Backend, CLUSTER, PATIENCE, attach, file, load, load_fault, map, range, region, spawn_load,
    store, store_fault,
};

#[test]
fn what_is_mapped_goes_on_working_when_the_backend_is_gone() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    assert!(!frontend.wait_detached(Duration::ZERO));
    drop(backend);
    assert!(frontend.wait_detached(PATIENCE));
    assert!(matches!(frontend.status(), LinkStatus::Detached(_)));
    store(frontend.region(), 0, 3);
    assert_eq!(load(frontend.region(), 0), 3);
    assert_eq!(frontend.flush().unwrap_err().kind(), ErrorKind::Detached);
}

#[test]
fn a_touch_without_a_backend_waits_for_the_next_and_never_reads_zeros() {
    let (frontend, backend) = attach(region(0), &[]);
    // A second reference stands for the next backend's: this one's own is closed with it.
    let fd = rustix::io::fcntl_dupfd_cloexec(&backend.uffd, 0).unwrap();
    let next = Uffd::from_peer(fd).unwrap();
    let base = backend.fault_fd.base;
    let loading = spawn_load(&frontend, CLUSTER);
    drop(backend);
    assert!(frontend.wait_detached(PATIENCE));
    assert!(!loading.is_finished());
    let outcome = next
        .copy(base + CLUSTER, &[6; 4096], Default::default())
        .unwrap();
    assert_eq!(outcome, CopyOutcome::Done);
    assert_eq!(loading.join().unwrap(), 0x0606_0606_0606_0606);
}

#[test]
fn an_unmap_whose_event_no_backend_reads_returns_and_loses_no_fault() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    let loading = spawn_load(&frontend, CLUSTER);
    assert_eq!(backend.fault(), load_fault(CLUSTER));
    let later = spawn_load(&frontend, 2 * CLUSTER); // its event may be read by either side
    backend.send(&BackendRequest::Unmap(range(0, CLUSTER)), None);
    assert_eq!(backend.answer(), Status::OK); // nobody here has read the event
    assert_eq!(backend.remaps, 0);

    // Both waiters were woken, and ask again.
    let mut faults = [backend.fault().offset, backend.fault().offset];
    faults.sort_unstable();
    assert_eq!(faults, [CLUSTER, 2 * CLUSTER]);
    for offset in faults {
        assert_eq!(backend.copy(offset, &[8; 4096]), CopyOutcome::Done);
    }
    assert_eq!(loading.join().unwrap(), 0x0808_0808_0808_0808);
    assert_eq!(later.join().unwrap(), 0x0808_0808_0808_0808);
}

#[test]
fn a_copy_during_an_unmap_is_to_be_looked_up_again() {
    let data = file();
    let (_frontend, mut backend) = attach(region(0), &[&data]);
    backend.send(&BackendRequest::Unmap(range(0, CLUSTER)), None);
    let page = [1; 4096];
    // Until the move begins the page is filled, or there already; while its event is unread the answer is to look again.
    crate::backend::wait_until("EAGAIN", || {
        backend.copy(CLUSTER, &page) == CopyOutcome::Again
    });
    assert_eq!(backend.answer(), Status::OK);
    assert_ne!(backend.copy(CLUSTER, &page), CopyOutcome::Again);
}

#[test]
fn the_frontend_can_be_dropped_while_an_unmap_waits_for_its_event() {
    let data = file();
    let (frontend, backend) = attach(region(0), &[&data]);
    backend.send(&BackendRequest::Unmap(range(0, CLUSTER)), None);
    drop(frontend);
    drop(backend);
}

#[test]
fn the_lock_is_kept_as_long_as_the_region_and_no_longer() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut witness, lock) = std::io::pipe().unwrap();
    let device = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
        .unwrap();
    let offered = region(REGION_LOCK | REGION_UFFD_DEVICE);
    let backend = thread::spawn(move || {
        let mut backend = Backend::accept(theirs, offered, &[lock.into(), device.into()]);
        backend.answer_attach(Status::OK);
        backend
    });
    let frontend = Frontend::from_stream(ours, &FrontendOptions::default()).unwrap();
    let mut backend = backend.join().unwrap();

    let memory = Arc::clone(frontend.region());
    let storing = thread::spawn(move || {
        store(&memory, 0, 1);
        memory
    });
    assert_eq!(backend.fault(), store_fault(0)); // the userfaultfd made from the passed device works
    let outcome = backend
        .uffd
        .copy(backend.fault_fd.base, &[0; 4096], Default::default())
        .unwrap();
    assert_eq!(outcome, CopyOutcome::Done);
    let memory = storing.join().unwrap();
    drop(backend);
    drop(frontend);

    rustix::io::ioctl_fionbio(&witness, true).unwrap();
    let open = witness.read(&mut [0]).unwrap_err();
    assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(load(&memory, 0), 1);
    drop(memory);
    assert_eq!(witness.read(&mut [0]).unwrap(), 0);
}

#[test]
fn flush_waits_for_the_answer_and_returns_it() {
    let (frontend, mut backend) = attach(region(0), &[]);
    let backend = thread::spawn(move || {
        backend.answer_flush(Status::OK);
        backend.answer_flush(Status::from_errno(libc::EIO));
        backend
    });
    frontend.flush().unwrap();
    assert_eq!(
        frontend.flush().unwrap_err().kind(),
        ErrorKind::Refused(libc::EIO)
    );
    assert_eq!(frontend.status(), LinkStatus::Attached);
    drop(backend.join().unwrap());
    assert_eq!(frontend.flush().unwrap_err().kind(), ErrorKind::Detached);
}
