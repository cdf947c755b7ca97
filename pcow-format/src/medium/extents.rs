// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The extents of a file: in which pieces the filesystem is to allocate them, and whether they are there.
//!
//! XFS knows a hint for their size (xfsctl(3), `fsx_extsize`), for a file that has none yet. ext4 aligns an extent that is
//! reserved whole by itself, so that nothing is lost where the hint is refused.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    flags: u32,
    extent_bytes: u32,
    extent_count: u32,
    project: u32,
    copy_extent_bytes: u32,
    padding: [u8; 8],
}

const _: () = assert!(size_of::<Attributes>() == 28);

/// `_IOR('X', 31, struct fsxattr)`.
const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f;
/// `_IOW('X', 32, struct fsxattr)`.
const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820;
/// `extent_bytes` counts.
const FS_XFLAG_EXTSIZE: u32 = 0x800;

/// Asks for extents of `bytes`, aligned in the file.
///
/// # Errors
/// The filesystem knows no such hint, or the file has extents already.
pub(super) fn prefer(file: &File, bytes: u64) -> io::Result<()> {
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes a `struct fsxattr`, which `Attributes` is laid out as, into memory that outlives the call.
    let got = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.flags |= FS_XFLAG_EXTSIZE;
    attributes.extent_bytes = u32::try_from(bytes).map_err(io::Error::other)?;
    // SAFETY: the kernel reads a `struct fsxattr` from memory that outlives the call.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attributes) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Extents that are asked for at once.
const EXTENTS: usize = 32;
/// The same, as the kernel counts.
const ROOM: u32 = 32;
const _: () = assert!(size_of::<[u8; EXTENTS]>() == size_of::<[u8; ROOM as usize]>());

/// `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

/// `struct fiemap` of linux/fiemap.h, with room for extents.
#[repr(C)]
#[derive(Debug)]
struct ExtentMap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    room: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

const _: () = assert!(size_of::<Extent>() == 56);
const _: () = assert!(size_of::<ExtentMap>() == 32 + 56 * EXTENTS);

/// `_IOWR('f', 11, struct fiemap)`; the size in it is that of the head alone.
const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b;
const FIEMAP_EXTENT_UNKNOWN: u32 = 0x2;
const FIEMAP_EXTENT_DELALLOC: u32 = 0x4;
const FIEMAP_EXTENT_UNWRITTEN: u32 = 0x800;
const FIEMAP_EXTENT_SHARED: u32 = 0x2000;
/// With one of these a store to an extent makes the filesystem change it.
const NOT_SETTLED: u32 =
    FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC | FIEMAP_EXTENT_UNWRITTEN | FIEMAP_EXTENT_SHARED;

/// Whether all of `range` is written storage that no other file shares (Documentation/filesystems/fiemap.rst).
///
/// # Errors
/// The filesystem does not tell.
pub(super) fn are_settled(file: &File, range: Range<u64>) -> io::Result<bool> {
    let mut at = range.start;
    while at < range.end {
        let map = map(file, at..range.end)?;
        let found = usize::try_from(map.mapped).unwrap_or(EXTENTS).min(EXTENTS);
        let before = at;
        for extent in &map.extents[..found] {
            if extent.logical > at || extent.flags & NOT_SETTLED != 0 {
                return Ok(false);
            }
            at = at.max(extent.logical.saturating_add(extent.length));
        }
        if at == before {
            return Ok(false);
        }
    }
    Ok(true)
}

fn map(file: &File, range: Range<u64>) -> io::Result<ExtentMap> {
    let mut map = ExtentMap {
        start: range.start,
        length: range.end - range.start,
        flags: 0,
        mapped: 0,
        room: ROOM,
        reserved: 0,
        extents: [Extent::default(); EXTENTS],
    };
    // SAFETY: the kernel reads the head of a `struct fiemap` and writes it and at most `room` extents behind it, which is
    // as many as `map` has; it outlives the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(map)
}
