// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The course of a session (`protocol.md` sections 3 to 5) as state machines without input or output.
//!
//! Each machine is told what arrived and says what to do; sockets, memory and images are the caller's.
//!
//! | end | channel | machine |
//! |---|---|---|
//! | backend | main | [`BackendSession`] |
//! | frontend | main | [`FrontendSession`] |
//! | frontend | backend channel | [`Mappings`] |
//!
//! The backend's end of the backend channel only matches replies with requests: [`crate::codec::Outbox`].

mod backend;
mod frontend;
mod mapping;

pub use backend::{BackendAction, BackendSession};
pub use frontend::{FrontendSession, FrontendStep};
pub use mapping::{MappingAction, Mappings, Refusal, Rules};
