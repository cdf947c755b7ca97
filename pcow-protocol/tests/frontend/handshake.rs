// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Attaching, and all the ways in which it fails.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use pcow_protocol::codec::Connection;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_protocol::message::{FrontendReply, FrontendRequest, Status};
use pcow_protocol::wire::{FEATURE_PROTOCOL_FEATURES, FrontendCode, REGION_DAX};
use pcow_protocol::{ErrorKind, Violation};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};

use crate::backend::{Backend, IMAGE, region};

fn options() -> FrontendOptions {
    FrontendOptions::default()
}

/// What becomes of a frontend whose peer does this.
fn fails(options: &FrontendOptions, peer: impl FnOnce(UnixStream) + Send + 'static) -> ErrorKind {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || peer(theirs));
    let error = Frontend::from_stream(ours, options).unwrap_err();
    peer.join().unwrap();
    error.kind()
}

#[test]
fn a_frontend_attaches_through_a_socket_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("backend.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let backend = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut backend = Backend::accept(stream, region(REGION_DAX), &[]);
        backend.answer_attach(Status::OK);
        backend
    });
    let options = FrontendOptions {
        mapping_limit: Some(100),
        ..options()
    };
    let frontend = Frontend::connect(&path, &options).unwrap();
    let backend = backend.join().unwrap();
    assert_eq!(backend.fault_fd.mapping_limit, 100);
    assert_eq!(frontend.image_uuid().into_bytes(), IMAGE);
    assert!(frontend.is_dax() && !frontend.is_read_only());
    assert_eq!(frontend.region().as_ptr().addr() % (2 << 20), 0);
}

#[test]
fn the_default_mapping_limit_is_at_most_half_of_the_kernels() {
    let (_frontend, backend) = crate::backend::attach(region(0), &[]);
    let max = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let half = max.trim().parse::<u32>().unwrap() / 2;
    let limit = backend.fault_fd.mapping_limit;
    assert!(limit < half && limit > half - 5000, "{limit} of {half}");
}

#[test]
fn a_mapping_limit_under_16_is_refused_before_anything_is_reserved() {
    let options = FrontendOptions {
        mapping_limit: Some(15),
        ..options()
    };
    let kind = fails(&options, |stream| {
        let mut main = Connection::<FrontendRequest>::new(stream);
        answer_features(&mut main, pcow_protocol::wire::NEEDED_FEATURES);
        answer(&mut main, FrontendReply::Region(region(0)));
    });
    assert_eq!(kind, ErrorKind::MappingLimit);
}

#[test]
fn a_missing_socket_is_an_error_of_the_operating_system() {
    let folder = tempfile::tempdir().unwrap();
    let error = Frontend::connect(&folder.path().join("none.sock"), &options()).unwrap_err();
    assert_eq!(
        (error.kind(), error.errno()),
        (ErrorKind::Io, Some(libc::ENOENT))
    );
    let long = folder.path().join("x".repeat(120));
    assert_eq!(
        Frontend::connect(&long, &options()).unwrap_err().kind(),
        ErrorKind::Io
    );
}

#[test]
fn a_peer_that_says_nothing_is_given_up_after_the_timeout() {
    let options = FrontendOptions {
        handshake_timeout: Duration::from_millis(100),
        ..options()
    };
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = Frontend::from_stream(ours, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
}

/// A listener that holds one connection and accepts none.
fn full_listener(path: &Path) -> (OwnedFd, UnixStream) {
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    (listener, UnixStream::connect(path).unwrap())
}

#[test]
fn a_backend_that_never_accepts_is_given_up_after_the_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("full.sock");
    let _busy = full_listener(&path);
    let options = FrontendOptions {
        handshake_timeout: Duration::from_millis(50),
        ..options()
    };
    let error = Frontend::connect(&path, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().starts_with("connect to"), "{error}");
}

/// Takes requests until one wants an answer, and answers.
fn answer(main: &mut Connection<FrontendRequest>, reply: FrontendReply) {
    while main.recv().unwrap().message.code() != reply.code() {}
    main.send(&reply.encode(), &[]).unwrap();
}

fn answer_features(main: &mut Connection<FrontendRequest>, protocol_features: u64) {
    let features = FEATURE_PROTOCOL_FEATURES;
    answer(
        main,
        FrontendReply::Features(FrontendCode::GetFeatures, features),
    );
    answer(
        main,
        FrontendReply::Features(FrontendCode::GetProtocolFeatures, protocol_features),
    );
}

#[test]
fn a_vhost_user_backend_of_another_kind_is_recognised() {
    let kind = fails(&options(), |stream| {
        answer_features(&mut Connection::new(stream), 0x0003_ffff);
    });
    assert_eq!(kind, ErrorKind::NotPcow);
}

#[test]
fn a_busy_backend_is_named() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let backend = thread::spawn(move || {
        Backend::accept(theirs, region(0), &[]).answer_attach(Status::from_errno(libc::EBUSY));
    });
    let error = Frontend::from_stream(ours, &options()).unwrap_err();
    backend.join().unwrap();
    assert_eq!(error.kind(), ErrorKind::Refused(libc::EBUSY));
    assert!(error.to_string().contains("another frontend"), "{error}");
}

#[test]
fn a_region_of_a_wrong_size_is_refused() {
    for size in [0, 4096, (2 << 20) + 4096, 8 << 40] {
        let kind = fails(&options(), move |stream| {
            let mut main = Connection::new(stream);
            answer_features(&mut main, pcow_protocol::wire::NEEDED_FEATURES);
            let region = pcow_protocol::wire::Region { size, ..region(0) };
            answer(&mut main, FrontendReply::Region(region));
        });
        assert_eq!(
            kind,
            ErrorKind::Violation(Violation::OutOfRange("region.size")),
            "{size}"
        );
    }
}

#[test]
fn the_largest_region_can_be_reserved() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let size = pcow_protocol::wire::MAX_REGION_SIZE;
    let region = pcow_protocol::wire::Region { size, ..region(0) };
    let backend = thread::spawn(move || {
        let mut backend = Backend::accept(theirs, region, &[]);
        backend.answer_attach(Status::OK);
        backend
    });
    let frontend = Frontend::from_stream(ours, &options()).unwrap();
    assert_eq!(frontend.region().len() as u64, size);
    drop(backend.join().unwrap());
}
