// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One end of one channel for a thread that may wait: whole messages in and out.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};

use super::reader::{Reader, Received};
use super::socket::{self, Wait};
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Frame, Incoming};

/// One end of one channel, on which messages of kind `M` arrive.
///
/// | end | `M` |
/// |---|---|
/// | backend, main channel | [`FrontendRequest`](crate::message::FrontendRequest) |
/// | frontend, main channel | [`FrontendReply`](crate::message::FrontendReply) |
/// | frontend, backend channel | [`BackendRequest`](crate::message::BackendRequest) |
#[derive(Debug)]
pub struct Connection<M> {
    stream: UnixStream,
    reader: Reader<M>,
}

impl<M: Incoming> Connection<M> {
    /// An end of a channel; `stream` is in blocking mode and nothing has been read from it yet.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            reader: Reader::default(),
        }
    }

    /// The socket, for polling and for shutting it down.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Waits for the next message. One system call if the message comes in one piece.
    ///
    /// # Errors
    /// As [`Reader::try_next`].
    pub fn recv(&mut self) -> Result<Received<M>> {
        loop {
            if let Some(message) = self.reader.next_or_wait(&self.stream)? {
                return Ok(message);
            }
        }
    }

    /// Waits for the next message until `deadline`.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`]; else as [`Reader::try_next`].
    pub fn recv_until(&mut self, deadline: Instant) -> Result<Received<M>> {
        loop {
            if let Some(message) = self.try_recv()? {
                return Ok(message);
            }
            wait_readable(self.stream.as_fd(), deadline)?;
        }
    }

    /// The next message if it is there; a poll loop calls this until it returns `None`.
    ///
    /// # Errors
    /// As [`Reader::try_next`].
    pub fn try_recv(&mut self) -> Result<Option<Received<M>>> {
        self.reader.try_next(&self.stream)
    }

    /// Sends a message with its file descriptors (at most [`MAX_FDS`](crate::wire::MAX_FDS)); waits if the socket is full.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] if the peer is gone, [`ErrorKind::Io`].
    pub fn send(&self, frame: &Frame, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut bytes = frame.as_bytes();
        let mut fds = fds;
        while !bytes.is_empty() {
            let sent =
                socket::send(self.stream.as_fd(), bytes, fds, Wait::Forever).map_err(send_error)?;
            bytes = &bytes[sent..];
            fds = &[];
        }
        Ok(())
    }
}

/// What a failed send means.
pub(super) fn send_error(errno: Errno) -> Error {
    match errno {
        Errno::PIPE | Errno::CONNRESET => Error::new(ErrorKind::Closed, "send"),
        errno => Error::io("send", errno),
    }
}

fn wait_readable(socket: BorrowedFd<'_>, deadline: Instant) -> Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Error::new(ErrorKind::TimedOut, "receive"));
    }
    let timeout = Timespec::try_from(left).map_err(|_| Error::io("receive", Errno::INVAL))?;
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    retry_on_intr(|| poll(&mut fds, Some(&timeout))).map_err(|errno| Error::io("wait", errno))?;
    Ok(())
}
