// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory of the machine.
//!
//! ```text
//! guest address
//! 0            slot 0: the program; from 64 KiB on a buffer of 64 KiB for each processor
//! 0x4000_0000  slot 1: the region of a frontend
//! ```

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use pcow_protocol::frontend::{Frontend, GuestRegion};
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};

/// The most that one copy moves.
pub const TRANSFER_BYTES: usize = 64 << 10;

/// Where the region is.
const REGION_ADDRESS: u64 = 0x4000_0000;
/// Far below the interrupt controllers.
const REGION_LIMIT: u64 = 0xc000_0000;

/// Both slots. Whoever holds a descriptor of the machine holds this for longer.
#[derive(Debug)]
pub(super) struct Slots {
    own: MmapRegion,
    region: Arc<GuestRegion>,
    read_only: bool,
}

impl Slots {
    pub(super) fn new(frontend: &Frontend, processors: usize) -> Self {
        let own = MmapRegion::new((1 + processors) * TRANSFER_BYTES).unwrap();
        Self {
            own,
            region: Arc::clone(frontend.region()),
            read_only: frontend.is_read_only(),
        }
    }

    /// Puts the program at guest address 0.
    pub(super) fn set_program(&self, program: &[u8]) {
        self.own
            .as_volatile_slice()
            .write_slice(program, 0)
            .unwrap();
    }

    pub(super) fn add_to(&self, vm: &VmFd) {
        let own = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: self.own.size() as u64,
            userspace_addr: self.own.as_ptr().addr() as u64,
        };
        let region = kvm_userspace_memory_region {
            slot: 1,
            flags: if self.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: REGION_ADDRESS,
            memory_size: self.region_bytes(),
            userspace_addr: self.region.as_ptr().addr() as u64,
        };
        assert!(own.memory_size <= REGION_ADDRESS);
        assert!(region.memory_size <= REGION_LIMIT - REGION_ADDRESS);
        for slot in [own, region] {
            // SAFETY: the range stays mapped for as long as `self`, which outlives every descriptor of the machine; this
            // process reaches it only through raw pointers and volatile slices, whose races are the guest's.
            unsafe { vm.set_user_memory_region(slot) }.unwrap();
        }
    }

    pub(super) fn region_bytes(&self) -> u64 {
        self.region.len() as u64
    }

    /// The guest's address of `bytes` bytes at `offset` in the region.
    pub(super) fn region_address(&self, offset: u64, bytes: usize) -> u64 {
        let end = offset + bytes as u64;
        assert!(end <= self.region_bytes(), "{offset:#x} is outside");
        REGION_ADDRESS + offset
    }

    /// The buffer of a processor.
    pub(super) fn buffer(&self, number: usize) -> VolatileSlice<'_> {
        let at = (1 + number) * TRANSFER_BYTES;
        self.own.get_slice(at, TRANSFER_BYTES).unwrap()
    }

    /// The guest's address of the buffer of a processor.
    pub(super) fn buffer_address(number: usize) -> u64 {
        ((1 + number) * TRANSFER_BYTES) as u64
    }
}
