// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loads and stores in a region, as a guest's processor does them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pcow_protocol::frontend::GuestRegion;

/// Aligned 8-byte words of a region; kept alive for as long as this.
#[derive(Debug, Clone)]
pub struct Memory {
    region: Arc<GuestRegion>,
}

impl Memory {
    /// The words of `region`.
    pub fn new(region: &Arc<GuestRegion>) -> Self {
        Self {
            region: Arc::clone(region),
        }
    }

    /// The region.
    pub fn region(&self) -> &GuestRegion {
        &self.region
    }

    /// Loads the word at `offset`; waits for as long as a fault takes.
    ///
    /// # Panics
    /// If `offset` is unaligned or outside of the region.
    pub fn load(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Stores `value` at `offset`; waits for as long as a fault takes.
    ///
    /// # Panics
    /// As [`Memory::load`].
    pub fn store(&self, offset: u64, value: u64) {
        self.word(offset).store(value, Ordering::Relaxed);
    }

    /// As [`Memory::load`]: what the one whose store is seen did before is seen, too.
    ///
    /// # Panics
    /// As [`Memory::load`].
    pub fn load_acquire(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// As [`Memory::store`]: who sees it sees what was done before it.
    ///
    /// # Panics
    /// As [`Memory::load`].
    pub fn store_release(&self, offset: u64, value: u64) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// Touches the word at `offset` as a store does and changes nothing: a processor's compare-and-exchange asks for write
    /// access also where the comparison fails, as it must for all but this one value.
    ///
    /// # Panics
    /// As [`Memory::load`].
    pub fn ask_for_write_access(&self, offset: u64) {
        const NEVER: u64 = 0xdead_0000_0000_0001;
        let result =
            self.word(offset)
                .compare_exchange(NEVER, NEVER, Ordering::Relaxed, Ordering::Relaxed);
        assert!(result.is_err());
    }

    /// Copies `bytes` bytes at `offset` out, a word at a time.
    pub fn read(&self, offset: u64, bytes: u64) -> Vec<u8> {
        (offset..offset + bytes)
            .step_by(8)
            .flat_map(|at| self.load(at).to_le_bytes())
            .collect()
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        let offset = usize::try_from(offset).unwrap();
        assert!(offset + 8 <= self.region.len() && offset.is_multiple_of(8));
        // SAFETY: the assertion keeps the address inside the region, which `self.region` keeps mapped.
        let address = unsafe { self.region.as_ptr().add(offset) };
        // SAFETY: aligned (the region is aligned to 2 MiB, the offset to 8) and valid for as long as `self`, which the
        // result borrows; this process accesses the region through atomics only.
        unsafe { AtomicU64::from_ptr(address.cast()) }
    }
}
