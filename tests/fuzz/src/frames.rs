// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frames with descriptors, in pieces, as a hostile peer sends them: to a backend, to a frontend, and as replies.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use pcow_protocol::codec::{Reader, Received};
use pcow_protocol::message::{
    BackendReply, BackendRequest, FrontendReply, FrontendRequest, Incoming, Status,
};
use pcow_protocol::session::{
    BackendAction, BackendSession, FrontendSession, FrontendStep, MappingAction, Mappings, Rules,
};
use pcow_protocol::wire::{FaultFd, KNOWN_FEATURES};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

const REGION_BYTES: u64 = 64 << 20;

/// Sends pieces: how many descriptors, how many bytes, the bytes.
fn send(socket: &UnixStream, mut data: &[u8]) {
    let null = File::open("/dev/null").expect("it is there");
    while let Some(([fds, length], rest)) = data.split_first_chunk::<2>() {
        let (bytes, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        data = rest;
        let fds = vec![null.as_fd(); usize::from(fds & 7)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(7))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let sent = sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::DONTWAIT,
        );
        if sent.is_err() {
            return;
        }
    }
}

/// Reads all that came; `take` says whether to go on.
fn receive<M: Incoming>(data: &[u8], mut take: impl FnMut(Received<M>) -> bool) {
    let (here, there) = UnixStream::pair().expect("a pair of sockets");
    send(&there, data);
    drop(there);
    let mut reader = Reader::<M>::default();
    while let Ok(Some(received)) = reader.try_next(&here) {
        assert_eq!(received.fds.len(), received.message.fd_count());
        if !take(received) {
            return;
        }
    }
}

fn as_backend(data: &[u8]) {
    let mut session = BackendSession::new(REGION_BYTES);
    receive::<FrontendRequest>(data, |r| {
        match session.request(&r.message, r.reply_wanted) {
            Ok(BackendAction::Attach(_)) => session.attached(Status::OK),
            Ok(_) => {}
            Err(_) => return false,
        }
        true
    });
}

fn as_frontend(data: &[u8]) {
    let mut mappings = Mappings::new(Rules {
        region_size: REGION_BYTES,
        read_only: false,
        page_size: 4096,
        features: KNOWN_FEATURES,
    });
    receive::<BackendRequest>(data, |mut r| {
        match mappings.request(&r.message, r.reply_wanted) {
            Ok(MappingAction::Register(register)) => {
                let file = r.fds.pop().expect("as many as the message has");
                mappings.insert(&register, file);
            }
            Ok(MappingAction::Map { range, .. } | MappingAction::Unmap(range)) => {
                let end = range.end().expect("it was checked");
                assert!(end <= REGION_BYTES && range.offset < end, "in the region");
            }
            Ok(MappingAction::Reset) => mappings.forget_all(),
            Ok(_) => {}
            Err(_) => return false,
        }
        true
    });
}

fn replies(data: &[u8]) {
    let (mut session, _) = FrontendSession::start(KNOWN_FEATURES);
    receive::<FrontendReply>(data, |r| {
        match session.reply(&r.message) {
            Ok(FrontendStep::Reserve(_) | FrontendStep::HandedBack) => {
                session.reserved(FaultFd {
                    base: 1 << 32,
                    size: REGION_BYTES,
                    ..FaultFd::default()
                });
            }
            Ok(FrontendStep::Serving | FrontendStep::Flushed(_)) => drop(session.flush()),
            Ok(_) => {}
            Err(_) => return false,
        }
        true
    });
}

/// Tries an input; `false` if it is not one for this target.
#[must_use]
pub fn run(data: &[u8]) -> bool {
    let Some((first, data)) = data.split_first() else {
        return false;
    };
    match first % 4 {
        0 => as_backend(data),
        1 => as_frontend(data),
        2 => replies(data),
        _ => receive::<BackendReply>(data, |_| true),
    }
    true
}
