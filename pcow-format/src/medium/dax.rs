// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stores to a file on a DAX filesystem: mapping, atomic store, cache-line write-back and fence.
//!
//! One of the few files of the crate that hold `unsafe`. On a machine whose write-back instruction is not known here no
//! file counts as DAX, so that everything goes through `fdatasync`. The aarch64 part was never run on such a machine with
//! persistent memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::len;

/// A whole file mapped shared and writable with `MAP_SYNC`.
#[derive(Debug)]
pub(crate) struct SyncMapping {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only accessed with atomic operations.
unsafe impl Send for SyncMapping {}
// SAFETY: as for Send; `store` takes &self and is atomic.
unsafe impl Sync for SyncMapping {}

impl SyncMapping {
    /// Maps the first `length` bytes of `file`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` or `EINVAL` where the file is not DAX.
    pub(crate) fn new(file: &File, length: u64) -> io::Result<Self> {
        let length = len(length);
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing; the fd is open.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self { base, length })
    }

    fn address(&self, offset: u64) -> io::Result<NonNull<u8>> {
        let offset = len(offset);
        if !offset.is_multiple_of(8) || offset + 8 > self.length {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: offset + 8 <= length, so the result stays inside the mapping, which lives as long as self.
        Ok(unsafe { self.base.add(offset) })
    }

    /// Stores one aligned word; other readers of the file see the old or the new one.
    pub(crate) fn store(&self, offset: u64, word: u64) -> io::Result<()> {
        let address = self.address(offset)?.cast::<u64>().as_ptr();
        // SAFETY: in bounds and 8-byte aligned (checked in `address`; a mapping starts on a page), and no
        // reference to this memory exists: all access is through such atomics.
        let cell = unsafe { AtomicU64::from_ptr(address) };
        // Release: what this thread did before (the data that the word speaks of) is not moved behind the store.
        cell.store(word.to_le(), Ordering::Release);
        Ok(())
    }

    /// Starts the write-back of the cache line at `offset`.
    pub(crate) fn write_back(&self, offset: u64) -> io::Result<()> {
        let address = self.address(offset)?;
        cache::write_back(address);
        Ok(())
    }
}

impl Drop for SyncMapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `new` mapped; no pointer into it outlives self.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// Pages of a file that are mapped for reading, and never read by this program itself.
struct Pages {
    base: NonNull<u8>,
    length: usize,
}

impl Pages {
    fn map(file: &File, range: Range<u64>, flags: libc::c_int) -> io::Result<Self> {
        let length = len(range.end - range.start);
        let offset = i64::try_from(range.start).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing; the fd is open.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ,
                flags,
                file.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self { base, length })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `map` mapped; no pointer into it outlives self.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// Whether what is stored through mappings of `file` is durable after a write-back: its filesystem grants synchronous ones, and
/// this machine can write back.
///
/// # Errors
/// A mapping that was refused for a reason of this process says nothing of the file. A DAX file that were taken for one in the
/// page cache would be mapped without `MAP_SYNC`, and what the guest flushes lost.
pub(crate) fn is_dax(file: &File) -> io::Result<bool> {
    const PROBE_BYTES: u64 = 4096;
    Ok(can_write_back() && grants_synchronous(file, PROBE_BYTES)?)
}

/// Asks the kernel by making a mapping of `length` bytes. For reading, since that is all that an image served read-only may do.
fn grants_synchronous(file: &File, length: u64) -> io::Result<bool> {
    match Pages::map(file, 0..length, libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC) {
        Ok(_) => Ok(true),
        // The filesystem, or the device below it, has no synchronous mappings (mmap(2)); kernels before 4.15 have none. Looked at
        // first are the limits of address space, of mappings or of locked memory (ENOMEM, EAGAIN), for example.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => Ok(false),
        Err(e) => Err(e),
    }
}

pub(crate) use cache::{can_write_back, fence};

#[cfg(target_arch = "x86_64")]
mod cache {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    use std::ptr::NonNull;
    use std::sync::OnceLock;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) enum Instruction {
        Clwb,
        ClflushOpt,
        Clflush,
    }

    /// The instructions of this CPU, the cheapest first (Intel SDM vol. 2, CPUID leaf 7, EBX bits 24 and 23).
    pub(super) fn instructions() -> Vec<Instruction> {
        let ebx = if __cpuid(0).eax < 7 {
            0
        } else {
            __cpuid_count(7, 0).ebx
        };
        let has = |bit: u32| ebx & (1 << bit) != 0;
        let all = [
            (has(24), Instruction::Clwb),
            (has(23), Instruction::ClflushOpt),
            (true, Instruction::Clflush),
        ];
        all.into_iter()
            .filter(|(has, _)| *has)
            .map(|(_, i)| i)
            .collect()
    }

    fn cheapest() -> Instruction {
        static CHOICE: OnceLock<Instruction> = OnceLock::new();
        *CHOICE.get_or_init(|| instructions()[0])
    }

    /// Every x86-64 CPU has an instruction for it.
    pub(crate) fn can_write_back() -> bool {
        true
    }

    pub(crate) fn write_back(address: NonNull<u8>) {
        write_back_with(cheapest(), address);
    }

    /// `instruction` is one of [`instructions`].
    pub(super) fn write_back_with(instruction: Instruction, address: NonNull<u8>) {
        let p = address.as_ptr();
        match instruction {
            // SAFETY: the CPU has clwb; the address is mapped; the instruction changes no memory content.
            Instruction::Clwb => unsafe { asm!("clwb [{}]", in(reg) p, options(nostack)) },
            // SAFETY: the CPU has clflushopt; as above.
            Instruction::ClflushOpt => unsafe {
                asm!("clflushopt [{}]", in(reg) p, options(nostack))
            },
            // SAFETY: every x86-64 CPU has clflush; as above.
            Instruction::Clflush => unsafe { asm!("clflush [{}]", in(reg) p, options(nostack)) },
        }
    }

    pub(crate) fn fence() {
        // SAFETY: sfence has no operands and no side effect but ordering.
        unsafe { asm!("sfence", options(nostack)) };
    }
}

#[cfg(target_arch = "aarch64")]
mod cache {
    use std::arch::asm;
    use std::ptr::NonNull;

    /// `HWCAP_DCPOP` (Linux, Documentation/arch/arm64/elf_hwcaps.rst): the CPU has `dc cvap`, and user space may use it.
    const HWCAP_DCPOP: libc::c_ulong = 1 << 16;

    /// Whether a line can be cleaned to the point of persistence. Without `dc cvap` only the kernel can do that.
    pub(crate) fn can_write_back() -> bool {
        // SAFETY: getauxval has no preconditions; it reads a table that the kernel made at the start of the process.
        let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP) };
        capabilities & HWCAP_DCPOP != 0
    }

    /// `dc cvap` (Arm ARM, C5.3): cleans the line to the point of persistence. Ordered after earlier stores to the line.
    pub(crate) fn write_back(address: NonNull<u8>) {
        // By its encoding, because an assembler without Armv8.2 does not know the name.
        // SAFETY: no file counts as DAX unless `can_write_back`; the address is mapped; no memory content changes.
        unsafe { asm!("sys #3, c7, c12, #1, {}", in(reg) address.as_ptr(), options(nostack)) };
    }

    /// Waits for the cleans before it to reach the point of persistence.
    pub(crate) fn fence() {
        // SAFETY: dsb has no operands and no side effect but ordering.
        unsafe { asm!("dsb sy", options(nostack)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod cache {
    use std::ptr::NonNull;

    /// No instruction of this machine is known here.
    pub(crate) fn can_write_back() -> bool {
        false
    }

    /// Never reached: `is_dax` is false on this machine.
    pub(crate) fn write_back(_address: NonNull<u8>) {}

    /// Orders stores before those that follow.
    pub(crate) fn fence() {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every failure was once taken for "in the page cache", so that an image on DAX that was opened at the limit of address
    /// space was served without synchronous mappings.
    #[test]
    fn a_mapping_that_the_process_may_not_make_says_nothing_of_the_file() {
        // In the page cache, wherever the temporary files are.
        let file = rustix::fs::memfd_create("pcow-test", rustix::fs::MemfdFlags::CLOEXEC);
        let file = File::from(file.unwrap());
        assert!(!is_dax(&file).unwrap());
        // More than any address space has.
        let refused = grants_synchronous(&file, 1 << 62).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOMEM));
    }

    /// Also those that this CPU does not take because it has a cheaper one.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn each_instruction_of_this_cpu_writes_back_and_changes_nothing() {
        let instructions = cache::instructions();
        assert_eq!(instructions.last(), Some(&cache::Instruction::Clflush));
        let mut word = 0x5a5a_u64;
        for instruction in instructions {
            word += 1;
            let before = word;
            cache::write_back_with(instruction, NonNull::from(&mut word).cast());
            fence();
            assert_eq!(word, before, "{instruction:?}");
        }
    }
}
