// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual machine under KVM that does nothing but copy between a pcow region and memory of its own: what the loads and
//! stores of its processors raise, without a guest's kernel around them.
//!
//! The interrupt controllers are in the kernel and the processors accept interrupts (although none ever comes). Under these
//! conditions KVM answers a missing page with an *asynchronous page fault*: a kernel thread asks for write access,
//! whatever the guest wanted. Every guest with an operating system runs like this.

mod slots;
mod vcpu;

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT, kvm_enable_cap};
use kvm_ioctls::{Kvm, VmFd};
use pcow_protocol::frontend::Frontend;

use self::slots::Slots;
use crate::proc;

pub use self::slots::TRANSFER_BYTES;
pub use self::vcpu::Vcpu;

/// Where Intel's processors may keep a page of their own (`KVM_SET_TSS_ADDR`).
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Far longer than one copy takes on an emulated machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(120);

/// How KVM asks for a page that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultPath {
    /// A kernel thread asks for write access.
    Asynchronous,
    /// The processor's own thread asks for what the guest wants: a guest that halts stays in the processor, so KVM may not
    /// halt it while it waits for a page (QEMU's `-overcommit cpu-pm=on` without paravirtual page faults).
    Exact,
}

/// A machine whose processors work at the same time.
#[derive(Debug)]
pub struct MicroVm {
    vcpus: Vec<Vcpu>,
    progress: Arc<AtomicU64>,
}

impl MicroVm {
    /// A machine with `processors` processors and the region of `frontend`.
    ///
    /// # Panics
    /// If there is no KVM, or it lacks something.
    pub fn new(frontend: &Frontend, processors: usize, path: FaultPath) -> Self {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        vm.set_tss_address(TSS_ADDRESS).unwrap();
        vm.create_irq_chip().unwrap();
        if path == FaultPath::Exact {
            keep_halts_in_the_guest(&vm);
        }
        let slots = Arc::new(Slots::new(frontend, processors));
        slots.add_to(&vm);
        let progress = Arc::default();
        let vcpu = |number| Vcpu::new(&vm, number, &slots, frontend, &progress);
        // The processors keep the machine in being.
        Self {
            vcpus: (0..processors).map(vcpu).collect(),
            progress,
        }
    }

    /// Has every processor do `work`, each in a thread of its own, and returns the results in the order of the processors.
    ///
    /// # Panics
    /// If `work` does, or if all processors hang.
    pub fn run<T: Send + 'static>(
        &mut self,
        work: impl Fn(&mut Vcpu) -> T + Send + Sync + 'static,
    ) -> Vec<T> {
        let work = Arc::new(work);
        let start = |mut vcpu: Vcpu| {
            let work = Arc::clone(&work);
            let named = Builder::new().name(format!("processor {}", vcpu.number()));
            let thread = named.spawn(move || {
                let result = work(&mut vcpu);
                (vcpu, result)
            });
            thread.unwrap()
        };
        let threads: Vec<_> = self.vcpus.drain(..).map(start).collect();
        self.wait_for(&threads);
        let ended = threads.into_iter().map(JoinHandle::join);
        let ended = ended.map(|end| end.unwrap_or_else(|panic| resume_unwind(panic)));
        let (vcpus, results) = ended.unzip();
        self.vcpus = vcpus;
        results
    }

    /// Waits until all threads have ended, for as long as any of them gets on.
    fn wait_for<T>(&self, threads: &[JoinHandle<T>]) {
        let (mut seen, mut since) = (0, Instant::now());
        while threads.iter().any(|thread| !thread.is_finished()) {
            let copies = self.progress.load(Ordering::Relaxed);
            if copies != seen {
                (seen, since) = (copies, Instant::now());
            }
            assert!(
                since.elapsed() < PATIENCE,
                "no processor has ended a copy for {PATIENCE:?}; this process waits in\n{}",
                proc::waits()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How often a store had to be repeated because it met the moment of a bounce.
    pub fn repeated_entries(&self) -> u64 {
        self.vcpus.iter().map(Vcpu::repeated_entries).sum()
    }
}

fn keep_halts_in_the_guest(vm: &VmFd) {
    let mut capability = kvm_enable_cap {
        cap: KVM_CAP_X86_DISABLE_EXITS,
        ..Default::default()
    };
    capability.args[0] = KVM_X86_DISABLE_EXITS_HLT.into();
    vm.enable_cap(&capability).unwrap();
}
