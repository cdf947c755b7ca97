// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages over a stream socket, with the file descriptors that belong to them.
//!
//! Knows no session: whether a well-formed message is allowed now is decided in [`crate::session`].
//!
//! ```text
//! main channel, both ends, and the frontend's end of the backend channel:   Connection
//! the backend's end of the backend channel:   Outbox (many threads) + Reader<BackendReply> (one poll loop)
//! ```
//!
//! Non-blocking calls use `MSG_DONTWAIT` and never rely on `O_NONBLOCK`, which a peer that holds the same
//! description could clear.

mod connection;
mod outbox;
mod reader;
mod socket;

pub use connection::Connection;
pub use outbox::{MAX_UNSENT, Outbox, Sent};
pub use reader::{Reader, Received};
