// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! userfaultfd: create, register, wake, copy, read events. Knows no region, no image and no socket.
//!
//! The kernel's interface is `linux/userfaultfd.h` and `admin-guide/mm/userfaultfd`; its layout and request numbers are
//! asserted below. Always in kernel mode: a user-mode-only descriptor turns faults inside the kernel into SIGBUS.
#![allow(unsafe_code)] // ioctl(2) and the system call userfaultfd(2)

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::error::{Error, Result};

const DEVICE: &str = "/dev/userfaultfd";
const API: u64 = 0xAA;

/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`, `UFFD_FEATURE_EVENT_REMAP` and `UFFD_FEATURE_THREAD_ID`.
const FEATURES: u64 = (1 << 0) | (1 << 2) | (1 << 8);

const MODE_MISSING: u64 = 1 << 0;
const MODE_WP: u64 = 1 << 1;
const COPY_DONTWAKE: u64 = 1 << 0;
const COPY_WP: u64 = 1 << 1;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMAP: u8 = 0x14;
/// Bytes of `struct uffd_msg`: the event's number in the first byte of a word, then a union of three words.
const MESSAGE: usize = 32;
const FAULT_WRITE: u64 = 1 << 0;
const FAULT_WP: u64 = 1 << 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const WRITEPROTECT_WP: u64 = 1 << 0;

/// The generic encoding of `asm-generic/ioctl.h`: direction, size, type, number.
const fn request(direction: u32, number: u32, size: usize) -> u32 {
    assert!(size < 1 << 14);
    #[allow(clippy::cast_possible_truncation)] // below 2^14, asserted
    let size = size as u32;
    (direction << 30) | (size << 16) | (0xAA << 8) | number
}

const READ: u32 = 2;
const READ_WRITE: u32 = 3;
const USERFAULTFD_IOC_NEW: u32 = request(0, 0x00, 0);
const UFFDIO_API: u32 = request(READ_WRITE, 0x3F, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u32 = request(READ_WRITE, 0x00, size_of::<UffdioRegister>());
const UFFDIO_WAKE: u32 = request(READ, 0x02, size_of::<UffdioRange>());
const UFFDIO_COPY: u32 = request(READ_WRITE, 0x03, size_of::<UffdioCopy>());
const UFFDIO_WRITEPROTECT: u32 = request(READ_WRITE, 0x06, size_of::<UffdioWriteprotect>());

// The numbers that a C program gets from linux/userfaultfd.h on the architectures that pcow runs on.
#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
)))]
compile_error!("the ioctl numbers of userfaultfd were not checked on this architecture");
const _: () = {
    assert!(USERFAULTFD_IOC_NEW == 0x0000_AA00);
    assert!(UFFDIO_API == 0xC018_AA3F);
    assert!(UFFDIO_REGISTER == 0xC020_AA00);
    assert!(UFFDIO_WAKE == 0x8010_AA02);
    assert!(UFFDIO_COPY == 0xC028_AA03);
    assert!(UFFDIO_WRITEPROTECT == 0xC018_AA06);
    assert!(std::mem::offset_of!(UffdioCopy, copy) == 32);
};

/// What a blocked touch, or a move of registered memory, looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for a page.
    Fault {
        /// Address of the page in the frontend.
        address: u64,
        /// The kernel asked for write access. Under KVM on x86 a read may look so too.
        write: bool,
        /// The page is there and write-protected: a store to a read copy.
        wp: bool,
        /// Thread that waits, by its number in its own PID namespace.
        thread: u32,
    },
    /// Registered memory was moved; the mover sleeps until this was read.
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// An event that was not asked for, by its number.
    Other(u8),
}

/// What became of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyOutcome {
    /// All of it is in place.
    Done,
    /// So many bytes are in place, and waiters there were woken; look again before going on behind them.
    Partial(u64),
    /// The first page is there already (`EEXIST`).
    Exists,
    /// The address space is changing (`EAGAIN`): what was decided may be stale, so look it up again (F3).
    Again,
    /// The range is not, or not all, registered memory (`ENOENT`): something is mapped there.
    NoEntry,
    /// No memory for the pages (`ENOMEM`).
    NoMemory,
    /// The frontend's address space is gone (`ESRCH`).
    Gone,
}

/// How [`Uffd::copy`] installs pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyMode {
    /// Write-protect: a store is a fault again.
    pub write_protect: bool,
    /// Leave waiters asleep until an explicit [`Uffd::wake`].
    pub dont_wake: bool,
}

/// A buffer for events, to be used again and again.
pub struct EventBuffer {
    bytes: [u8; MESSAGE * Self::LEN],
}

impl EventBuffer {
    /// Events that one read returns at most.
    pub const LEN: usize = 64;
}

impl Default for EventBuffer {
    fn default() -> Self {
        Self {
            bytes: [0; MESSAGE * Self::LEN],
        }
    }
}

impl fmt::Debug for EventBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBuffer").finish_non_exhaustive()
    }
}

/// A userfaultfd, non-blocking and close-on-exec.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Creates one for this process, with the features that the protocol asks for: from `device` (an open
    /// `/dev/userfaultfd`) if given, else from `/dev/userfaultfd`, else by the system call.
    ///
    /// # Errors
    /// None of the ways is open to this process, or the kernel lacks a feature (needed: Linux 5.7, on arm64 6.10).
    pub fn create(device: Option<BorrowedFd<'_>>) -> Result<Self> {
        let fd = match device {
            Some(device) => new_from_device(device),
            None => new_by_path().or_else(|_| new_by_syscall()),
        };
        let uffd = Self {
            fd: fd.map_err(|e| Error::io("create a userfaultfd", e))?,
        };
        uffd.handshake()?;
        Ok(uffd)
    }

    /// A userfaultfd that a peer passed, made non-blocking.
    ///
    /// # Errors
    /// It is another kind of file.
    pub fn from_peer(fd: OwnedFd) -> Result<Self> {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let target =
            std::fs::read_link(link).map_err(|e| Error::io("look at a passed descriptor", e))?;
        if target.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(Error::io(
                "passed descriptor is no userfaultfd",
                Errno::INVAL,
            ));
        }
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|e| Error::io("make a userfaultfd non-blocking", e))?;
        Ok(Self { fd })
    }

    fn handshake(&self) -> Result<()> {
        let mut api = UffdioApi {
            api: API,
            features: FEATURES,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API reads and writes one `uffdio_api`, which `api` is (layout asserted above).
        unsafe { self.ioctl(UFFDIO_API, &mut api) }.map_err(|errno| match errno {
            // The kernel does not say which of them it does not know.
            Errno::INVAL => Error::io(
                "the kernel's userfaultfd lacks write protection or remap events (needed: Linux 5.7, on arm64 6.10)",
                errno,
            ),
            errno => Error::io("userfaultfd: agree on features", errno),
        })
    }

    /// Registers memory of this process for missing pages and write protection.
    ///
    /// # Errors
    /// The range is no anonymous memory, or registered with another userfaultfd.
    pub fn register(&self, start: u64, len: u64) -> Result<()> {
        let range = UffdioRange { start, len };
        let mut register = UffdioRegister {
            range,
            mode: MODE_MISSING | MODE_WP,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes one `uffdio_register`, which `register` is (layout asserted above).
        unsafe { self.ioctl(UFFDIO_REGISTER, &mut register) }
            .map_err(|e| Error::io(format!("userfaultfd: register {len} bytes"), e))
    }

    /// Wakes every thread that waits in the range; those whose page is still missing fault again.
    ///
    /// # Errors
    /// The range is not made of whole pages.
    pub fn wake(&self, start: u64, len: u64) -> Result<()> {
        let mut range = UffdioRange { start, len };
        // SAFETY: UFFDIO_WAKE reads one `uffdio_range`, which `range` is (layout asserted above).
        unsafe { self.ioctl(UFFDIO_WAKE, &mut range) }
            .map_err(|e| Error::io(format!("userfaultfd: wake {len} bytes at {start:#x}"), e))
    }

    /// Copies `source` (whole pages) to missing pages at `destination` in the frontend, and wakes who waits there.
    ///
    /// Present pages are never changed. May sleep on the frontend's memory locks.
    ///
    /// # Errors
    /// What no [`CopyOutcome`] stands for: the arguments are wrong.
    pub fn copy(&self, destination: u64, source: &[u8], mode: CopyMode) -> Result<CopyOutcome> {
        let mut copy = UffdioCopy {
            dst: destination,
            src: source.as_ptr().addr() as u64,
            len: source.len() as u64,
            mode: copy_flags(mode),
            copy: 0,
        };
        // SAFETY: UFFDIO_COPY reads and writes one `uffdio_copy`, which `copy` is (layout asserted above). It reads
        // `len` bytes at `src`, which `source` lends, and writes only to missing pages of registered memory, to which
        // nothing can hold a reference.
        let result = unsafe { self.ioctl(UFFDIO_COPY, &mut copy) };
        let errno = match result {
            Ok(()) => return Ok(CopyOutcome::Done),
            Err(errno) => errno,
        };
        outcome(errno, copy.copy)
            .ok_or_else(|| Error::io(format!("userfaultfd: copy to {destination:#x}"), errno))
    }

    /// Whether the address space that this userfaultfd belongs to is gone, and with it all that was mapped there. `page` is
    /// the address of a page of it that was registered and is missing, write-protected, or another mapping by now: it
    /// stays so.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if the kernel does not say.
    pub fn is_orphaned(&self, page: u64, page_size: u64) -> Result<bool> {
        let range = UffdioRange {
            start: page,
            len: page_size,
        };
        let mut protect = UffdioWriteprotect {
            range,
            mode: WRITEPROTECT_WP,
        };
        // SAFETY: UFFDIO_WRITEPROTECT reads one `uffdio_writeprotect`, which `protect` is (layout asserted above). It
        // protects what is protected already, or finds no page, or no registered one.
        match unsafe { self.ioctl(UFFDIO_WRITEPROTECT, &mut protect) } {
            Ok(()) | Err(Errno::NOENT | Errno::AGAIN) => Ok(false),
            Err(Errno::SRCH) => Ok(true),
            Err(errno) => Err(Error::io("userfaultfd: ask for its address space", errno)),
        }
    }

    /// Reads what has happened, without waiting; no event if nothing has.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn read_events<'a>(
        &self,
        buffer: &'a mut EventBuffer,
    ) -> Result<impl Iterator<Item = Event> + use<'a>> {
        let bytes = rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut buffer.bytes[..]));
        let bytes = match bytes {
            Err(Errno::AGAIN) => 0,
            other => other.map_err(|e| Error::io("userfaultfd: read events", e))?,
        };
        Ok(buffer.bytes[..bytes]
            .as_chunks::<MESSAGE>()
            .0
            .iter()
            .map(event_of))
    }

    /// # Safety
    /// `T` is what the kernel reads and writes for `request`.
    unsafe fn ioctl<T>(&self, request: u32, argument: &mut T) -> std::result::Result<(), Errno> {
        // SAFETY: the descriptor is a userfaultfd, and the caller gives the argument that `request` takes.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request as libc::Ioctl, argument) };
        if result == 0 {
            Ok(())
        } else {
            Err(last_errno())
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn copy_flags(mode: CopyMode) -> u64 {
    let write_protect = if mode.write_protect { COPY_WP } else { 0 };
    let dont_wake = if mode.dont_wake { COPY_DONTWAKE } else { 0 };
    write_protect | dont_wake
}

/// The outcome of a copy that failed with `errno` after `copied` bytes; `None` for a misuse.
///
/// The kernel says `EAGAIN` both for a short copy (`copied` above 0) and for a changing address space (`copied` left at 0,
/// newer kernels: the negative errno).
fn outcome(errno: Errno, copied: i64) -> Option<CopyOutcome> {
    match errno {
        Errno::AGAIN => Some(match u64::try_from(copied) {
            Ok(bytes) if bytes > 0 => CopyOutcome::Partial(bytes),
            _ => CopyOutcome::Again,
        }),
        Errno::EXIST => Some(CopyOutcome::Exists),
        Errno::NOENT => Some(CopyOutcome::NoEntry),
        Errno::NOMEM => Some(CopyOutcome::NoMemory),
        Errno::SRCH => Some(CopyOutcome::Gone),
        _ => None,
    }
}

/// `arg.pagefault` is flags, address, thread; `arg.remap` is from, to, length.
fn event_of(message: &[u8; MESSAGE]) -> Event {
    match message[0] {
        EVENT_PAGEFAULT => Event::Fault {
            address: word(message, 2),
            write: word(message, 1) & FAULT_WRITE != 0,
            wp: word(message, 1) & FAULT_WP != 0,
            thread: u32::from_ne_bytes([message[24], message[25], message[26], message[27]]),
        },
        EVENT_REMAP => Event::Remap {
            from: word(message, 1),
            to: word(message, 2),
            len: word(message, 3),
        },
        other => Event::Other(other),
    }
}

fn word(message: &[u8; MESSAGE], index: usize) -> u64 {
    u64::from_ne_bytes(message.as_chunks::<8>().0[index])
}

fn new_from_device(device: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: USERFAULTFD_IOC_NEW takes its flags by value and touches no memory.
    let fd = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            USERFAULTFD_IOC_NEW as libc::Ioctl,
            flags,
        )
    };
    owned(fd)
}

fn new_by_path() -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    new_from_device(device.as_fd())
}

fn new_by_syscall() -> io::Result<OwnedFd> {
    let flags = rustix::mm::UserfaultfdFlags::CLOEXEC | rustix::mm::UserfaultfdFlags::NONBLOCK;
    // SAFETY: the call only creates a descriptor; what is done with it is this module's.
    Ok(unsafe { rustix::mm::userfaultfd(flags) }?)
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
