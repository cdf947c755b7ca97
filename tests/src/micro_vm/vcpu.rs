// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One processor and the program that it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use pcow_protocol::frontend::{Bounces, Frontend};
use rustix::io::Errno;

use super::slots::{Slots, TRANSFER_BYTES};

/// What every processor runs, from address 0 on, with its work in its registers:
///
/// ```text
/// f3 a5   rep movsd       copies ECX words of 4 bytes from ESI to EDI
/// e6 10   out 0x10, al    leaves
/// ```
const PROGRAM: [u8; 4] = [0xf3, 0xa5, 0xe6, DONE_PORT];
const DONE_PORT: u8 = 0x10;
const WORD_BYTES: usize = 4;

/// Bit 1 is always set; bit 9 lets interrupts in.
const INTERRUPTS_ACCEPTED: u64 = 1 << 9 | 1 << 1;
/// The bit of CR0 that takes a processor out of real mode.
const PROTECTED_MODE: u64 = 1;

/// A processor in 32-bit protected mode without paging.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    number: usize,
    bounces: Arc<Bounces>,
    repeated_entries: u64,
    progress: Arc<AtomicU64>,
    // After the descriptor, which keeps the machine in being.
    slots: Arc<Slots>,
}

impl Vcpu {
    pub(super) fn new(
        vm: &VmFd,
        number: usize,
        slots: &Arc<Slots>,
        frontend: &Frontend,
        progress: &Arc<AtomicU64>,
    ) -> Self {
        slots.set_program(&PROGRAM);
        let fd = vm.create_vcpu(number as u64).unwrap();
        set_flat_mode(&fd);
        // All but the first would wait for the message that starts a processor.
        let mp_state = KVM_MP_STATE_RUNNABLE;
        fd.set_mp_state(kvm_mp_state { mp_state }).unwrap();
        Self {
            fd,
            number,
            bounces: Arc::clone(frontend.bounces()),
            repeated_entries: 0,
            progress: Arc::clone(progress),
            slots: Arc::clone(slots),
        }
    }

    /// Which processor of the machine this is, from 0 on.
    pub fn number(&self) -> usize {
        self.number
    }

    /// The size of the region.
    pub fn region_bytes(&self) -> u64 {
        self.slots.region_bytes()
    }

    /// Loads `bytes` from `offset` of the region.
    ///
    /// # Panics
    /// If these are not whole words, are too many or outside, or if KVM fails.
    pub fn load(&mut self, offset: u64, bytes: &mut [u8]) {
        let from = self.slots.region_address(offset, bytes.len());
        self.copy(from, Slots::buffer_address(self.number), bytes.len());
        self.slots.buffer(self.number).copy_to(bytes);
    }

    /// Stores `bytes` at `offset` of the region.
    ///
    /// # Panics
    /// As [`Vcpu::load`].
    pub fn store(&mut self, offset: u64, bytes: &[u8]) {
        let to = self.slots.region_address(offset, bytes.len());
        self.slots.buffer(self.number).copy_from(bytes);
        self.copy(Slots::buffer_address(self.number), to, bytes.len());
    }

    fn copy(&mut self, from: u64, to: u64, bytes: usize) {
        assert!(bytes.is_multiple_of(WORD_BYTES) && bytes <= TRANSFER_BYTES);
        let work = kvm_regs {
            rip: 0,
            rsi: from,
            rdi: to,
            rcx: (bytes / WORD_BYTES) as u64,
            rflags: INTERRUPTS_ACCEPTED,
            ..Default::default()
        };
        self.fd.set_regs(&work).unwrap();
        self.run_to_the_end();
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Enters the guest until it is done. KVM does not tell where a store failed, so an entry that fails is repeated if,
    /// and only if, a bounce had a page write-protected since it began.
    fn run_to_the_end(&mut self) {
        loop {
            let sequence = self.bounces.sequence();
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(DONE_PORT) => return,
                Ok(exit) => panic!("processor {} left with {exit:?}", self.number),
                Err(error)
                    if error.errno() == Errno::FAULT.raw_os_error()
                        && self.bounces.happened_since(sequence) =>
                {
                    self.repeated_entries += 1;
                }
                Err(error) => panic!("processor {} cannot run: {error}", self.number),
            }
        }
    }

    pub(super) fn repeated_entries(&self) -> u64 {
        self.repeated_entries
    }
}

/// Segments that reach everywhere, in protected mode. Addresses are the memory's own.
fn set_flat_mode(fd: &VcpuFd) {
    let segment = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    // Types: executed and read; read and written; each already accessed.
    let (code, data) = (segment(8, 11), segment(16, 3));
    let mut registers = fd.get_sregs().unwrap();
    registers.cs = code;
    registers.ds = data;
    registers.es = data;
    registers.fs = data;
    registers.gs = data;
    registers.ss = data;
    registers.cr0 |= PROTECTED_MODE;
    fd.set_sregs(&registers).unwrap();
}
