// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The backend's sending side of the backend channel: many threads send, none ever waits for the frontend.
//!
//! Requests leave in the order in which [`Outbox::send`] was entered (F1 relies on it), and replies are matched with the
//! requests that asked for them in the same order. What the socket does not take at once stays here until a poll loop
//! calls [`Outbox::flush`].

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::connection::send_error;
use super::socket::{self, Wait};
use crate::error::{Error, ErrorKind, Result, Violation};
use crate::message::{BackendReply, BackendRequest, Frame};
use crate::wire::{BackendCode, Code};

/// Requests that may wait in memory, unsent or unanswered, before the frontend counts as broken.
pub const MAX_UNSENT: usize = 65_536;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The socket has it.
    Now,
    /// It waits here: poll the socket for writing and call [`Outbox::flush`].
    Later,
}

/// The sending side of a backend channel. `T` is what the backend wants back with a reply.
#[derive(Debug)]
pub struct Outbox<T> {
    socket: UnixStream,
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    unsent: VecDeque<Unsent>,
    awaiting: VecDeque<(BackendCode, T)>,
}

#[derive(Debug)]
struct Unsent {
    frame: Frame,
    sent: usize,
    fd: Option<OwnedFd>,
}

impl<T> Outbox<T> {
    /// The sending side of `socket`; replies are read elsewhere, from a clone of it.
    pub fn new(socket: UnixStream) -> Self {
        let state = State {
            unsent: VecDeque::new(),
            awaiting: VecDeque::new(),
        };
        Self {
            socket,
            state: Mutex::new(state),
        }
    }

    /// The socket, for polling and for shutting it down.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends a request, or queues it if the socket is full or others wait already. Never blocks on the peer; one system call.
    ///
    /// `fd` goes with REGISTER_FD only. With `reply` the frontend is asked for a status, and [`Outbox::answered`]
    /// returns the value when it comes.
    ///
    /// # Errors
    /// [`ErrorKind::Backlog`] if [`MAX_UNSENT`] requests wait already, [`ErrorKind::Closed`], [`ErrorKind::Io`]. The
    /// session is at its end then.
    pub fn send(
        &self,
        request: &BackendRequest,
        fd: Option<BorrowedFd<'_>>,
        reply: Option<T>,
    ) -> Result<Sent> {
        let frame = request.encode(reply.is_some());
        let mut state = self.state();
        state.check_room()?;
        let sent = state.send(&self.socket, frame, fd)?;
        if let Some(value) = reply {
            state.awaiting.push_back((request.code(), value));
        }
        Ok(sent)
    }

    /// Sends what waits, as far as the socket takes it.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`], [`ErrorKind::Io`].
    pub fn flush(&self) -> Result<Sent> {
        self.state().flush(&self.socket)
    }

    /// Whether something waits for the socket to become writable.
    pub fn is_waiting(&self) -> bool {
        !self.state().unsent.is_empty()
    }

    /// The value that was given with the request that `reply` answers.
    ///
    /// # Errors
    /// [`Violation::UnexpectedReply`] if the oldest unanswered request is another one, or there is none.
    pub fn answered(&self, reply: &BackendReply) -> Result<T> {
        let mut state = self.state();
        match state.awaiting.pop_front() {
            Some((code, value)) if code == reply.code => Ok(value),
            _ => {
                let violation = Violation::UnexpectedReply(reply.code.number());
                Err(Error::violation("backend channel", violation))
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> State<T> {
    fn check_room(&self) -> Result<()> {
        if self.unsent.len().max(self.awaiting.len()) < MAX_UNSENT {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Backlog, "backend channel"))
    }

    fn send(
        &mut self,
        socket: &UnixStream,
        frame: Frame,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Sent> {
        let sent = if self.unsent.is_empty() {
            send_some(socket, frame.as_bytes(), fd)?
        } else {
            0
        };
        if sent == frame.as_bytes().len() {
            return Ok(Sent::Now);
        }
        let fd = match fd.filter(|_| sent == 0) {
            Some(fd) => Some(
                fd.try_clone_to_owned()
                    .map_err(|e| Error::io("duplicate a descriptor", e))?,
            ),
            None => None,
        };
        self.unsent.push_back(Unsent { frame, sent, fd });
        Ok(Sent::Later)
    }

    fn flush(&mut self, socket: &UnixStream) -> Result<Sent> {
        while let Some(first) = self.unsent.front_mut() {
            let bytes = &first.frame.as_bytes()[first.sent..];
            let sent = send_some(socket, bytes, first.fd.as_ref().map(AsFd::as_fd))?;
            if sent < bytes.len() {
                first.note_sent(sent);
                return Ok(Sent::Later);
            }
            self.unsent.pop_front();
        }
        Ok(Sent::Now)
    }
}

impl Unsent {
    fn note_sent(&mut self, bytes: usize) {
        self.sent += bytes;
        if bytes > 0 {
            self.fd = None; // it went with the first byte
        }
    }
}

/// Sends without waiting; 0 bytes if the socket is full.
fn send_some(socket: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<usize> {
    match socket::send(socket.as_fd(), bytes, fd.as_slice(), Wait::Never) {
        Err(Errno::AGAIN) => Ok(0),
        result => result.map_err(send_error),
    }
}
