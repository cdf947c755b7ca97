// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Crash consistency, by search: images on a simulated filesystem, cut at every ordering point of workloads.
//!
//! | module | its part |
//! |---|---|
//! | `setting` | the scenes: images that workloads start from, and the medium under them |
//! | `workload` | the operations, and how each changes what must be shown |
//! | `model` | what must be shown: bytes and promises |
//! | `explorer` | every crash of a workload |
//! | `oracle` | the verdict on what a crash left |
//! | `mutants` | formats with one fault each, which the search must find |
//! | `errors` | calls that fail, each in every way |
//! | `coverage` | which calls of which operations are cut off, and why others are not |
//! | `digest` | what tells states apart |
//! | `search` | many workloads on two threads, and what they leave counted |
//! | `violation` | a broken promise, and how to see it again |
//!
//! It knows the format and its simulated medium; it knows no socket, no fault and no QEMU.

pub mod coverage;
pub mod digest;
pub mod errors;
pub mod explorer;
pub mod model;
pub mod mutants;
pub mod oracle;
pub mod random;
pub mod search;
pub mod setting;
pub mod sites;
pub mod violation;
pub mod workload;
