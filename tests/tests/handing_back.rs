// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a backend accepts from a frontend that comes back, and what it does not do before that. Message by message: such a
//! frontend may be no proper one.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pcow_format::{Image, Stored};
use pcow_protocol::control::Client;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_protocol::message::{FrontendReply, FrontendRequest, Status};
use pcow_protocol::uffd::Uffd;
use pcow_protocol::wire::{FrontendCode, Held};
use pcow_tests::backend::Backend;
use pcow_tests::handshake::Steps;
use pcow_tests::memory::Memory;
use pcow_tests::scratch::Scratch;
use pcow_tests::waiting::wait_until;
use serde_json::json;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);

fn held(image: &Path, layer: [u8; 16]) -> Held {
    Held {
        image: Stored::open(image, &[]).unwrap().root().uuid.into_bytes(),
        layer,
        ..Held::default()
    }
}

fn active(image: &Path) -> [u8; 16] {
    let stored = Stored::open(image, &[]).unwrap();
    stored.root().active.into_bytes()
}

/// Hands back a lock, in a session of its own.
fn hand_back(backend: &Backend, held: Held, lock: BorrowedFd<'_>) -> Status {
    let mut steps = Steps::new(backend.socket());
    steps.take(5);
    let reply = steps.ask(&FrontendRequest::HandBack(held), &[lock]);
    let FrontendReply::Status(FrontendCode::HandBack, status) = reply else {
        panic!("{reply:?}");
    };
    status
}

/// The lock as the backend gives it to a frontend.
fn lock_of(backend: &Backend) -> OwnedFd {
    let mut steps = Steps::new(backend.socket());
    steps.take(5);
    let (_, fds) = steps.offer.unwrap();
    fds.into_iter().next().unwrap()
}

#[test]
fn a_lock_that_nobody_has_kept_is_refused_and_the_next_frontend_served() {
    let scratch = Scratch::new();
    let image = scratch.image("image", SIZE, 64 << 10);
    let backend = Backend::start(&image, &[]);
    let held = held(&image, active(&image));
    let [other, layer] = [[1; 16]; 2];
    let other_image = Held {
        image: other,
        ..held
    };
    let other_layer = Held { layer, ..held };
    let open = |write| {
        let mut options = OpenOptions::new();
        let lock = options.read(true).write(write).open(image.join("lock"));
        OwnedFd::from(lock.unwrap())
    };
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    for (what, held, fd, errno) in [
        ("of another image", other_image, open(true), libc::ESTALE),
        ("of another layer", other_layer, open(true), libc::ESTALE),
        ("that is a pipe", held, pipe, libc::ESTALE),
        ("that locks nothing", held, open(false), libc::EINVAL),
        ("of another description", held, open(true), libc::EBUSY),
    ] {
        let status = hand_back(&backend, held, fd.as_fd());
        assert_eq!(status, Status::from_errno(errno), "a lock {what}");
        let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
        Memory::new(frontend.region()).store(0, 1);
    }
}

#[test]
fn a_lock_is_handed_back_once_in_a_session() {
    let scratch = Scratch::new();
    let image = scratch.image("image", SIZE, 64 << 10);
    let backend = Backend::start(&image, &[]);
    let lock = lock_of(&backend);
    let request = FrontendRequest::HandBack(held(&image, active(&image)));
    let mut steps = Steps::new(backend.socket());
    steps.take(5);
    let reply = steps.ask(&request, &[lock.as_fd()]);
    let taken = FrontendReply::Status(FrontendCode::HandBack, Status::OK);
    assert_eq!(reply, taken);
    steps
        .main
        .send(&request.encode(true), &[lock.as_fd()])
        .unwrap();
    assert!(steps.main.recv().is_err());
}

fn data_file(image: &Path, layer: [u8; 16]) -> PathBuf {
    let name = uuid::Uuid::from_bytes(layer);
    image.join(format!("{name}.data"))
}

/// A backend that dies between the commit of a snapshot and the word of it leaves a frontend that knows the layer below the
/// active one. If somebody could still store into that, a sealed layer would change (I0): its next backend, which has seen
/// nothing become trap, took the frontend's word for it once.
#[test]
fn who_knows_the_layer_that_was_sealed_last_is_served_only_if_nobody_can_store_into_it() {
    let scratch = Scratch::new();
    let image = scratch.image("image", SIZE, 64 << 10);
    let older = active(&image);
    Image::open(&image, &[]).unwrap().snapshot(None).unwrap();
    let sealed = active(&image);
    Image::open(&image, &[]).unwrap().snapshot(None).unwrap();
    let backend = Backend::start(&image, &[]);
    let lock = lock_of(&backend);
    let hand_back = |layer| hand_back(&backend, held(&image, layer), lock.as_fd());

    let stale = Status::from_errno(libc::ESTALE);
    assert_eq!(hand_back(older), stale, "sealed, but not last");
    let open = || -> File {
        let mut options = OpenOptions::new();
        let data = options.read(true).write(true);
        data.open(data_file(&image, sealed)).unwrap()
    };
    let busy = Status::from_errno(libc::EBUSY);
    let writer = open();
    assert_eq!(hand_back(sealed), busy, "it is open for writing");
    // SAFETY: nobody stores to or truncates the file, and the mapping is not looked into.
    let mapping = unsafe { memmap2::MmapMut::map_mut(&writer) }.unwrap();
    drop(writer);
    assert_eq!(hand_back(sealed), busy, "memory of it is mapped");
    backend.wait_for_log("has memory of it mapped");
    assert_eq!(hand_back(active(&image)), Status::OK, "that proves nothing");
    drop(mapping);
    // A child that another test starts has copies of the descriptors for a moment.
    wait_until("the lock is taken", PATIENCE, || {
        hand_back(sealed) == Status::OK
    });
    // What was proved is not kept: the layer can be opened, by who repairs it for example.
    drop(open());
}

/// A frontend that is told one layer, and served another, could not say after its backend's death which it was.
#[test]
fn a_frontend_that_was_told_of_a_layer_that_is_sealed_by_now_has_to_ask_again() {
    let scratch = Scratch::new();
    let image = scratch.image("image", SIZE, 64 << 10);
    let backend = Backend::start(&image, &[]);
    let mut steps = Steps::new(backend.socket());
    steps.take(6);
    let mut client = Client::connect(&image, None).unwrap().unwrap();
    let taken = client.execute("snapshot-create", json!({}), PATIENCE);
    taken.unwrap();
    let uffd = Uffd::create(None).unwrap();
    let attach = Steps::fault_fd(1 << 40, SIZE);
    let reply = steps.ask(&attach, &[uffd.as_fd()]);
    let refused = Status::from_errno(libc::EAGAIN);
    assert_eq!(
        reply,
        FrontendReply::Status(FrontendCode::SetFaultFd, refused)
    );
    drop(steps);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    Memory::new(frontend.region()).store(0, 1);
}

/// A client of a backend that has just been started, and that a frontend has not come back to.
fn client_of_a_waiting_backend(backend: &Backend, image: &Path) -> Client {
    backend.wait_for_log("waiting for it to come back");
    let mut client = None;
    wait_until("it can be asked", PATIENCE, || {
        client = Client::connect(image, None).ok().flatten();
        client.is_some()
    });
    client.unwrap()
}

#[test]
fn no_snapshot_is_taken_before_a_frontend_is_back_that_keeps_the_image() {
    let scratch = Scratch::new();
    let image = scratch.image("image", SIZE, 64 << 10);
    let mut backend = Backend::start(&image, &[]);
    let no_return = FrontendOptions {
        reconnect: false,
        ..FrontendOptions::default()
    };
    // It has nothing mapped, so that a lease alone would not tell.
    let keeps = Frontend::connect(backend.socket(), &no_return).unwrap();
    backend.kill();
    backend.restart(&image, &[]);
    let mut client = client_of_a_waiting_backend(&backend, &image);
    let refused = client.execute("snapshot-create", json!({}), PATIENCE);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("has not come back"), "{refused}");
    drop(keeps);
    let taken = client.execute("snapshot-create", json!({}), PATIENCE);
    taken.unwrap();
}

/// A backend died between the commit of a snapshot and the word of it, and its successor, while it waited for the frontend,
/// merged the layer that this one knows with the one below: the frontend came back, was told that the image had changed, and its
/// guest waited for ever.
#[test]
fn no_snapshot_is_deleted_before_a_frontend_is_back_that_may_know_the_layer_on_it() {
    let scratch = Scratch::new();
    let image = scratch.image("image", SIZE, 64 << 10);
    Image::open(&image, &[]).unwrap().snapshot(None).unwrap();
    let known = active(&image);
    Image::open(&image, &[]).unwrap().snapshot(None).unwrap();
    let mut backend = Backend::start(&image, &[]);
    let lock = lock_of(&backend);
    backend.kill();
    backend.restart(&image, &[]);
    let mut client = client_of_a_waiting_backend(&backend, &image);
    let mut delete = || client.execute("snapshot-delete", json!({ "snapshot": "1" }), PATIENCE);
    let refused = delete().unwrap_err().to_string();
    assert!(refused.contains("has not come back"), "{refused}");
    wait_until("the backend listens", PATIENCE, || {
        UnixStream::connect(backend.socket()).is_ok()
    });
    let held = held(&image, known);
    // A child that another test starts has copies of the descriptors for a moment.
    wait_until("the lock is taken", PATIENCE, || {
        hand_back(&backend, held, lock.as_fd()) == Status::OK
    });
    delete().unwrap();
}
