// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pcow image: files, layers, cluster state, commit order, check.
//!
//! An image is a directory. [`Stored`] is one as it stands, [`Image`] one held for writing. A disk is a stack of
//! layers; the [`active`](Image::active) one changes, those [below](Image::below) never do. The normative description,
//! with the invariants I0 to I8 that the code cites, is `docs/image-format.md`.
//!
//! This crate knows no socket, no userfaultfd, no QEMU and no command line.

#![deny(unsafe_code)]

pub mod active;
pub mod chain;
pub mod check;
mod compact;
mod content;
mod error;
mod image;
pub mod info;
mod layer_files;
mod lock;
pub mod map;
pub mod medium;
#[cfg(feature = "sim")]
pub mod mutant;
#[cfg(not(feature = "sim"))]
mod mutant;
pub mod ops;
mod ready;
pub mod repair;
pub mod root;
pub mod stream;
mod units;
mod view;

pub use compact::Compacted;
pub use error::{Error, ErrorKind, Result};
pub use image::{Environment, FLUSH_FAILED_FILE, Image, ROOT_FILE, Source, Stored};
pub use layer_files::{BaseDirs, data_name, map_name};
pub use lock::{HandedBack, Holder, ImageLock, LOCK_FILE, Process, Purpose, Record, holder};
pub use units::{
    Cluster, ClusterRange, ClusterSize, DEFAULT_CLUSTER_BYTES, MAX_CLUSTER_BYTES,
    MAX_VIRTUAL_BYTES, MIN_CLUSTER_BYTES, SIZE_STEP_BYTES, VirtualSize,
};
pub use view::View;
