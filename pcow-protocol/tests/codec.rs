// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Framing under peers that split, merge, lie, overdo it with descriptors, or die.
#![allow(clippy::unwrap_used)]

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use pcow_protocol::codec::{Connection, MAX_UNSENT, Outbox, Reader, Sent};
use pcow_protocol::message::{
    BackendReply, BackendRequest, FrontendReply, FrontendRequest, RegionRange, Status,
};
use pcow_protocol::wire::{BackendCode, FaultFd, REGION_LOCK, Region, Register};
use pcow_protocol::{ErrorKind, Violation};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

fn pair() -> (UnixStream, Connection<FrontendRequest>) {
    let (peer, ours) = UnixStream::pair().unwrap();
    (peer, Connection::new(ours))
}

fn kind(connection: &mut Connection<FrontendRequest>) -> ErrorKind {
    connection.recv().unwrap_err().kind()
}

/// Sends bytes with descriptors on the first of them.
fn send_with(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    let sent = sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    assert_eq!(sent, bytes.len());
}

/// A pipe whose write end is passed around: its read end ends when every copy of it is closed.
struct Witness {
    read: std::io::PipeReader,
}

impl Witness {
    fn new() -> (Self, OwnedFd) {
        let (read, write) = std::io::pipe().unwrap();
        (Self { read }, write.into())
    }

    /// Every copy of the write end is closed.
    fn assert_closed(mut self) {
        rustix::io::ioctl_fionbio(&self.read, true).unwrap();
        assert_eq!(self.read.read(&mut [0]).unwrap(), 0);
    }
}

fn set_fault_fd() -> Vec<u8> {
    let fault_fd = FaultFd {
        base: 1 << 30,
        size: 1 << 22,
        mapping_limit: 16,
        reserved: 0,
    };
    FrontendRequest::SetFaultFd(fault_fd)
        .encode(true)
        .as_bytes()
        .to_vec()
}

fn flush() -> Vec<u8> {
    FrontendRequest::Flush.encode(true).as_bytes().to_vec()
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let (mut peer, mut ours) = pair();
    let bytes = FrontendRequest::SetFeatures(0x1234).encode(false);
    for byte in bytes.as_bytes() {
        assert!(ours.try_recv().unwrap().is_none());
        peer.write_all(&[*byte]).unwrap();
    }
    let received = ours.try_recv().unwrap().unwrap();
    assert_eq!(received.message, FrontendRequest::SetFeatures(0x1234));
    assert!(!received.reply_wanted);
}

#[test]
fn messages_may_come_all_at_once() {
    let (mut peer, mut ours) = pair();
    let mut bytes = Vec::new();
    for bits in 0..100 {
        bytes.extend_from_slice(FrontendRequest::SetFeatures(bits).encode(false).as_bytes());
    }
    peer.write_all(&bytes).unwrap();
    for bits in 0..100 {
        assert_eq!(
            ours.recv().unwrap().message,
            FrontendRequest::SetFeatures(bits)
        );
    }
    assert!(ours.try_recv().unwrap().is_none());
}

#[test]
fn descriptors_stay_with_their_message_however_the_stream_is_cut() {
    let one = set_fault_fd();
    let mut stream = flush();
    stream.extend_from_slice(&one);
    stream.extend_from_slice(&one);
    stream.extend_from_slice(&flush());
    let starts = [flush().len(), flush().len() + one.len()];
    for cut in 1..stream.len() {
        let (peer, mut ours) = pair();
        let ends = [std::io::pipe().unwrap(), std::io::pipe().unwrap()];
        let mut cuts = vec![0, cut, stream.len()];
        cuts.extend_from_slice(&starts);
        cuts.sort_unstable();
        cuts.dedup();
        for piece in cuts.windows(2) {
            let bytes = &stream[piece[0]..piece[1]];
            match starts.iter().position(|start| *start == piece[0]) {
                Some(index) => send_with(&peer, bytes, &[ends[index].1.as_fd()]),
                None => (&peer).write_all(bytes).unwrap(),
            }
        }
        assert_eq!(ours.recv().unwrap().message, FrontendRequest::Flush);
        for (read, _) in &ends {
            let fds = ours.recv().unwrap().fds;
            assert_eq!(fds.len(), 1);
            assert!(same_pipe(&fds[0], read), "cut at {cut}");
        }
        assert_eq!(ours.recv().unwrap().message, FrontendRequest::Flush);
    }
}

/// Whether both are ends of one pipe: they have one inode.
fn same_pipe(one: impl AsFd, other: impl AsFd) -> bool {
    let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
    inode(one.as_fd()) == inode(other.as_fd())
}

#[test]
fn received_descriptors_are_closed_in_children() {
    let (peer, mut ours) = pair();
    send_with(&peer, &set_fault_fd(), &[peer.as_fd()]);
    let fds = ours.recv().unwrap().fds;
    let flags = rustix::io::fcntl_getfd(&fds[0]).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn the_end_between_messages_and_inside_one_are_told_apart() {
    let whole = set_fault_fd();
    for cut in 0..whole.len() {
        let (peer, mut ours) = pair();
        (&peer).write_all(&whole[..cut]).unwrap();
        drop(peer);
        let expected = if cut == 0 {
            ErrorKind::Closed
        } else {
            ErrorKind::HalfMessage
        };
        assert_eq!(kind(&mut ours), expected, "{cut} bytes");
    }
}

#[test]
fn garbage_is_refused_before_its_payload_is_awaited() {
    let (mut peer, mut ours) = pair();
    peer.write_all(&[0xee; 12]).unwrap();
    assert_eq!(kind(&mut ours), ErrorKind::Violation(Violation::Version(2)));

    let (mut peer, mut ours) = pair();
    let mut huge = flush();
    huge[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
    peer.write_all(&huge).unwrap();
    let size = Violation::Size {
        name: "FLUSH",
        size: u32::MAX,
        expected: 0,
    };
    assert_eq!(kind(&mut ours), ErrorKind::Violation(size));
}

#[test]
fn a_message_without_its_descriptor_is_refused() {
    let (mut peer, mut ours) = pair();
    peer.write_all(&set_fault_fd()).unwrap();
    let few = Violation::TooFewFds {
        name: "SET_FAULT_FD",
        got: 0,
        expected: 1,
    };
    assert_eq!(kind(&mut ours), ErrorKind::Violation(few));
}

#[test]
fn surplus_descriptors_are_refused_and_closed() {
    for (bytes, count, surplus) in [
        (set_fault_fd(), 2, 1),
        (set_fault_fd(), 8, 7),
        (flush(), 1, 1),
        (flush(), 8, 8),
    ] {
        let (peer, mut ours) = pair();
        let (witness, fd) = Witness::new();
        send_with(&peer, &bytes, &vec![fd.as_fd(); count]);
        drop(fd);
        assert_eq!(
            kind(&mut ours),
            ErrorKind::Violation(Violation::TooManyFds(surplus))
        );
        drop(ours);
        witness.assert_closed();
    }
}

#[test]
fn more_descriptors_than_one_message_may_have_are_refused_and_closed() {
    for count in [9, 10, 11, 12, 64] {
        let (peer, mut ours) = pair();
        let (witness, fd) = Witness::new();
        send_with(&peer, &set_fault_fd(), &vec![fd.as_fd(); count]);
        drop(fd);
        let kind = kind(&mut ours);
        assert!(
            matches!(kind, ErrorKind::Violation(Violation::TooManyFds(_))),
            "{count}: {kind:?}"
        );
        drop(ours);
        witness.assert_closed();
    }
}

#[test]
fn descriptors_with_every_piece_of_a_message_do_not_pile_up() {
    let (peer, mut ours) = pair();
    let (witness, fd) = Witness::new();
    for byte in set_fault_fd() {
        send_with(&peer, &[byte], &[fd.as_fd()]);
    }
    drop(fd);
    assert!(matches!(
        kind(&mut ours),
        ErrorKind::Violation(Violation::TooManyFds(_))
    ));
    drop(ours);
    witness.assert_closed();
}

#[test]
fn a_regions_descriptors_are_those_that_its_flags_announce() {
    let region = Region {
        size: 1 << 22,
        flags: REGION_LOCK,
        ..Region::default()
    };
    let reply = FrontendReply::Region(region).encode();
    let (peer, ours) = UnixStream::pair().unwrap();
    let mut ours = Connection::<FrontendReply>::new(ours);
    send_with(&peer, reply.as_bytes(), &[peer.as_fd()]);
    assert_eq!(ours.recv().unwrap().fds.len(), 1);
    (&peer).write_all(reply.as_bytes()).unwrap();
    let few = Violation::TooFewFds {
        name: "GET_REGION",
        got: 0,
        expected: 1,
    };
    assert_eq!(ours.recv().unwrap_err().kind(), ErrorKind::Violation(few));
}

#[test]
fn waiting_for_a_message_ends_at_the_deadline() {
    let (mut peer, mut ours) = pair();
    peer.write_all(&flush()[..5]).unwrap();
    let deadline = Instant::now() + Duration::from_millis(30);
    assert_eq!(
        ours.recv_until(deadline).unwrap_err().kind(),
        ErrorKind::TimedOut
    );
    peer.write_all(&flush()[5..]).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    assert_eq!(
        ours.recv_until(deadline).unwrap().message,
        FrontendRequest::Flush
    );
}

#[test]
fn sending_to_a_peer_that_is_gone_is_an_error_and_no_signal() {
    let (peer, ours) = pair();
    drop(peer);
    let reply = FrontendReply::Features(pcow_protocol::wire::FrontendCode::GetFeatures, 0);
    assert_eq!(
        ours.send(&reply.encode(), &[]).unwrap_err().kind(),
        ErrorKind::Closed
    );
}

fn outbox() -> (Outbox<u64>, Connection<BackendRequest>) {
    let (ours, peer) = UnixStream::pair().unwrap();
    (Outbox::new(ours), Connection::new(peer))
}

fn evict(index: u64) -> BackendRequest {
    BackendRequest::Evict(RegionRange {
        offset: index << 12,
        len: 4096,
    })
}

/// Sends until the socket is full; returns how many requests were accepted.
fn fill(outbox: &Outbox<u64>) -> u64 {
    let mut count = 0;
    while outbox.send(&evict(count), None, None).unwrap() == Sent::Now {
        count += 1;
    }
    count + 1
}

#[test]
fn an_outbox_never_waits_and_keeps_the_order() {
    let (outbox, mut peer) = outbox();
    let first = fill(&outbox);
    assert!(outbox.is_waiting());
    assert_eq!(peer.recv().unwrap().message, evict(0)); // there is room now, but others wait already
    let register = Register {
        slot: 1,
        flags: 0,
        length: 4096,
    };
    let file = tempfile::tempfile().unwrap();
    let register = BackendRequest::RegisterFd(register);
    assert_eq!(
        outbox.send(&register, Some(file.as_fd()), Some(7)).unwrap(),
        Sent::Later
    );
    assert_eq!(outbox.send(&evict(first), None, None).unwrap(), Sent::Later);
    drop(file); // the outbox has a descriptor of its own

    for index in 1..first {
        assert_eq!(peer.recv().unwrap().message, evict(index));
        outbox.flush().unwrap();
    }
    let received = peer.recv().unwrap();
    assert_eq!((received.message, received.fds.len()), (register, 1));
    assert!(received.reply_wanted);
    assert_eq!(outbox.flush().unwrap(), Sent::Now);
    assert_eq!(peer.recv().unwrap().message, evict(first));
    assert!(!outbox.is_waiting());
}

#[test]
fn a_frontend_that_reads_nothing_is_given_up_at_a_limit() {
    let (outbox, _peer) = outbox();
    fill(&outbox);
    for index in 1..MAX_UNSENT as u64 {
        outbox.send(&evict(index), None, None).unwrap();
    }
    assert_eq!(
        outbox.send(&evict(0), None, None).unwrap_err().kind(),
        ErrorKind::Backlog
    );
}

#[test]
fn an_outbox_whose_peer_is_gone_says_so() {
    let (outbox, peer) = outbox();
    drop(peer);
    assert_eq!(
        outbox.send(&evict(0), None, None).unwrap_err().kind(),
        ErrorKind::Closed
    );
}

#[test]
fn replies_are_matched_in_order_and_others_refused() {
    let (outbox, peer) = outbox();
    let reply = |code| BackendReply {
        code,
        status: Status::OK,
    };
    let unexpected = |number| ErrorKind::Violation(Violation::UnexpectedReply(number));
    let error = outbox.answered(&reply(BackendCode::Evict)).unwrap_err();
    assert_eq!(error.kind(), unexpected(1004));

    outbox.send(&evict(0), None, Some(10)).unwrap();
    outbox.send(&evict(1), None, None).unwrap();
    outbox
        .send(&BackendRequest::ForgetFd(3), None, Some(11))
        .unwrap();
    peer.send(&reply(BackendCode::Evict).encode(), &[]).unwrap();
    peer.send(&reply(BackendCode::Evict).encode(), &[]).unwrap();
    let mut replies = Reader::<BackendReply>::default();
    let first = replies.try_next(outbox.socket()).unwrap().unwrap().message;
    assert_eq!(outbox.answered(&first).unwrap(), 10);
    let second = replies.try_next(outbox.socket()).unwrap().unwrap().message;
    assert_eq!(
        outbox.answered(&second).unwrap_err().kind(),
        unexpected(1004)
    );
    assert!(replies.try_next(outbox.socket()).unwrap().is_none());
}
