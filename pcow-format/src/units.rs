// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sizes, cluster numbers and their arithmetic. Knows no file.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};

/// Smallest cluster: 4 KiB, one page.
pub const MIN_CLUSTER_BYTES: u64 = 4 << 10;
/// Largest cluster: 2 MiB, one huge page.
pub const MAX_CLUSTER_BYTES: u64 = 2 << 20;
/// Cluster size of a new image unless the user says otherwise.
pub const DEFAULT_CLUSTER_BYTES: u64 = 64 << 10;
/// Virtual sizes are multiples of this: 2 MiB, what memory devices can be plugged in.
pub const SIZE_STEP_BYTES: u64 = 2 << 20;
/// Largest virtual size: one KVM memory slot holds 2^31 - 1 pages, which rounds down to 8 TiB - 2 MiB.
pub const MAX_VIRTUAL_BYTES: u64 = (8 << 40) - SIZE_STEP_BYTES;

/// Size of the disk that a guest sees, in bytes: a multiple of 2 MiB up to 8 TiB - 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VirtualSize(u64);

impl VirtualSize {
    /// # Errors
    /// `InvalidArgument` if `bytes` is zero, too large or not a multiple of 2 MiB.
    pub fn new(bytes: u64) -> Result<Self> {
        if bytes == 0 || bytes > MAX_VIRTUAL_BYTES || !bytes.is_multiple_of(SIZE_STEP_BYTES) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "a virtual size of {bytes} bytes is not possible: it must be a multiple of 2 MiB \
                     from 2 MiB to 8 TiB - 2 MiB ({MAX_VIRTUAL_BYTES} bytes)"
                ),
            ));
        }
        Ok(Self(bytes))
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

/// Number of a cluster within one layer, counted from the start of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cluster(pub u64);

impl Cluster {
    /// The range of this one cluster.
    pub fn only(self) -> ClusterRange {
        ClusterRange::new(self.0, self.0 + 1)
    }
}

/// A run of neighbouring clusters, end excluded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClusterRange {
    /// First cluster.
    pub start: u64,
    /// One past the last cluster.
    pub end: u64,
}

impl ClusterRange {
    /// The clusters from `start` up to, not including, `end`.
    pub fn new(start: u64, end: u64) -> Self {
        debug_assert!(start <= end);
        Self { start, end }
    }

    /// How many clusters these are.
    pub fn count(self) -> u64 {
        self.end - self.start
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether `cluster` is one of them.
    pub fn contains(self, cluster: Cluster) -> bool {
        (self.start..self.end).contains(&cluster.0)
    }

    /// The clusters one by one.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Cluster> + Clone {
        (self.start..self.end).map(Cluster)
    }
}

/// Size of a cluster: a power of two from 4 KiB to 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterSize {
    bits: u32,
}

impl ClusterSize {
    /// # Errors
    /// `InvalidArgument` unless `bytes` is a power of two from 4 KiB to 2 MiB.
    pub fn new(bytes: u64) -> Result<Self> {
        if !bytes.is_power_of_two() || !(MIN_CLUSTER_BYTES..=MAX_CLUSTER_BYTES).contains(&bytes) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "a cluster size of {bytes} bytes is not possible: it must be a power of two from 4 KiB to 2 MiB"
                ),
            ));
        }
        Ok(Self {
            bits: bytes.trailing_zeros(),
        })
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        1 << self.bits
    }

    /// Base-2 logarithm of the size.
    pub fn bits(self) -> u32 {
        self.bits
    }

    /// The cluster that holds the byte at `offset`.
    pub fn cluster_at(self, offset: u64) -> Cluster {
        Cluster(offset >> self.bits)
    }

    /// How many clusters it takes to hold `bytes`.
    pub fn clusters_in(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }

    /// Byte offset of the first byte of `cluster`.
    pub fn offset_of(self, cluster: Cluster) -> u64 {
        // Cluster numbers come from `cluster_at`/`clusters_in` of sizes up to 8 TiB, so this cannot overflow.
        cluster.0 << self.bits
    }

    /// The bytes of a run of clusters.
    pub fn byte_range(self, run: ClusterRange) -> Range<u64> {
        self.offset_of(Cluster(run.start))..self.offset_of(Cluster(run.end))
    }

    /// The whole clusters that `bytes` touches.
    pub fn covering(self, bytes: &Range<u64>) -> ClusterRange {
        ClusterRange::new(
            bytes.start >> self.bits,
            self.clusters_in(bytes.end).max(bytes.start >> self.bits),
        )
    }
}

/// Turns a length that is known to be small (a buffer, a page count) into `usize`.
///
/// # Panics
/// If it does not fit, which is a fault of this program: callers bound it first.
pub(crate) fn len(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a bounded length fits the address space")
}

/// A length in memory as a file length.
pub(crate) fn bytes(len: usize) -> u64 {
    u64::try_from(len).expect("usize is at most 64 bits")
}
