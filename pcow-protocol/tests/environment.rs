// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Processes that lock all their memory, or let the kernel merge it, must not lose faults or stores.
//!
//! Both settings are of the whole process, so these tests have a program of their own. Locking needs `CAP_IPC_LOCK` or an
//! unlimited `RLIMIT_MEMLOCK`, and says so if it has neither.
#![allow(clippy::unwrap_used)]

use pcow_protocol::frontend::{Frontend, GuestRegion};
use pcow_protocol::message::{BackendRequest, Status};
use pcow_protocol::uffd::CopyOutcome;
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::system::uname;

#[allow(dead_code)] // shared with the tests of the frontend
#[path = "frontend/backend.rs"]
mod backend;

use backend::{CLUSTER, attach, file, load_fault, map, mappings, range, region, spawn_load};

/// `PR_SET_MEMORY_MERGE` of `linux/prctl.h`: new memory of this process may be merged (as systemd's `MemoryKSM=` does).
/// Older kernels than 6.4 have no such setting that could do harm.
fn merge_memory() {
    // SAFETY: this option takes one integer and touches no memory.
    let result = unsafe { libc::prctl(67, 1, 0, 0, 0) };
    let error = std::io::Error::last_os_error();
    if result != 0 && kernel_version() < [6, 4] {
        println!("Linux before 6.4: processes cannot be made mergeable as a whole");
        return;
    }
    assert!(result == 0, "this test needs a kernel with KSM: {error}");
}

/// The first two numbers of the kernel's release.
fn kernel_version() -> [u32; 2] {
    let uname = uname();
    let mut numbers = uname.release().to_str().unwrap().split(['.', '-']);
    std::array::from_fn(|_| numbers.next().unwrap().parse().unwrap())
}

/// The `VmFlags` of every mapping of the region.
fn flags(region: &GuestRegion) -> Vec<String> {
    let base = region.as_ptr().addr();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    let mut flags = Vec::new();
    for line in smaps.lines() {
        let first = line.split(['-', ' ']).next().unwrap();
        if let Ok(start) = usize::from_str_radix(first, 16) {
            inside = (base..base + region.len()).contains(&start);
        } else if let Some(found) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            flags.push(found.to_string());
        }
    }
    flags
}

#[test]
fn under_mlockall_and_memory_merging_every_underlay_still_traps() {
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).expect("needs CAP_IPC_LOCK");
    merge_memory();
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    traps(&frontend, &mut backend, 0);

    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    assert_eq!(
        backend.ask(&BackendRequest::Unmap(range(0, CLUSTER)), None),
        Status::OK
    );
    traps(&frontend, &mut backend, 0);
    assert_eq!(
        backend.ask(&BackendRequest::Evict(range(0, CLUSTER)), None),
        Status::OK
    );
    traps(&frontend, &mut backend, 0);
    assert_eq!(mappings(frontend.region()), 1);
    evicts_beside_a_locked_mapping(&frontend, &mut backend);

    for flags in flags(frontend.region()) {
        let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
        assert!(
            has("um") && has("uw"),
            "registered for missing pages and write protection: {flags}"
        );
        assert!(
            has("nh") && has("dc") && has("dd"),
            "not huge, not forked, not dumped: {flags}"
        );
        assert!(
            !has("mg") && !has("lo"),
            "neither mergeable nor locked: {flags}"
        );
    }
}

/// What is mapped from a file is locked memory in such a process, and plain `MADV_DONTNEED` refuses that.
fn evicts_beside_a_locked_mapping(frontend: &Frontend, backend: &mut backend::Backend) {
    assert_eq!(backend.ask(&map(CLUSTER, CLUSTER), None), Status::OK);
    assert_eq!(
        backend.ask(&BackendRequest::Evict(range(0, 2 * CLUSTER)), None),
        Status::OK
    );
    traps(frontend, backend, 0);
    assert_eq!(
        backend.ask(&BackendRequest::Unmap(range(CLUSTER, CLUSTER)), None),
        Status::OK
    );
}

/// A load there is a fault, and reads what the backend copies.
fn traps(frontend: &Frontend, backend: &mut backend::Backend, offset: u64) {
    let loading = spawn_load(frontend, offset);
    assert_eq!(backend.fault(), load_fault(offset));
    assert_eq!(backend.copy(offset, &[7; 4096]), CopyOutcome::Done);
    assert_eq!(loading.join().unwrap(), 0x0707_0707_0707_0707);
}
