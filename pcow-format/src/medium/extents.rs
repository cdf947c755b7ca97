// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The extent size hint of a file: in which pieces a filesystem allocates.
//!
//! XFS knows it (xfsctl(3), `fsx_extsize`), and only for a file that has no extents yet. ext4 aligns an extent that is
//! reserved whole by itself, so that nothing is lost where the hint is refused.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
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
