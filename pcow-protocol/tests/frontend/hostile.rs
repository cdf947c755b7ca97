// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Backends that break the protocol, or die: their session ends, and the region is as it was.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use pcow_protocol::codec::Connection;
use pcow_protocol::frontend::{Frontend, FrontendOptions, LinkStatus};
use pcow_protocol::message::{BackendRequest, FrontendRequest, Map, Status};
use pcow_protocol::wire::Register;

use crate::backend::{
    Backend, CLUSTER, PAGE, PATIENCE, REGION_SIZE, attach, file, load, map, mappings, range,
    region, store, writable,
};

/// Requests that are well-formed and out of bounds.
fn out_of_bounds() -> Vec<BackendRequest> {
    let map_of = |slot, file_offset, offset, len| {
        let range = range(offset, len);
        BackendRequest::Map(Map {
            slot,
            file_offset,
            range,
            writable: true,
        })
    };
    vec![
        map_of(0, 0, REGION_SIZE, PAGE),
        map_of(0, 0, REGION_SIZE - PAGE, 2 * PAGE),
        map_of(0, 0, u64::MAX - PAGE + 1, 2 * PAGE),
        map_of(0, REGION_SIZE, 0, PAGE),
        map_of(0, u64::MAX - PAGE + 1, 0, 2 * PAGE),
        map_of(0, 0, 0, 0),
        map_of(0, 0, 0, 100),
        map_of(0, 0, 100, PAGE),
        map_of(0, 100, 0, PAGE),
        map_of(1, 0, 0, PAGE),
        map_of(255, 0, 0, PAGE),
        BackendRequest::Unmap(range(REGION_SIZE, PAGE)),
        BackendRequest::Unmap(range(0, 0)),
        BackendRequest::Unmap(range(0, 2 * REGION_SIZE)),
        BackendRequest::Evict(range(1, PAGE)),
        BackendRequest::Evict(range(0, !(PAGE - 1))),
        BackendRequest::ForgetFd(256),
        BackendRequest::ForgetFd(u32::MAX),
    ]
}

#[test]
fn a_request_out_of_bounds_is_answered_with_einval_and_ends_the_session() {
    for request in out_of_bounds() {
        let data = file();
        let (frontend, mut backend) = attach(region(0), &[&data]);
        assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
        store(frontend.region(), 0, 7);
        let before = mappings(frontend.region());
        assert_eq!(
            backend.ask(&request, None).errno(),
            Some(libc::EINVAL),
            "{request:?}"
        );
        assert!(frontend.wait_detached(PATIENCE), "{request:?}");
        assert_eq!(load(frontend.region(), 0), 7, "{request:?}");
        assert_eq!(mappings(frontend.region()), before, "{request:?}");
    }
}

#[test]
fn a_registration_out_of_bounds_is_answered_with_einval_and_ends_the_session() {
    let bad = [
        Register {
            slot: 256,
            ..writable(0)
        },
        Register {
            length: 0,
            ..writable(1)
        },
        Register {
            length: PAGE + 1,
            ..writable(1)
        },
    ];
    for register in bad {
        let data = file();
        let (frontend, mut backend) = attach(region(0), &[]);
        assert_eq!(
            backend.register(register, &data).errno(),
            Some(libc::EINVAL)
        );
        assert!(frontend.wait_detached(PATIENCE));
    }
}

#[test]
fn a_store_mapping_of_a_slot_for_loads_ends_the_session() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[]);
    assert_eq!(
        backend.register(
            Register {
                flags: 0,
                ..writable(0)
            },
            &data
        ),
        Status::OK
    );
    assert_eq!(backend.ask(&map(0, PAGE), None).errno(), Some(libc::EINVAL));
    assert!(frontend.wait_detached(PATIENCE));
    assert_eq!(mappings(frontend.region()), 1);
}

#[test]
fn a_registration_that_wants_no_answer_ends_the_session() {
    let data = file();
    let (frontend, backend) = attach(region(0), &[]);
    let register = BackendRequest::RegisterFd(writable(0));
    backend
        .outbox
        .send(&register, Some(data.as_fd()), None)
        .unwrap();
    assert!(frontend.wait_detached(PATIENCE));
}

#[test]
fn garbage_on_the_backend_channel_ends_the_session() {
    let evict = BackendRequest::Evict(range(0, PAGE)).encode(false);
    let mut reply = evict.as_bytes().to_vec();
    reply[4] |= 4;
    let mut padding = evict.as_bytes().to_vec();
    padding[13] = 1;
    for bytes in [vec![0xff; 64], vec![0; 64], reply, padding] {
        let (frontend, backend) = attach(region(0), &[]);
        let mut socket = backend.outbox.socket();
        socket.write_all(&bytes).unwrap();
        assert!(frontend.wait_detached(PATIENCE));
        assert!(matches!(frontend.status(), LinkStatus::Detached(_)));
        assert_eq!(mappings(frontend.region()), 1);
    }
}

#[test]
fn half_a_request_is_not_carried_out_when_the_backend_dies() {
    let data = file();
    let whole = map(0, CLUSTER).encode(false);
    for cut in 1..whole.as_bytes().len() {
        let (frontend, backend) = attach(region(0), &[&data]);
        let mut socket = backend.outbox.socket();
        socket.write_all(&whole.as_bytes()[..cut]).unwrap();
        drop(backend);
        assert!(frontend.wait_detached(PATIENCE));
        assert_eq!(frontend.mapping_counts().maps, 0);
    }
}

#[test]
fn a_backend_that_dies_at_any_message_of_the_handshake_fails_the_attachment() {
    // GET_FEATURES, SET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_REGION, SET_BACKEND_REQ_FD, SET_FAULT_FD
    for survived in 0..7 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = thread::spawn(move || die_after(theirs, survived));
        let error = Frontend::from_stream(ours, &FrontendOptions::default()).unwrap_err();
        peer.join().unwrap();
        assert_eq!(
            error.kind(),
            pcow_protocol::ErrorKind::Closed,
            "after {survived}"
        );
    }
}

fn die_after(stream: UnixStream, survived: usize) {
    use pcow_protocol::session::{BackendAction, BackendSession};
    let mut main = Connection::<FrontendRequest>::new(stream);
    let mut session = BackendSession::new(REGION_SIZE);
    let mut kept = Vec::new(); // a closed backend channel would end the session early
    for _ in 0..survived {
        let received = main.recv().unwrap();
        match session
            .request(&received.message, received.reply_wanted)
            .unwrap()
        {
            BackendAction::Reply(reply) => main.send(&reply.encode(), &[]).unwrap(),
            BackendAction::ReplyRegion => {
                let reply = pcow_protocol::message::FrontendReply::Region(region(0));
                main.send(&reply.encode(), &[]).unwrap();
            }
            _ => {}
        }
        kept.extend(received.fds);
    }
    main.recv().unwrap();
}

#[test]
fn a_backend_that_leaves_before_it_answers_is_left_too() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || drop(Backend::accept(theirs, region(0), &[])));
    let error = Frontend::from_stream(ours, &FrontendOptions::default()).unwrap_err();
    peer.join().unwrap();
    assert_eq!(error.kind(), pcow_protocol::ErrorKind::Closed);
}
