// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is served: an image for writing, or one for reading only, behind one interface in bytes of the disk.
//! Knows the image, not the frontend.

#[cfg(test)]
mod failing;
mod maybe_clean;
mod read_only;
mod turn;
mod writable;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use pcow_format::medium::File;
use pcow_format::root::Proof;
use pcow_format::{HandedBack, Result};

pub use read_only::ReadOnlyDisk;
pub use writable::WritableDisk;

use crate::service::board::Claim;

/// What a thread of the guest wants with a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// To load from it.
    Read,
    /// To store to it.
    Write,
}

/// Which file a mapping shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileKey {
    /// The data file of the active layer.
    Active,
    /// The data file of the layer at this depth of a read-only chain.
    Layer(usize),
}

/// How a fault is to be answered. Every file is mapped at its own offset: byte N of the disk is byte N of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Map the file over these bytes of the disk, or those of them that are not mapped yet.
    Map {
        /// Multiples of the page size; the fault is among them.
        bytes: Range<u64>,
        /// The file.
        file: FileKey,
        /// Whether they became data for this fault.
        fresh: bool,
    },
    /// Install a read copy of these bytes.
    Copy(Range<u64>),
}

/// What has become of a disk since a frontend knew it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continuation {
    /// It goes on in the same layer.
    Same,
    /// It goes on above that layer, which was sealed since; how it was made sure now that nobody writes to that any more.
    Sealed(Proof),
    /// It shows something else.
    Changed,
}

/// Scratch memory of one resolving thread.
#[derive(Debug, Default)]
pub struct Scratch {
    /// For copies between layers.
    pub layer: Vec<u8>,
    /// For read copies.
    pub copy: Vec<u8>,
}

/// A disk that can be served.
pub trait Disk: std::fmt::Debug + Send + Sync {
    /// Size in bytes, a multiple of 2 MiB.
    fn size(&self) -> u64;
    /// Bytes of a read copy; faults within one such unit are one fault.
    fn unit(&self) -> u64;
    /// Whether nothing is ever mapped writable.
    fn read_only(&self) -> bool;
    /// Whether files are mapped with `MAP_SYNC`.
    fn is_dax(&self) -> bool;
    /// UUIDs of the image and of its active layer.
    fn identity(&self) -> ([u8; 16], [u8; 16]);
    /// The lock that a frontend shares; `None` while a frontend of an earlier backend keeps it.
    fn lock(&self) -> Option<&std::fs::File>;
    /// What the disk is to a frontend that last knew `layer` as the active one.
    ///
    /// # Errors
    /// `Locked` if somebody may still write to that layer, which is sealed by now; `Io`.
    fn continuation(&self, layer: [u8; 16]) -> Result<Continuation>;
    /// Takes the lock that a frontend has kept; `None` if this disk has none that is kept.
    ///
    /// # Errors
    /// `Io` if it is no lock.
    fn hand_back(&self, kept: OwnedFd) -> Result<Option<HandedBack>>;
    /// The bytes that must be claimed before the fault at `offset` is looked up (F1): its cluster.
    fn scope(&self, offset: u64) -> Range<u64>;
    /// Decides how to answer a fault, after making the change that a store needs. `claim` covers
    /// [`Disk::scope`]; it is extended where the answer covers more.
    ///
    /// # Errors
    /// `NoSpace`, `Io` or `Corrupt`; the guest must wait then.
    fn resolve(
        &self,
        offset: u64,
        access: Access,
        claim: &mut Claim,
        scratch: &mut Scratch,
    ) -> Result<Answer>;
    /// Reads what the disk shows, for a read copy.
    ///
    /// # Errors
    /// `Io` or `Corrupt`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
    /// The file behind a key. Not to be kept: a snapshot proves that nobody has it open for writing.
    fn file(&self, key: FileKey) -> Arc<dyn File>;
    /// How many bytes of that file may be mapped, a multiple of the page size.
    fn mappable_bytes(&self, key: FileKey) -> u64;
    /// Whether the filesystem is nearly full, so that stores will have to wait soon.
    fn is_low_on_space(&self) -> bool;
    /// Prepares storage ahead of the guest, for the clusters of `bytes` that need some. `claim` covers them.
    ///
    /// # Errors
    /// `NoSpace` or `Io`; of no consequence for the guest.
    fn prepare(&self, bytes: Range<u64>) -> Result<()>;
    /// Gives back what was prepared and not used.
    ///
    /// # Errors
    /// `Io`; only space is lost then.
    fn give_back(&self) -> Result<()>;
    /// Notes that `bytes` became data for what may have been a load.
    fn note_maybe_clean(&self, bytes: &Range<u64>);
    /// Takes out a piece, of at most 2 MiB, of what was noted so.
    fn take_maybe_clean(&self) -> Option<Range<u64>>;
    /// How many bytes are noted so.
    fn maybe_clean_bytes(&self) -> u64;
    /// Forgets what was noted so: it stays data.
    fn forget_maybe_clean(&self);
    /// Makes those clusters of `bytes` absent again that hold what they cover, and gives their storage back; returns how
    /// many bytes that were, or `None` if a flush is still under way at `deadline`. The caller has claimed `bytes`, and nobody
    /// has them mapped.
    ///
    /// # Errors
    /// `Io`; clusters that were not reached are still data.
    fn give_back_clean(&self, bytes: Range<u64>, deadline: Instant) -> Result<Option<u64>>;
    /// Makes everything stored so far durable.
    ///
    /// # Errors
    /// `FlushFailed`, and then always.
    fn flush(&self) -> Result<()>;
    /// Waits for the flush that is under way, if one is, but not after `deadline`; returns whether none is.
    fn waits_for_flush(&self, deadline: Instant) -> bool;
}
