// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bytes and file descriptors in, whole messages out; never waits for the rest of a message on its own account.
//!
//! A read may bring several messages, or the end of one and the start of the next. Descriptors ride on the first byte
//! of the message that needs them, and one read brings at most one set of them, so sets and the messages that need one
//! are in the same order. A set that no message in the buffer can need ends the session.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::socket::{self, Chunk, Wait};
use crate::error::{Error, ErrorKind, Result, Violation};
use crate::message::{Incoming, header_of};
use crate::wire::{Code, FLAG_NEED_REPLY, Header, MAX_FDS, MAX_MESSAGE};

/// Bytes read at most at once: a burst of MAPs costs one system call.
const BUFFER: usize = 1024;
const _: () = assert!(BUFFER >= 2 * MAX_MESSAGE);

/// A message, with what came with it.
#[derive(Debug)]
pub struct Received<M> {
    /// The message.
    pub message: M,
    /// Header bit 3: the sender wants a reply.
    pub reply_wanted: bool,
    /// As many as the message has ([`Incoming::fd_count`]).
    pub fds: Vec<OwnedFd>,
}

/// An incremental reader of one end of one channel.
#[derive(Debug)]
pub struct Reader<M> {
    buffer: Box<[u8; BUFFER]>,
    start: usize,
    end: usize,
    sets: VecDeque<Vec<OwnedFd>>,
    message: std::marker::PhantomData<fn() -> M>,
}

impl<M: Incoming> Default for Reader<M> {
    fn default() -> Self {
        Self {
            buffer: Box::new([0; BUFFER]),
            start: 0,
            end: 0,
            sets: VecDeque::new(),
            message: std::marker::PhantomData,
        }
    }
}

impl<M: Incoming> Reader<M> {
    /// The next message if one is there without waiting; `None` if the rest of it has not come yet.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] and [`ErrorKind::HalfMessage`] at the end of the stream, [`ErrorKind::Violation`] for
    /// what is no message, [`ErrorKind::Io`]. After an error the connection is of no more use.
    pub fn try_next(&mut self, socket: impl AsFd) -> Result<Option<Received<M>>> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            if !self.fill(&socket, Wait::Never)? {
                return Ok(None);
            }
        }
    }

    /// The next message if one is there or can be read with one wait; `None` if what came is not whole yet.
    pub(super) fn next_or_wait(&mut self, socket: impl AsFd) -> Result<Option<Received<M>>> {
        if let Some(message) = self.take()? {
            return Ok(Some(message));
        }
        self.fill(&socket, Wait::Forever)?;
        self.take()
    }

    /// Takes the first message out of the buffer, if it is whole.
    fn take(&mut self) -> Result<Option<Received<M>>> {
        self.take_checked()
            .map_err(|violation| Error::violation("receive", violation))
    }

    fn take_checked(&mut self) -> std::result::Result<Option<Received<M>>, Violation> {
        let Some((header, rest)) = self.unread().split_at_checked(size_of::<Header>()) else {
            return Ok(None);
        };
        let header = header_of(header);
        let (code, size) = M::check_header(&header)?;
        let Some(payload) = rest.get(..size) else {
            return Ok(None);
        };
        let message = M::decode(code, payload)?;
        self.start += size_of::<Header>() + size;
        let fds = self.take_fds(code.name(), message.fd_count())?;
        let reply_wanted = header.flags & FLAG_NEED_REPLY != 0;
        Ok(Some(Received {
            message,
            reply_wanted,
            fds,
        }))
    }

    fn unread(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn take_fds(
        &mut self,
        name: &'static str,
        expected: usize,
    ) -> std::result::Result<Vec<OwnedFd>, Violation> {
        let fds = if expected == 0 {
            Vec::new()
        } else {
            self.sets.pop_front().unwrap_or_default()
        };
        if fds.len() < expected {
            return Err(Violation::TooFewFds {
                name,
                got: fds.len(),
                expected,
            });
        }
        let surplus = fds.len() - expected + self.surplus_sets();
        if surplus > 0 {
            return Err(Violation::TooManyFds(surplus));
        }
        Ok(fds)
    }

    /// Descriptors in sets that nothing in the buffer can need: each set needs a message of its own.
    fn surplus_sets(&self) -> usize {
        let possible = self.unread().len().div_ceil(size_of::<Header>());
        self.sets.iter().skip(possible).map(Vec::len).sum()
    }

    /// Reads once; false if that would have to wait.
    fn fill(&mut self, socket: impl AsFd, wait: Wait) -> Result<bool> {
        self.compact();
        match socket::receive(socket.as_fd(), &mut self.buffer[self.end..], wait) {
            Ok(chunk) => self.accept(chunk).map(|()| true),
            Err(Errno::AGAIN) if wait == Wait::Never => Ok(false),
            Err(Errno::AGAIN) => Err(Error::new(ErrorKind::TimedOut, "receive")),
            Err(Errno::CONNRESET) => Err(self.ended()),
            Err(errno) => Err(Error::io("receive", errno)),
        }
    }

    /// Moves the unread bytes, less than one message, to the front.
    fn compact(&mut self) {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }

    fn accept(&mut self, chunk: Chunk) -> Result<()> {
        if chunk.truncated || chunk.fds.len() > MAX_FDS {
            let surplus = chunk.fds.len().saturating_sub(MAX_FDS).max(1);
            return Err(Error::violation("receive", Violation::TooManyFds(surplus)));
        }
        if chunk.bytes == 0 {
            return Err(self.ended());
        }
        self.end += chunk.bytes;
        if !chunk.fds.is_empty() {
            self.sets.push_back(chunk.fds);
        }
        Ok(())
    }

    fn ended(&self) -> Error {
        let kind = if self.unread().is_empty() {
            ErrorKind::Closed
        } else {
            ErrorKind::HalfMessage
        };
        Error::new(kind, "receive")
    }
}
