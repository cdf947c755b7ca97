// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From a connected socket to a session that is served, before a deadline (`protocol.md` section 4).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::codec::{Connection, Received};
use crate::error::{Error, ErrorKind, Result};
use crate::message::{FrontendReply, FrontendRequest, Status};
use crate::session::{FrontendSession, FrontendStep};
use crate::wire::{Code, FaultFd, Held, REGION_LOCK, REGION_UFFD_DEVICE, Region};

/// Connects to a listening backend; waits at most until `deadline` if its queue is full.
pub(super) fn connect_until(path: &Path, deadline: Instant) -> Result<UnixStream> {
    let context = || format!("connect to {}", path.display());
    let failed = |errno| match errno {
        Errno::AGAIN => Error::new(ErrorKind::TimedOut, context()),
        errno => Error::io(context(), errno),
    };
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(failed)?;
    let left = deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1));
    set_socket_timeout(&socket, Timeout::Send, Some(left)).map_err(failed)?;
    connect(&socket, &address).map_err(failed)?;
    set_socket_timeout(&socket, Timeout::Send, None).map_err(failed)?;
    Ok(socket.into())
}

/// The region that a backend offers, and the descriptors that came with it.
#[derive(Debug)]
pub(super) struct Offer {
    pub region: Region,
    pub lock: Option<OwnedFd>,
    pub device: Option<OwnedFd>,
}

impl Offer {
    /// The codec delivers as many descriptors as the flags announce.
    fn new(region: Region, fds: Vec<OwnedFd>) -> Self {
        let mut fds = fds.into_iter();
        let mut take = |flag| {
            if region.flags & flag == 0 {
                None
            } else {
                fds.next()
            }
        };
        let lock = take(REGION_LOCK);
        let device = take(REGION_UFFD_DEVICE);
        Self {
            region,
            lock,
            device,
        }
    }
}

/// A main channel and where its session is.
#[derive(Debug)]
pub(super) struct MainChannel {
    connection: Connection<FrontendReply>,
    session: FrontendSession,
    /// Held while a message is sent: a QUIESCED may come from another thread while a flush waits for its answer.
    turn: Arc<Mutex<()>>,
}

/// The way of a QUIESCED to the backend.
#[derive(Debug)]
pub(super) struct Notifier {
    connection: Connection<FrontendReply>,
    turn: Arc<Mutex<()>>,
}

impl Notifier {
    /// Answers a QUIESCE.
    pub(super) fn quiesced(&self, id: u64, outcome: Status) -> Result<()> {
        let request = FrontendSession::quiesced(id, outcome);
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.connection.send(&request.encode(false), &[])
    }
}

impl MainChannel {
    /// Negotiates until the backend has said what it serves.
    pub(super) fn negotiate(
        stream: UnixStream,
        features: u64,
        deadline: Instant,
    ) -> Result<(Self, Offer)> {
        let (session, first) = FrontendSession::start(features);
        let mut main = Self {
            connection: Connection::new(stream),
            session,
            turn: Arc::default(),
        };
        main.send(&first, &[])?;
        loop {
            let Received { message, fds, .. } = main.connection.recv_until(deadline)?;
            match main.step(&message)? {
                FrontendStep::Send([first, second]) => {
                    main.send(&first, &[])?;
                    main.send(&second, &[])?;
                }
                FrontendStep::Reserve(region) => return Ok((main, Offer::new(region, fds))),
                step => return Err(unexpected(step)),
            }
        }
    }

    /// The optional features that were agreed on.
    pub(super) fn features(&self) -> u64 {
        self.session.features()
    }

    /// Hands back the lock of an earlier session.
    pub(super) fn hand_back(
        &mut self,
        held: Held,
        lock: &OwnedFd,
        deadline: Instant,
    ) -> Result<()> {
        let request = self.session.hand_back(held);
        self.send(&request, &[lock.as_fd()])?;
        let received = self.connection.recv_until(deadline)?;
        match self.step(&received.message)? {
            FrontendStep::HandedBack => Ok(()),
            FrontendStep::Refused(errno) => Err(Error::refused(
                match errno {
                    libc::ESTALE => {
                        "hand the lock back (the backend has another image, a copy, or a changed one)"
                    }
                    libc::EBUSY => "hand the lock back (another process has the image)",
                    _ => "hand the lock back",
                },
                errno,
            )),
            step => Err(unexpected(step)),
        }
    }

    /// A way to send from another thread.
    pub(super) fn notifier(&self) -> Result<Notifier> {
        Ok(Notifier {
            connection: Connection::new(self.try_clone_stream()?),
            turn: Arc::clone(&self.turn),
        })
    }

    /// Hands over the backend channel and the userfaultfd; returns when the region is served.
    pub(super) fn hand_over(
        &mut self,
        fault_fd: FaultFd,
        channel: OwnedFd,
        uffd: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<()> {
        let [first, second] = self.session.reserved(fault_fd);
        self.send(&first, &[channel.as_fd()])?;
        drop(channel); // the backend's end is the backend's alone, or its death would not be seen
        self.send(&second, &[uffd])?;
        let received = self.connection.recv_until(deadline)?;
        match self.step(&received.message)? {
            FrontendStep::Serving => Ok(()),
            step => Err(unexpected(step)),
        }
    }

    /// One FLUSH and its answer; waits for as long as the backend needs.
    pub(super) fn flush(&mut self) -> Result<()> {
        let request = self.session.flush();
        self.send(&request, &[])?;
        let received = self.connection.recv()?;
        match self.step(&received.message)? {
            FrontendStep::Flushed(status) => match status.errno() {
                None => Ok(()),
                Some(errno) => Err(Error::refused("flush", errno)),
            },
            step => Err(unexpected(step)),
        }
    }

    /// The socket, to be shut down from elsewhere.
    pub(super) fn try_clone_stream(&self) -> Result<UnixStream> {
        let clone = self.connection.stream().try_clone();
        clone.map_err(|e| Error::io("duplicate the main channel", e))
    }

    fn send(&self, request: &FrontendRequest, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.connection
            .send(&request.encode(request.code().must_ask()), fds)
    }

    fn step(&mut self, reply: &FrontendReply) -> Result<FrontendStep> {
        self.session
            .reply(reply)
            .map_err(|violation| Error::violation("main channel", violation))
    }
}

/// The error for a step that ends the attempt. The machine gives no other step where this is called.
fn unexpected(step: FrontendStep) -> Error {
    match step {
        FrontendStep::NotPcow => Error::new(ErrorKind::NotPcow, "agree on features"),
        FrontendStep::Refused(libc::EBUSY) => Error::refused(
            "attach to the backend, which serves another frontend",
            libc::EBUSY,
        ),
        FrontendStep::Refused(errno) => Error::refused("attach to the backend", errno),
        other => unreachable!("{other:?} does not follow from what was asked"),
    }
}
