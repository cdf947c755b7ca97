// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Proof that nobody has a file open for writing: a read lease (fcntl(2), `F_SETLEASE`).
//!
//! The kernel grants it only while no open file description for writing and no shared mapping that was made through one
//! exists, in whatever process, under whatever name, or on its way through a socket. Until it is given up, whoever opens
//! the file for writing waits. Pages that a device or an io_uring has pinned are not seen.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `F_SETSIG` of the kernel's `asm-generic/fcntl.h`, which x86-64 and aarch64 use; `libc` has no name for it.
const F_SETSIG: libc::c_int = 10;

/// What asking for a lease says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// Nobody has the file open for writing, or will as long as the lease holds.
    Granted,
    /// Somebody has.
    Busy,
    /// It cannot be told: the filesystem, the system's settings or this user's rights do not allow leases.
    Unknown,
}

/// Asks for a read lease on `file`, which must be open for reading only.
///
/// # Errors
/// As fcntl(2), for what says nothing about leases.
pub(super) fn take(file: &File) -> io::Result<Lease> {
    // A lease that somebody breaks is announced by SIGIO, whose default ends the process. SIGURG's default is to do
    // nothing; whether the lease still holds is asked instead.
    // SAFETY: the descriptor is open, and the argument is a number.
    if unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and the argument is a number.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) } == 0 {
        return Ok(Lease::Granted);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Ok(Lease::Busy),
        Some(libc::EINVAL | libc::EACCES | libc::EPERM | libc::EOPNOTSUPP | libc::ENOLCK) => {
            Ok(Lease::Unknown)
        }
        _ => Err(error),
    }
}

/// Whether the lease holds and nobody waits for its end.
///
/// # Errors
/// As fcntl(2).
pub(super) fn holds(file: &File) -> io::Result<bool> {
    // SAFETY: the descriptor is open, and the command takes no argument.
    let kind = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) };
    if kind < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(kind == libc::F_RDLCK)
}

/// Gives the lease up.
pub(super) fn end(file: &File) {
    // SAFETY: the descriptor is open, and the argument is a number. Without a lease this is an error that says so.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn a_lease_is_granted_only_while_nobody_can_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let writer = File::create(&path).unwrap();
        let reader = File::open(&path).unwrap();
        assert_eq!(take(&reader).unwrap(), Lease::Busy);
        let copy = writer.try_clone().unwrap();
        drop(writer);
        assert_eq!(take(&reader).unwrap(), Lease::Busy);
        drop(copy);
        assert_eq!(take(&reader).unwrap(), Lease::Granted);
        assert!(holds(&reader).unwrap());
        // Somebody opens it for writing and does not wait: the lease is broken, and this process lives.
        let mut options = File::options();
        options.write(true).custom_flags(libc::O_NONBLOCK);
        let refused = options.open(&path).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EWOULDBLOCK));
        assert!(!holds(&reader).unwrap());
        end(&reader);
        options.open(&path).unwrap();
    }
}
