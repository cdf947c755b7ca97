// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The region's address space: the trap, and what is mapped over it (`protocol.md` section 6).
//!
//! Knows no socket and no message. It outlives every session: the userfaultfd and the lock are kept as long as the
//! memory, because waiting threads would wake and read zeros when the last userfaultfd closes.
//!
//! Every underlay, the first one and the pieces of UNMAP, comes from [`Underlay::make`], so that neighbours merge again.
#![allow(unsafe_code)] // mmap(2), mremap(2), madvise(2), mprotect(2), msync(2) of the region

use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, MremapFlags, MsyncFlags, ProtFlags, madvise, mmap,
    mmap_anonymous, mprotect, mremap_fixed, msync, munlock, munmap,
};
use vm_memory::VolatileSlice;

use super::kept::Kept;
use crate::error::{Error, Result};
use crate::message::RegionRange;
use crate::uffd::Uffd;

/// What every underlay allows, also of an image that is served read-only: KVM's workers ask for write access even for a
/// load, and where that is not allowed they fail without a fault that the backend hears of, for ever.
const OPEN: MprotectFlags = MprotectFlags::READ.union(MprotectFlags::WRITE);

/// How a file is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileMode {
    pub writable: bool,
    pub sync: bool,
}

impl FileMode {
    fn protection(self) -> ProtFlags {
        if self.writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        }
    }

    fn flags(self) -> MapFlags {
        if self.sync {
            MapFlags::SHARED_VALIDATE | MapFlags::SYNC
        } else {
            MapFlags::SHARED
        }
    }
}

/// Guest memory: a range of addresses that becomes the disk of a virtual machine.
///
/// A touch of a place where nothing is mapped yet waits for the backend, for as long as it takes. The memory stays
/// reserved until the last `Arc` of it is dropped; a thread must not be inside a touch then.
#[derive(Debug)]
pub struct GuestRegion {
    // Dropped in this order: first the memory, then what keeps waiting threads asleep, then the image's lock.
    underlay: Underlay,
    uffd: Uffd,
    _kept: Arc<Kept>,
}

impl GuestRegion {
    /// Reserves `size` bytes at a multiple of `alignment`, registered with `uffd`.
    pub(super) fn reserve(
        size: usize,
        alignment: usize,
        uffd: Uffd,
        kept: Arc<Kept>,
    ) -> Result<Self> {
        let place = Place {
            alignment,
            guard: rustix::param::page_size(),
        };
        let underlay = Underlay::make(&uffd, size, place)?;
        Ok(Self {
            underlay,
            uffd,
            _kept: kept,
        })
    }

    /// Address of byte 0 of the disk; a multiple of 2 MiB.
    pub fn as_ptr(&self) -> *mut u8 {
        self.underlay.base.cast()
    }

    /// Bytes; never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.underlay.len
    }

    /// The whole region, for volatile and atomic access. Stores into a read-only region must not be: they are a
    /// segmentation fault or change a page that is nobody's.
    pub fn volatile_slice(&self) -> VolatileSlice<'_> {
        // SAFETY: the range is mapped from `reserve` to `drop`, which the lifetime of `self` excludes, and is only ever
        // accessed through raw pointers and volatile slices: this type gives out no references to it.
        unsafe { VolatileSlice::new(self.as_ptr(), self.len()) }
    }

    pub(super) fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Maps a piece of a file over the range.
    ///
    /// A failure may leave a hole: [`GuestRegion::restore_trap`] must follow it.
    pub(super) fn map(
        &self,
        file: BorrowedFd<'_>,
        mode: FileMode,
        file_offset: u64,
        range: RegionRange,
    ) -> std::result::Result<(), Errno> {
        let (address, len) = self.locate(range)?;
        let flags = mode.flags() | MapFlags::FIXED;
        // SAFETY: `locate` keeps address and length inside the region, which belongs to `self` and to which nobody holds
        // a reference; replacing what is mapped there is the purpose.
        unsafe { mmap(address, len, mode.protection(), flags, file, file_offset) }.map(drop)
    }

    /// Makes the range a trap again, in one step. Waits until the event of the move was read.
    pub(super) fn restore_trap(&self, range: RegionRange) -> Result<()> {
        let (address, len) = self
            .locate(range)
            .map_err(|e| Error::io("restore the trap", e))?;
        let place = Place {
            alignment: rustix::param::page_size(),
            guard: 0,
        };
        let piece = Underlay::make(&self.uffd, len, place)?;
        piece
            .move_to(address)
            .map_err(|e| Error::io(format!("move {len} bytes of trap"), e))
    }

    /// Whether some of the range is not mapped at all.
    pub(super) fn has_hole(&self, range: RegionRange) -> bool {
        let Ok((address, len)) = self.locate(range) else {
            return false;
        };
        // SAFETY: MS_ASYNC changes no memory; it fails with ENOMEM where nothing is mapped.
        let synced = unsafe { msync(address, len, MsyncFlags::ASYNC) };
        synced == Err(Errno::NOMEM)
    }

    /// Drops the read copies in the range; mappings of files are not harmed.
    pub(super) fn evict(&self, range: RegionRange) -> std::result::Result<(), Errno> {
        let (address, len) = self.locate(range)?;
        // SAFETY: inside the region (`locate`). Anonymous pages there are read copies, which may vanish at any time;
        // shared file pages lose nothing by MADV_DONTNEED.
        match unsafe { madvise(address, len, Advice::LinuxDontneedLocked) } {
            // SAFETY: as above; kernels before 5.18 know only this advice.
            Err(Errno::INVAL) => unsafe { madvise(address, len, Advice::LinuxDontNeed) },
            result => result,
        }
    }

    /// Lets every store into the range fail, those of the kernel included, until [`GuestRegion::allow_stores`]. Write
    /// protection by userfaultfd is not affected.
    pub(super) fn forbid_stores(&self, range: RegionRange) -> std::result::Result<(), Errno> {
        self.protect(range, MprotectFlags::READ)
    }

    /// Takes [`GuestRegion::forbid_stores`] back.
    pub(super) fn allow_stores(&self, range: RegionRange) -> std::result::Result<(), Errno> {
        self.protect(range, OPEN)
    }

    fn protect(
        &self,
        range: RegionRange,
        protection: MprotectFlags,
    ) -> std::result::Result<(), Errno> {
        let (address, len) = self.locate(range)?;
        // SAFETY: inside the region (`locate`), to which nobody holds a reference; contents do not change.
        unsafe { mprotect(address, len, protection) }
    }

    /// Wakes the threads that wait in the range.
    pub(super) fn wake(&self, range: RegionRange) -> Result<()> {
        let (address, _) = self.locate(range).map_err(|e| Error::io("wake", e))?;
        self.uffd.wake(address.addr() as u64, range.len)
    }

    /// The whole region.
    pub(super) fn whole(&self) -> RegionRange {
        RegionRange {
            offset: 0,
            len: self.len() as u64,
        }
    }

    /// Wakes every thread that waits in the region.
    pub(super) fn wake_all(&self) -> Result<()> {
        self.uffd
            .wake(self.as_ptr().addr() as u64, self.len() as u64)
    }

    /// Address and length of a range; `EINVAL` unless it is inside the region.
    fn locate(&self, range: RegionRange) -> std::result::Result<(*mut c_void, usize), Errno> {
        let end = range.end().and_then(|end| usize::try_from(end).ok());
        if end.is_none_or(|end| end > self.len()) {
            return Err(Errno::INVAL);
        }
        let offset = usize::try_from(range.offset).map_err(|_| Errno::INVAL)?;
        let len = usize::try_from(range.len).map_err(|_| Errno::INVAL)?;
        Ok((self.underlay.base.wrapping_byte_add(offset), len))
    }
}

// SAFETY: the addresses are valid in every thread, and the memory is only reached through raw pointers and volatile
// slices, whose races are the guest's as on real hardware. The descriptors are `Send`.
unsafe impl Send for GuestRegion {}
// SAFETY: as above; every method takes `&self` and changes the address space only by system calls, which the kernel orders.
unsafe impl Sync for GuestRegion {}

/// Tries whether one page of a file can be mapped with these flags, away from the region.
///
/// A `MAP_FIXED` that fails leaves a hole, so this comes first.
pub(super) fn try_scratch(file: BorrowedFd<'_>, mode: FileMode) -> std::result::Result<(), Errno> {
    let page = rustix::param::page_size();
    // SAFETY: no address is given, so the kernel takes a free one; nothing that exists is replaced.
    let scratch = unsafe {
        mmap(
            ptr::null_mut(),
            page,
            mode.protection(),
            mode.flags(),
            file,
            0,
        )
    }?;
    // SAFETY: the page was mapped by the line above, and nobody else knows it.
    unsafe { munmap(scratch, page) }
}

/// Where an underlay goes.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Its address is a multiple of this.
    alignment: usize,
    /// Inaccessible bytes on either side. Without them a piece that the kernel puts right beside the region would merge
    /// with it, keep the page offset of that place, and never merge where it is moved to.
    guard: usize,
}

/// An anonymous range of trap, and the guard around it, that belong to this value.
#[derive(Debug)]
struct Underlay {
    base: *mut c_void,
    len: usize,
    guard: usize,
}

impl Underlay {
    /// Makes a trap. Inaccessible until it is registered: under `mlockall` new accessible memory would be filled with
    /// zeros at once. Never merged (that removes write protection), never huge, not in core dumps, not in forked children.
    fn make(uffd: &Uffd, len: usize, place: Place) -> Result<Self> {
        let underlay = Self::reserve(len, place)
            .map_err(|e| Error::io(format!("reserve {len} bytes of address space"), e))?;
        underlay
            .advise()
            .map_err(|e| Error::io("prepare a trap", e))?;
        uffd.register(underlay.base.addr() as u64, len as u64)?;
        // SAFETY: the range belongs to `underlay` and holds no page.
        unsafe { mprotect(underlay.base, len, OPEN) }
            .map_err(|e| Error::io(format!("open {len} bytes of trap"), e))?;
        Ok(underlay)
    }

    /// Reserves inaccessible addresses; what is too much for the alignment is given back.
    fn reserve(len: usize, place: Place) -> std::result::Result<Self, Errno> {
        let Place { alignment, guard } = place;
        let slack = alignment - rustix::param::page_size();
        let kept = len.checked_add(2 * guard).ok_or(Errno::NOMEM)?;
        let total = kept.checked_add(slack).ok_or(Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is given, so the kernel takes a free one; nothing that exists is replaced.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), total, ProtFlags::empty(), flags) }?;
        let first = start.addr() + guard;
        let head = first.next_multiple_of(alignment) - first;
        release(start, head);
        release(start.wrapping_byte_add(head + kept), slack - head);
        Ok(Self {
            base: start.wrapping_byte_add(head + guard),
            len,
            guard,
        })
    }

    fn advise(&self) -> std::result::Result<(), Errno> {
        // SAFETY: the range belongs to `self`; unlocking has no effect on its contents.
        unsafe { munlock(self.base, self.len) }?;
        for advice in [
            Advice::LinuxNoHugepage,
            Advice::LinuxDontFork,
            Advice::LinuxDontDump,
            Advice::LinuxUnmergeable,
        ] {
            // SAFETY: the range belongs to `self` and holds no page; none of these advices drops contents.
            match unsafe { madvise(self.base, self.len, advice) } {
                Ok(()) | Err(Errno::INVAL) => {} // INVAL: a kernel without the feature
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Moves the trap over `address`, replacing what is there in one step.
    ///
    /// A mapping that failed may have left a hole there, and the kernel may have taken exactly the hole for this trap:
    /// then it stands where it belongs, and a move onto itself would be refused.
    fn move_to(self, address: *mut c_void) -> std::result::Result<(), Errno> {
        if self.base == address {
            std::mem::forget(self); // it is part of the region now
            return Ok(());
        }
        // SAFETY: source and destination have `len` bytes; the source belongs to `self`, the destination is inside the
        // region by the caller's `locate`; nobody holds a reference to either.
        unsafe { mremap_fixed(self.base, self.len, self.len, MremapFlags::MAYMOVE, address) }?;
        std::mem::forget(self); // its old addresses are free
        Ok(())
    }
}

impl Drop for Underlay {
    fn drop(&mut self) {
        release(
            self.base.wrapping_byte_sub(self.guard),
            self.len + 2 * self.guard,
        );
    }
}

/// Gives addresses back that this module reserved and that nobody uses any more.
fn release(base: *mut c_void, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: only called with ranges that `Underlay` owns or has just cut off, never with a borrowed one.
    if let Err(errno) = unsafe { munmap(base, len) } {
        log::warn!("cannot unmap {len} bytes: {errno}");
    }
}
