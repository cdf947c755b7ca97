// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A backend goes, and another one takes over: the guest notices a pause.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use pcow_protocol::ErrorKind;
use pcow_protocol::frontend::{Frontend, FrontendOptions, LinkStatus};
use pcow_protocol::message::{BackendRequest, Status};
use pcow_protocol::wire::{
    Quiesce, REGION_ALIGNMENT, REGION_DAX, REGION_LOCK, REGION_READ_ONLY, Region, Register, Resume,
};

use crate::backend::{
    Backend, CLUSTER, IMAGE, PATIENCE, REGION_SIZE, file, load, load_fault, map, mappings, region,
    spawn_load, spawn_store, store, store_fault, wait_until, writable,
};

/// A place where backends listen, an image's lock, and its data.
struct Host {
    listener: UnixListener,
    path: PathBuf,
    lock: File,
    data: File,
    _folder: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("backend.sock");
        Self {
            listener: UnixListener::bind(&path).unwrap(),
            path,
            lock: tempfile::tempfile().unwrap(),
            data: file(),
            _folder: folder,
        }
    }

    fn lock(&self) -> OwnedFd {
        self.lock.try_clone().unwrap().into()
    }

    /// A frontend with its first backend.
    fn attach(&self) -> (Frontend, Backend) {
        let path = self.path.clone();
        let frontend =
            thread::spawn(move || Frontend::connect(&path, &FrontendOptions::default()).unwrap());
        let backend = self.serve(region(REGION_LOCK), &[self.lock()]);
        (frontend.join().unwrap(), backend)
    }

    fn accept(&self) -> UnixStream {
        self.listener.accept().unwrap().0
    }

    /// The next backend.
    fn serve(&self, region: Region, fds: &[OwnedFd]) -> Backend {
        let mut backend = Backend::accept(self.accept(), region, fds);
        let register = Register {
            flags: if region.flags & REGION_READ_ONLY == 0 {
                writable(0).flags
            } else {
                0
            },
            ..writable(0)
        };
        assert_eq!(backend.register(register, &self.data), Status::OK);
        backend.answer_attach(Status::OK);
        backend
    }
}

fn inode(file: impl AsFd) -> u64 {
    rustix::fs::fstat(file).unwrap().st_ino
}

fn reason_of(frontend: &Frontend) -> String {
    match frontend.status() {
        LinkStatus::Waiting { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_backend_gets_the_lock_and_an_empty_region_and_all_slots_are_free() {
    let host = Host::new();
    let (frontend, mut first) = host.attach();
    assert!(first.held.is_none(), "nothing was held before");
    assert_eq!(first.ask(&map(0, CLUSTER), None), Status::OK);
    store(frontend.region(), 0, 7);
    drop(first);
    // Without LOCK: the frontend has it.
    let mut second = host.serve(region(0), &[]);
    let (held, lock) = second.held.take().unwrap();
    assert_eq!((held.image, held.layer), (IMAGE, [7; 16]));
    assert_eq!(inode(lock), inode(&host.lock));
    assert!(frontend.wait_attached(PATIENCE));
    assert_eq!(mappings(frontend.region()), 1, "all of it is one trap");
    let loading = spawn_load(&frontend, 0);
    assert_eq!(second.fault(), load_fault(0));
    assert_eq!(second.ask(&map(0, CLUSTER), None), Status::OK);
    assert_eq!(loading.join().unwrap(), 7);
}

#[test]
fn touches_that_wait_go_on_with_the_next_backend() {
    let host = Host::new();
    let (frontend, mut first) = host.attach();
    let answered_by_nobody = spawn_load(&frontend, CLUSTER);
    assert_eq!(first.fault(), load_fault(CLUSTER));
    drop(first);
    let later = spawn_store(&frontend, 2 * CLUSTER, 5);
    let mut second = host.serve(region(REGION_LOCK), &[host.lock()]);
    let mut faults = [second.fault(), second.fault()];
    faults.sort_by_key(|fault| fault.offset);
    assert_eq!(faults, [load_fault(CLUSTER), store_fault(2 * CLUSTER)]);
    assert_eq!(second.ask(&map(CLUSTER, 2 * CLUSTER), None), Status::OK);
    assert_eq!(answered_by_nobody.join().unwrap(), 0);
    later.join().unwrap();
    assert_eq!(load(frontend.region(), 2 * CLUSTER), 5);
}

#[test]
fn while_memory_waits_the_status_says_since_when_and_why() {
    let host = Host::new();
    let (frontend, mut first) = host.attach();
    assert_eq!(first.ask(&map(0, CLUSTER), None), Status::OK);
    let Host { path, listener, .. } = host;
    drop(listener);
    std::fs::remove_file(&path).unwrap();
    drop(first);
    assert!(frontend.wait_detached(PATIENCE));
    assert!(!frontend.wait_attached(Duration::ZERO));
    wait_until("the attempt fails", || {
        reason_of(&frontend).contains("No such file")
    });
    let LinkStatus::Waiting { since, .. } = frontend.status() else {
        panic!("there is no backend");
    };
    wait_until("time goes by", || {
        since.elapsed() > Duration::from_millis(5)
    });
    // What is mapped works meanwhile: nothing is taken away before there is a backend.
    store(frontend.region(), 8, 3);
    assert_eq!(load(frontend.region(), 8), 3);
}

#[test]
fn a_backend_of_other_memory_is_refused_and_the_right_one_is_taken_after_it() {
    let host = Host::new();
    let (frontend, first) = host.attach();
    drop(first);
    let other_image = Region {
        image: [9; 16],
        ..region(0)
    };
    let longer = Region {
        size: REGION_SIZE + REGION_ALIGNMENT,
        ..region(0)
    };
    let copy = OwnedFd::from(tempfile::tempfile().unwrap());
    for (offered, fds, reason) in [
        (other_image, vec![], "it serves another image"),
        (longer, vec![], "another size"),
        (region(REGION_READ_ONLY), vec![], "for reading where it was"),
        (region(REGION_LOCK), vec![copy], "it serves a copy"),
    ] {
        let refused = Backend::negotiate(host.accept(), offered, &fds, Status::OK);
        assert!(refused.is_none(), "{reason}");
        wait_until(reason, || reason_of(&frontend).contains(reason));
    }
    // The image may have moved to DAX meanwhile, since slots are new.
    let _right = host.serve(region(REGION_DAX), &[]);
    assert!(frontend.wait_attached(PATIENCE));
    assert!(frontend.is_dax());
}

#[test]
fn a_backend_that_refuses_the_lock_is_left_and_memory_goes_on_waiting() {
    let host = Host::new();
    let (frontend, first) = host.attach();
    let waiting = spawn_load(&frontend, 0);
    drop(first);
    for (errno, reason) in [
        (libc::ESTALE, "a copy, or a changed one"),
        (libc::EBUSY, "another process has the image"),
        (libc::EINVAL, "hand the lock back"),
    ] {
        let status = Status::from_errno(errno);
        let refused = Backend::negotiate(host.accept(), region(0), &[], status);
        assert!(refused.is_none());
        wait_until(reason, || reason_of(&frontend).contains(reason));
        assert!(!waiting.is_finished());
    }
    let mut right = host.serve(region(0), &[]);
    assert_eq!(right.fault(), load_fault(0));
    assert_eq!(right.ask(&map(0, CLUSTER), None), Status::OK);
    assert_eq!(waiting.join().unwrap(), 0);
}

#[test]
fn the_lock_of_a_read_only_image_is_kept_and_not_handed_back() {
    let host = Host::new();
    let path = host.path.clone();
    let frontend =
        thread::spawn(move || Frontend::connect(&path, &FrontendOptions::default()).unwrap());
    let flags = REGION_LOCK | REGION_READ_ONLY;
    let first = host.serve(region(flags), &[host.lock()]);
    let frontend = frontend.join().unwrap();
    drop(first);
    let second = host.serve(region(flags), &[host.lock()]);
    assert!(second.held.is_none());
    assert!(frontend.wait_attached(PATIENCE));
}

#[test]
fn a_flush_that_the_end_of_a_session_cuts_off_is_answered_by_the_next() {
    let host = Host::new();
    let (frontend, first) = host.attach();
    thread::scope(|scope| {
        let flushing = scope.spawn(|| frontend.flush());
        drop(first);
        let mut second = host.serve(region(0), &[]);
        second.answer_flush(Status::OK);
        flushing.join().unwrap().unwrap();
        let flushing = scope.spawn(|| frontend.flush());
        second.answer_flush(Status::from_errno(libc::EIO));
        let error = flushing.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused(libc::EIO));
    });
}

#[test]
fn a_frontend_can_be_dropped_while_it_waits_for_a_backend_or_for_its_answer() {
    let host = Host::new();
    let (frontend, first) = host.attach();
    drop(first);
    assert!(frontend.wait_detached(PATIENCE));
    let silent = host.accept();
    drop(frontend);
    drop(silent);
    let (frontend, first) = host.attach();
    std::fs::remove_file(&host.path).unwrap();
    drop(first);
    assert!(frontend.wait_detached(PATIENCE));
    drop(frontend);
}

#[test]
fn a_frontend_that_shall_not_reconnect_stays_detached() {
    let host = Host::new();
    let path = host.path.clone();
    let options = FrontendOptions {
        reconnect: false,
        ..FrontendOptions::default()
    };
    let frontend = thread::spawn(move || Frontend::connect(&path, &options).unwrap());
    let first = host.serve(region(0), &[]);
    let frontend = frontend.join().unwrap();
    drop(first);
    assert!(frontend.wait_detached(PATIENCE));
    assert!(matches!(frontend.status(), LinkStatus::Detached(_)));
    assert_eq!(frontend.flush().unwrap_err().kind(), ErrorKind::Detached);
    host.listener.set_nonblocking(true).unwrap();
    assert!(host.listener.accept().is_err(), "nobody connects");
}

#[test]
fn many_backends_one_after_the_other_leave_nothing_behind() {
    let host = Host::new();
    let (frontend, mut backend) = host.attach();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = 0;
    for round in 0..20 {
        let storing = spawn_store(&frontend, round * CLUSTER, round);
        assert_eq!(backend.fault(), store_fault(round * CLUSTER));
        assert_eq!(
            backend.ask(&map(round * CLUSTER, CLUSTER), None),
            Status::OK
        );
        storing.join().unwrap();
        drop(backend);
        backend = host.serve(region(0), &[]);
        backend.held = None;
        assert!(frontend.wait_attached(PATIENCE));
        // Other tests of this process have descriptors of their own, so only a leak of all rounds would show.
        if round == 0 {
            before = descriptors();
        }
    }
    assert!(descriptors() < before + 200);
    assert_eq!(mappings(frontend.region()), 1);
    let loading = spawn_load(&frontend, 19 * CLUSTER);
    assert_eq!(backend.fault(), load_fault(19 * CLUSTER));
    assert_eq!(backend.ask(&map(0, 20 * CLUSTER), None), Status::OK);
    assert_eq!(loading.join().unwrap(), 19);
}

#[test]
fn the_layer_of_the_last_resume_in_force_is_named_when_the_lock_is_handed_back() {
    let host = Host::new();
    let (frontend, mut backend) = host.attach();
    let resume = |id, layer| BackendRequest::Resume(Resume { id, layer });
    let quiesce = BackendRequest::Quiesce(Quiesce {
        id: 1,
        deadline_ms: 60_000,
        reserved: 0,
    });
    assert_eq!(backend.ask(&quiesce, None), Status::OK);
    assert_eq!(backend.quiesced().error, 0);
    assert_eq!(backend.ask(&resume(1, [8; 16]), None), Status::OK);
    assert_eq!(backend.ask(&resume(1, [9; 16]), None), Status::OK);
    drop(backend);
    let mut next = host.serve(region(0), &[]);
    assert_eq!(next.held.take().unwrap().0.layer, [8; 16]);
    drop(frontend);
}
