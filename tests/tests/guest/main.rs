// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Real Linux guests in the patched QEMU, under its own emulation of the processor (TCG).
//!
//! One program, so that the limit on machines that run at once holds for all of them. Run by `cargo xtask test`, which
//! makes QEMU and the guest.
#![allow(missing_docs, clippy::unwrap_used)]

mod clones;
mod devices;
mod flushes;
mod full_disk;
mod live_snapshots;
mod moments;
mod monitor;
mod reattach;
mod refusals;
mod snapshots;
mod thin;
mod unanswered_flushes;
// Not all of it is needed here.
#[allow(dead_code)]
#[path = "../../../pcow-protocol/tests/frontend/backend.rs"]
mod told_backend;
