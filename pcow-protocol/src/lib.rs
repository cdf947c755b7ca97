// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pcow protocol: how a *frontend* (a virtual machine monitor) and a *backend* (the process that owns an image) share
//! a region of guest memory. `protocol.md` is the contract; this crate is its Rust half, for both ends.
//!
//! It knows no image, no file format and no command line. File descriptors, offsets and lengths cross the socket; what
//! they mean is the backend's affair.
//!
//! ```text
//!   frontend::Frontend                                   a backend (another crate)
//!   ┌──────────────────────────┐   main channel   ┌──────────────────────────────────┐
//!   │ session::FrontendSession │ ───requests────▶ │ session::BackendSession          │
//!   │                          │                  │                                  │
//!   │ session::Mappings        │ ◀──requests───── │ codec::Outbox                    │
//!   │  └ mapping thread        │  backend channel │                                  │
//!   │ GuestRegion ── uffd::Uffd│ ═══ faults ════▶ │ uffd::Uffd (a second reference)  │
//!   └──────────────────────────┘                  └──────────────────────────────────┘
//! ```
//!
//! | module | one responsibility |
//! |---|---|
//! | [`wire`] | numbers, layouts and limits; a test compares them with the tables of `protocol.md` |
//! | [`message`] | messages as values, to bytes and from bytes |
//! | [`codec`] | messages over a socket, with their file descriptors |
//! | [`session`] | what is allowed when, as state machines without input or output |
//! | [`uffd`] | the kernel's userfaultfd |
//! | [`frontend`] | guest memory for a virtual machine monitor |
//! | [`control`] | a client of a backend's control socket |
//!
//! # A virtual machine monitor
//!
//! ```no_run
//! use std::path::Path;
//! use std::sync::atomic::Ordering;
//!
//! use pcow_protocol::frontend::{Frontend, FrontendOptions};
//! use vm_memory::Bytes;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let frontend = Frontend::connect(Path::new("/run/pcow/vm.sock"), &FrontendOptions::default())?;
//! // Give `region.as_ptr()` and `region.len()` to the hypervisor as a memory slot, or use it directly:
//! let region = frontend.region();
//! region.volatile_slice().store(42u64, 4096, Ordering::SeqCst)?;
//! frontend.flush()?;
//! # Ok(())
//! # }
//! ```
//!
//! A touch of a place that the backend has not mapped yet waits for it, in whatever thread it happens. A thread that
//! others need, such as the one that answers a management socket, should therefore not touch the region.
//!
//! The backend may die or be replaced at any time. What is mapped goes on working, and other touches wait until
//! [`frontend::Frontend`] has found another that serves the same image; [`frontend::Frontend::status`] says since when.
#![deny(unsafe_code)]

pub mod codec;
pub mod control;
mod error;
pub mod frontend;
pub mod message;
pub mod session;
pub mod uffd;
pub mod wire;

pub use error::{Error, ErrorKind, Result, Violation};
