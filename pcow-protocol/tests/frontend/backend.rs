// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A backend that does what a test tells it: each event is read and each request is sent by the test itself.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pcow_protocol::ErrorKind;
use pcow_protocol::codec::{Connection, Outbox, Reader, Sent};
use pcow_protocol::frontend::{Frontend, FrontendOptions, GuestRegion};
use pcow_protocol::message::{
    BackendReply, BackendRequest, FrontendReply, FrontendRequest, Map, RegionRange, Status,
};
use pcow_protocol::session::{BackendAction, BackendSession};
use pcow_protocol::uffd::{CopyMode, CopyOutcome, Event, EventBuffer, Uffd};
use pcow_protocol::wire::{
    FaultFd, FrontendCode, Held, Quiesced, REGION_ALIGNMENT, REGISTER_WRITABLE, Region, Register,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::Bytes;

pub const PAGE: u64 = 4096;
pub const CLUSTER: u64 = 65_536;
pub const REGION_SIZE: u64 = 2 * REGION_ALIGNMENT;
pub const IMAGE: [u8; 16] = *b"an image's uuid.";

/// How long a test waits for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::yield_now();
    }
}

/// A region of 4 MiB with these flags.
pub fn region(flags: u32) -> Region {
    let (size, alignment) = (REGION_SIZE, REGION_ALIGNMENT);
    Region {
        size,
        alignment,
        flags,
        reserved: 0,
        image: IMAGE,
        layer: [7; 16],
    }
}

/// A file as long as the region, in a folder of its own that is gone already.
pub fn file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(REGION_SIZE).unwrap();
    file
}

pub fn writable(slot: u32) -> Register {
    Register {
        slot,
        flags: REGISTER_WRITABLE,
        length: REGION_SIZE,
    }
}

pub fn range(offset: u64, len: u64) -> RegionRange {
    RegionRange { offset, len }
}

/// A writable MAP of slot 0 at its own offset.
pub fn map(offset: u64, len: u64) -> BackendRequest {
    let range = range(offset, len);
    BackendRequest::Map(Map {
        slot: 0,
        file_offset: offset,
        range,
        writable: true,
    })
}

#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    pub offset: u64,
    pub write: bool,
    pub wp: bool,
}

pub fn load_fault(offset: u64) -> Fault {
    Fault {
        offset,
        write: false,
        wp: false,
    }
}

pub fn store_fault(offset: u64) -> Fault {
    Fault {
        offset,
        write: true,
        wp: false,
    }
}

pub struct Backend {
    /// What was handed back.
    pub held: Option<(Held, OwnedFd)>,
    main: Connection<FrontendRequest>,
    session: BackendSession,
    pub outbox: Outbox<()>,
    replies: Reader<BackendReply>,
    pub uffd: Uffd,
    pub fault_fd: FaultFd,
    region: Region,
    faults: VecDeque<Fault>,
    pub remaps: usize,
}

impl Backend {
    /// Negotiates up to an unanswered SET_FAULT_FD; takes a lock that is handed back.
    pub fn accept(stream: UnixStream, region: Region, fds: &[OwnedFd]) -> Self {
        Self::negotiate(stream, region, fds, Status::OK).expect("the frontend goes on")
    }

    /// As [`Backend::accept`], and answers HAND_BACK with `hand_back`; nothing if the frontend ends the connection.
    pub fn negotiate(
        stream: UnixStream,
        region: Region,
        fds: &[OwnedFd],
        hand_back: Status,
    ) -> Option<Self> {
        let mut main = Connection::new(stream);
        let mut session = BackendSession::new(region.size);
        let mut channel = None;
        let mut held = None;
        loop {
            let mut received = match main.recv() {
                Err(e) if e.kind() == ErrorKind::Closed => return None,
                other => other.unwrap(),
            };
            match session
                .request(&received.message, received.reply_wanted)
                .unwrap()
            {
                BackendAction::Nothing => {}
                BackendAction::Reply(reply) => main.send(&reply.encode(), &[]).unwrap(),
                BackendAction::ReplyRegion => send_region(&main, region, fds),
                BackendAction::TakeChannel(reply) => {
                    channel = received.fds.pop();
                    if let Some(reply) = reply {
                        main.send(&reply.encode(), &[]).unwrap();
                    }
                }
                BackendAction::Attach(fault_fd) => {
                    let uffd = Uffd::from_peer(received.fds.pop().unwrap()).unwrap();
                    let outbox = Outbox::new(channel.unwrap().into());
                    let (replies, faults) = (Reader::default(), VecDeque::new());
                    let (remaps, region) = (0, region);
                    return Some(Self {
                        held,
                        main,
                        session,
                        outbox,
                        replies,
                        uffd,
                        fault_fd,
                        region,
                        faults,
                        remaps,
                    });
                }
                BackendAction::TakeLock(what) => {
                    held = Some((what, received.fds.pop().unwrap()));
                    let reply = FrontendReply::Status(FrontendCode::HandBack, hand_back);
                    main.send(&reply.encode(), &[]).unwrap();
                }
                action => panic!("{action:?}"),
            }
        }
    }

    /// Answers SET_FAULT_FD.
    pub fn answer_attach(&mut self, status: Status) {
        let reply = FrontendReply::Status(FrontendCode::SetFaultFd, status);
        self.main.send(&reply.encode(), &[]).unwrap();
        self.session.attached(status);
    }

    /// Waits for FLUSH and answers it.
    pub fn answer_flush(&mut self, status: Status) {
        let received = self.main.recv().unwrap();
        let action = self
            .session
            .request(&received.message, received.reply_wanted)
            .unwrap();
        assert_eq!(action, BackendAction::Flush);
        let reply = FrontendReply::Status(FrontendCode::Flush, status);
        self.main.send(&reply.encode(), &[]).unwrap();
    }

    /// Waits for QUIESCED.
    pub fn quiesced(&mut self) -> Quiesced {
        let received = self.main.recv().unwrap();
        let action = self
            .session
            .request(&received.message, received.reply_wanted)
            .unwrap();
        let BackendAction::Quiesced(quiesced, None) = action else {
            panic!("{action:?}");
        };
        quiesced
    }

    /// Nothing has come on the main channel.
    pub fn assert_no_message(&mut self) {
        assert!(self.main.try_recv().unwrap().is_none());
    }

    /// Sends a request and reads events until its answer is there.
    pub fn ask(&mut self, request: &BackendRequest, file: Option<&File>) -> Status {
        assert_eq!(self.send(request, file), Sent::Now);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.reply() {
                return status;
            }
            self.read_events();
            assert!(Instant::now() < deadline, "no answer to {request:?}");
            self.wait(true);
        }
    }

    /// Sends a request that wants an answer.
    pub fn send(&self, request: &BackendRequest, file: Option<&File>) -> Sent {
        self.outbox
            .send(request, file.map(AsFd::as_fd), Some(()))
            .unwrap()
    }

    /// Waits for the answer without reading the userfaultfd.
    pub fn answer(&mut self) -> Status {
        let mut answer = None;
        wait_until("an answer", || {
            answer = self.reply();
            answer.is_some()
        });
        answer.unwrap()
    }

    pub fn register(&mut self, register: Register, file: &File) -> Status {
        self.ask(&BackendRequest::RegisterFd(register), Some(file))
    }

    fn reply(&mut self) -> Option<Status> {
        let received = self.replies.try_next(self.outbox.socket()).unwrap()?;
        self.outbox.answered(&received.message).unwrap();
        Some(received.message.status)
    }

    fn wait(&self, channel: bool) {
        let mut fds = vec![PollFd::new(&self.uffd, PollFlags::IN)];
        if channel {
            fds.push(PollFd::from_borrowed_fd(
                self.outbox.socket().as_fd(),
                PollFlags::IN,
            ));
        }
        poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            }),
        )
        .unwrap();
    }

    fn read_events(&mut self) {
        let mut buffer = EventBuffer::default();
        for event in self.uffd.read_events(&mut buffer).unwrap() {
            match event {
                Event::Fault {
                    address,
                    write,
                    wp,
                    thread,
                } => {
                    assert_ne!(thread, 0, "faults name their thread");
                    let offset = address - self.fault_fd.base;
                    self.faults.push_back(Fault { offset, write, wp });
                }
                Event::Remap { to, .. } => {
                    let end = self.fault_fd.base + self.region.size;
                    assert!((self.fault_fd.base..end).contains(&to));
                    self.remaps += 1;
                }
                Event::Other(number) => panic!("event {number:#x}"),
            }
        }
    }

    /// Waits for the next fault.
    pub fn fault(&mut self) -> Fault {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(fault) = self.try_fault() {
                return fault;
            }
            assert!(Instant::now() < deadline, "no fault");
            self.wait(false);
        }
    }

    /// The next fault, if there is one.
    pub fn try_fault(&mut self) -> Option<Fault> {
        self.read_events();
        self.faults.pop_front()
    }

    /// Nothing has happened that was not taken yet.
    pub fn assert_quiet(&mut self) {
        self.read_events();
        assert_eq!(self.faults.pop_front(), None);
    }

    /// Installs a read copy.
    pub fn copy(&self, offset: u64, bytes: &[u8]) -> CopyOutcome {
        let mode = CopyMode {
            write_protect: true,
            dont_wake: false,
        };
        self.uffd
            .copy(self.fault_fd.base + offset, bytes, mode)
            .unwrap()
    }
}

fn send_region(main: &Connection<FrontendRequest>, region: Region, fds: &[OwnedFd]) {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    main.send(&FrontendReply::Region(region).encode(), &fds)
        .unwrap();
}

/// A frontend and its backend, with these files in the slots from 0 on, all writable.
pub fn attach(region: Region, files: &[&File]) -> (Frontend, Backend) {
    attach_with(region, files, &FrontendOptions::default())
}

/// As [`attach`], with these options.
pub fn attach_with(
    region: Region,
    files: &[&File],
    options: &FrontendOptions,
) -> (Frontend, Backend) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let files: Vec<File> = files.iter().map(|file| file.try_clone().unwrap()).collect();
    let backend = thread::spawn(move || {
        let mut backend = Backend::accept(theirs, region, &[]);
        for (slot, file) in (0..).zip(&files) {
            assert_eq!(backend.register(writable(slot), file), Status::OK);
        }
        backend.answer_attach(Status::OK);
        backend
    });
    let frontend = Frontend::from_stream(ours, options).unwrap();
    (frontend, backend.join().unwrap())
}

pub fn load(region: &GuestRegion, offset: u64) -> u64 {
    region
        .volatile_slice()
        .load(offset.try_into().unwrap(), Ordering::SeqCst)
        .unwrap()
}

pub fn store(region: &GuestRegion, offset: u64, value: u64) {
    region
        .volatile_slice()
        .store(value, offset.try_into().unwrap(), Ordering::SeqCst)
        .unwrap();
}

/// Loads in a thread of its own, which waits if there is a fault.
pub fn spawn_load(frontend: &Frontend, offset: u64) -> JoinHandle<u64> {
    let region = Arc::clone(frontend.region());
    thread::spawn(move || load(&region, offset))
}

/// Stores in a thread of its own, which waits if there is a fault.
pub fn spawn_store(frontend: &Frontend, offset: u64, value: u64) -> JoinHandle<()> {
    let region = Arc::clone(frontend.region());
    thread::spawn(move || store(&region, offset, value))
}

/// How many mappings of this process lie in the region.
pub fn mappings(region: &GuestRegion) -> usize {
    let start = region.as_ptr().addr();
    let end = start + region.len();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let starts = maps.lines().map(|line| line.split('-').next().unwrap());
    starts
        .map(|start| usize::from_str_radix(start, 16).unwrap())
        .filter(|address| (start..end).contains(address))
        .count()
}
