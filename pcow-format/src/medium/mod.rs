// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The seam through which every byte becomes durable.
//!
//! The rest of the crate reaches files only through [`Directory`] and [`File`]. Every call that can change what survives
//! a crash names its call site, so that an implementation can record, reorder, fail or cut it. [`real`] is the
//! operating system, `sim` (with the feature of that name) a recording simulation. This module knows files and names, not layers or clusters.

mod dax;
mod extents;
#[cfg(feature = "sim")]
pub mod faulty;
mod hindrance;
mod lease;
pub mod real;
#[cfg(feature = "sim")]
pub mod sim;

use std::any::Any;
use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::Arc;

pub use hindrance::Hindrance;
pub use lease::Lease;

use crate::units::{bytes, len};

/// Identifies one call in the source that changes durable state, for example `snapshot.root.rename`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site(pub &'static str);

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// For reading only.
    Read,
    /// For reading and writing.
    Write,
}

/// What identifies a file and tells copies apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Device number of the filesystem.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Birth time in nanoseconds since the epoch; 0 where the filesystem has none.
    pub birth_ns: u64,
}

/// What the filesystem says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Which file it is.
    pub identity: Identity,
    /// Length in bytes.
    pub len: u64,
    /// Bytes of storage that it occupies.
    pub allocated: u64,
    /// How many names it has.
    pub links: u64,
    /// Time of the last change of content, in nanoseconds since the epoch.
    pub mtime_ns: i128,
}

/// What makes bytes durable: design of the storage under a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// Stores reach the medium by cache-line write-back (a `MAP_SYNC` mapping of this file succeeds).
    Dax,
    /// Stores reach the page cache; `fdatasync` makes them durable.
    PageCache,
}

impl Domain {
    /// The name used in output.
    pub fn name(self) -> &'static str {
        match self {
            Domain::Dax => "dax",
            Domain::PageCache => "page-cache",
        }
    }
}

/// An open directory.
pub trait Directory: Debug + Send + Sync {
    /// Opens an existing regular file by name; never follows a symbolic link.
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn File>>;
    /// Creates a file that must not exist, empty, mode 0600 less the umask.
    fn create(&self, site: Site, name: &str) -> io::Result<Arc<dyn File>>;
    /// Renames a file, replacing `to` atomically.
    fn rename(&self, site: Site, from: &str, to: &str) -> io::Result<()>;
    /// Gives the file `from` of the directory `source` the name `to` here. Fails with `EXDEV` across filesystems.
    fn link(&self, site: Site, source: &dyn Directory, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file's name.
    fn unlink(&self, site: Site, name: &str) -> io::Result<()>;
    /// Makes names created, renamed and removed here durable.
    fn sync(&self, site: Site) -> io::Result<()>;
    /// The names of all entries, in no order.
    fn names(&self) -> io::Result<Vec<String>>;
    /// Opens a subdirectory; never follows a symbolic link.
    fn open_dir(&self, name: &str) -> io::Result<Arc<dyn Directory>>;
    /// Creates a subdirectory that must not exist and opens it. One that cannot be opened is removed, if that succeeds.
    fn create_dir(&self, site: Site, name: &str) -> io::Result<Arc<dyn Directory>>;
    /// Renames a subdirectory; fails with `EEXIST` if `to` exists.
    fn rename_dir(&self, site: Site, from: &str, to: &str) -> io::Result<()>;
    /// Removes an empty subdirectory.
    fn remove_dir(&self, site: Site, name: &str) -> io::Result<()>;
    /// The directory behind a real implementation, for what is not a durable act (locks, sockets, statistics).
    fn as_real(&self) -> Option<&real::RealDirectory>;
    /// Itself, so that an implementation can tell whether a [`Directory::link`] stays within it.
    fn as_any(&self) -> &dyn Any;
}

/// An open file.
pub trait File: Debug + Send + Sync {
    /// Identity, length, blocks and links.
    fn status(&self) -> io::Result<Status>;
    /// Reads at `offset` until `buf` is full or the file ends; returns the bytes read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `buf` at `offset`.
    fn write_at(&self, site: Site, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`; durable when it returns (`RWF_DSYNC`).
    fn write_durable_at(&self, site: Site, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Copies `range` of `source` to the same offset here, by sharing storage or within the filesystem where that is possible.
    fn copy_from(&self, site: Site, source: &dyn File, range: Range<u64>) -> io::Result<()> {
        copy_by_hand(self, site, source, range)
    }
    /// Sets the length; what is added reads zero.
    fn set_len(&self, site: Site, len: u64) -> io::Result<()>;
    /// Fails if storage for the range would take the filesystem's last blocks, which stores of a guest may need.
    fn leave_room(&self, range: &Range<u64>) -> io::Result<()>;
    /// Whether the filesystem has little more left than those last blocks.
    fn is_low_on_space(&self) -> io::Result<bool>;
    /// Gives every byte of the range storage of its own, so that no later store can meet a full filesystem. Content stays.
    fn reserve(&self, site: Site, range: Range<u64>) -> io::Result<()>;
    /// As [`File::reserve`], and the range reads zero afterwards, whatever it held.
    fn zero(&self, site: Site, range: Range<u64>) -> io::Result<()>;
    /// Writes zeros over the range; durable when it returns (`RWF_DSYNC`). Unlike [`File::zero`] it leaves *written*
    /// storage: a first store to it changes nothing in the filesystem.
    fn write_zeros_durable(&self, site: Site, range: Range<u64>) -> io::Result<()>;
    /// Asks the filesystem to allocate aligned extents of `bytes`, a power of two, from now on. Changes no content, and
    /// nothing rests on it.
    fn prefer_extents(&self, bytes: u64) -> io::Result<()>;
    /// Whether all of the range has written storage of its own already, as far as the filesystem tells. Changes nothing,
    /// where [`File::reserve`] changes the file's times at least.
    fn has_own_storage(&self, range: Range<u64>) -> io::Result<bool>;
    /// Gives storage back; the range reads zero afterwards.
    fn punch(&self, site: Site, range: Range<u64>) -> io::Result<()>;
    /// Shares all of `source`'s storage with this file, which is as long and empty (a reflink copy); false if the
    /// filesystem cannot.
    fn share_storage(&self, site: Site, source: &dyn File) -> io::Result<bool>;
    /// The first range at or after `from` that may hold something other than zeros, as far as the filesystem tells.
    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>>;
    /// Makes content, and the length needed to read it, durable (`fdatasync`).
    fn sync_data(&self, site: Site) -> io::Result<()>;
    /// As [`File::sync_data`], with the file's times (`fsync`).
    fn sync_all(&self, site: Site) -> io::Result<()>;
    /// What makes stores to this file durable.
    fn domain(&self) -> io::Result<Domain>;
    /// Stores one aligned 8-byte word through the mapping of a DAX file. Visible at once, durable after
    /// [`File::write_back`] and [`File::fence`].
    fn store_word(&self, site: Site, offset: u64, word: u64) -> io::Result<()>;
    /// Starts the write-back of the cache line that holds `offset`.
    fn write_back(&self, site: Site, offset: u64) -> io::Result<()>;
    /// Waits until all write-backs started by this thread have reached the persistence domain.
    fn fence(&self, site: Site);
    /// Proves that nobody has the file open for writing, and keeps it so until [`File::end_lease`] or the end of this
    /// object. The file must have been opened for reading.
    fn take_lease(&self) -> io::Result<Lease>;
    /// Whether a lease that was granted still holds, and nobody waits for its end.
    fn lease_holds(&self) -> io::Result<bool>;
    /// Gives a lease up.
    fn end_lease(&self);
    /// The file behind a real implementation, to be passed on to another process.
    fn as_real(&self) -> Option<&std::fs::File>;
}

/// Bytes copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// Copies by reading and writing.
pub(crate) fn copy_by_hand<F: File + ?Sized>(
    target: &F,
    site: Site,
    source: &dyn File,
    range: Range<u64>,
) -> io::Result<()> {
    let mut buf = vec![0; COPY_BYTES];
    let mut at = range.start;
    while at < range.end {
        let piece = &mut buf[..len((range.end - at).min(bytes(COPY_BYTES)))];
        read_exact_at(source, piece, at)?;
        target.write_at(site, piece, at)?;
        at += bytes(piece.len());
    }
    Ok(())
}

/// Reads exactly `buf.len()` bytes.
///
/// # Errors
/// `UnexpectedEof` if the file is shorter.
pub(crate) fn read_exact_at(file: &dyn File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    if file.read_at(buf, offset)? == buf.len() {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the file ends too early",
    ))
}
