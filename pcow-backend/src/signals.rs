// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! SIGTERM and SIGINT as something to poll for.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use vmm_sys_util::signal::{block_signal, create_sigset};

const ENDING: [i32; 2] = [libc::SIGTERM, libc::SIGINT];

/// The signals that end the program, blocked and collected by a descriptor.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks the signals. Must come before other threads start, which inherit that.
    ///
    /// # Errors
    /// As signalfd(2).
    pub fn block() -> io::Result<Self> {
        for signal in ENDING {
            block_signal(signal).map_err(|e| io::Error::other(format!("{e:?}")))?;
        }
        let set = create_sigset(&ENDING).map_err(io::Error::from)?;
        // SAFETY: -1 asks for a new descriptor; `set` is a valid signal set that outlives the call.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd has just returned this new descriptor, which nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// The name of a signal that came.
    pub fn take(&self) -> &'static str {
        let mut raw = [0; size_of::<libc::signalfd_siginfo>()];
        let got = rustix::io::read(&self.fd, &mut raw);
        // ssi_signo is the first field (signalfd(2)).
        let number = u32::from_ne_bytes([raw[0], raw[1], raw[2], raw[3]]);
        match (got, i32::try_from(number)) {
            (Ok(_), Ok(libc::SIGINT)) => "SIGINT",
            _ => "SIGTERM",
        }
    }

    /// Readable when a signal came.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
