// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can go wrong in this crate: breaches of the protocol by the peer, and everything else.
//!
//! [`Violation`] is pure (the state machines return it); [`Error`] adds what was being done and the operating system's reason.

use std::fmt;
use std::io;

/// The result of every fallible operation of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A breach of `protocol.md` by the peer; each one ends the session (section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The header's version is not 1.
    #[error("message version {0}, only 1 is known")]
    Version(u32),
    /// The header has flag bits that are not defined, or not allowed in this direction.
    #[error("header flags {0:#x} are not allowed")]
    Flags(u32),
    /// The request's number is not in the tables of section 5.
    #[error("unknown request {0}")]
    UnknownRequest(u32),
    /// A payload of another size than the message's own.
    #[error("{name}: payload of {size} bytes, {expected} expected")]
    Size {
        /// Name of the message.
        name: &'static str,
        /// Bytes that the header announced.
        size: u32,
        /// Bytes that the message has.
        expected: u32,
    },
    /// A reply that answers no request, or not the oldest unanswered one.
    #[error("reply to request {0}, which nobody asked for")]
    UnexpectedReply(u32),
    /// A request where only replies may come.
    #[error("request {0} where only replies are expected")]
    NotAReply(u32),
    /// A request that must ask for a reply and does not.
    #[error("{0} without a wish for a reply")]
    ReplyNotWanted(&'static str),
    /// More file descriptors than the message takes.
    #[error("{0} file descriptors too many")]
    TooManyFds(usize),
    /// Fewer file descriptors than the message needs.
    #[error("{name}: {got} file descriptors, {expected} expected")]
    TooFewFds {
        /// Name of the message.
        name: &'static str,
        /// How many came.
        got: usize,
        /// How many the message needs.
        expected: usize,
    },
    /// A reserved field or bit is not zero.
    #[error("{0} is reserved and not zero")]
    Reserved(&'static str),
    /// A field is outside its stated range.
    #[error("{0} is out of range")]
    OutOfRange(&'static str),
    /// The request is not allowed in the session's state (section 4).
    #[error("{name} is not allowed in state {state}")]
    State {
        /// Name of the request.
        name: &'static str,
        /// Name of the state.
        state: &'static str,
    },
    /// A request that a session may hold once.
    #[error("{0} a second time")]
    Repeated(&'static str),
    /// Feature bits that were not offered, or one that is needed, by pcow or by another bit, is missing (section 3).
    #[error("feature bits {0:#x} do not agree with what was offered and needed")]
    Features(u64),
}

/// What kind of failure an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ErrorKind {
    /// The peer closed the connection between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The connection ended inside a message.
    #[error("the connection ended inside a message")]
    HalfMessage,
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Violation(Violation),
    /// The peer did not answer in time.
    #[error("the peer did not answer in time")]
    TimedOut,
    /// The peer leaves too many messages unread or unanswered.
    #[error("the peer does not take its messages")]
    Backlog,
    /// The peer answered with an errno.
    #[error("the peer refused")]
    Refused(i32),
    /// The peer speaks vhost-user, but not pcow.
    #[error("the peer is a vhost-user backend, but not one of pcow")]
    NotPcow,
    /// The backend does not serve what this frontend has in memory.
    #[error("the backend does not go with this memory")]
    Mismatch,
    /// No backend is attached.
    #[error("no backend is attached")]
    Detached,
    /// The process may have too few memory mappings.
    #[error("too few memory mappings are left to this process (raise vm.max_map_count)")]
    MappingLimit,
    /// The operating system refused.
    #[error("failed")]
    Io,
}

/// Kind, what was being done, and the operating system's reason where there is one.
#[derive(Debug, thiserror::Error)]
#[error("{context}: {kind}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<io::Error>,
}

impl Error {
    /// An error without a reason of the operating system.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self {
            kind,
            context: context.into(),
            source: None,
        }
    }

    /// An error of the operating system.
    pub fn io(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            kind: ErrorKind::Io,
            context: context.into(),
            source: Some(source.into()),
        }
    }

    /// The peer answered with `errno`.
    pub fn refused(context: impl Into<String>, errno: i32) -> Self {
        let source = Some(io::Error::from_raw_os_error(errno));
        Self {
            kind: ErrorKind::Refused(errno),
            context: context.into(),
            source,
        }
    }

    /// The peer broke the protocol.
    pub fn violation(context: impl Into<String>, violation: Violation) -> Self {
        Self::new(ErrorKind::Violation(violation), context)
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The operating system's reason, if it gave one.
    pub fn errno(&self) -> Option<i32> {
        self.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

/// An error with all its causes on one line, for a log.
pub(crate) struct Chain<'a>(pub &'a Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)?;
        self.0
            .source
            .as_ref()
            .map_or(Ok(()), |source| write!(f, ": {source}"))
    }
}
