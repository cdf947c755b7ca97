// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The frontend with real userfaults, real files and a small backend in the same process.
#![allow(clippy::unwrap_used)]

mod backend;
mod bounce;
mod detach;
mod handshake;
mod hostile;
mod mapping;
mod process;
mod quiesce;
mod reattach;
mod stop;
