// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pcow protocol: messages, codec, sessions, and the frontend that a virtual machine monitor links.
#![deny(unsafe_code)]

pub mod codec;
mod error;
pub mod frontend;
pub mod message;
pub mod session;
pub mod uffd;
pub mod wire;

pub use error::{Error, ErrorKind, Result, Violation};
