// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What touches of the region see, request by request.

use std::os::unix::fs::FileExt;
use std::thread;

use pcow_protocol::frontend::LinkStatus;
use pcow_protocol::message::{BackendRequest, Map, Status};
use pcow_protocol::uffd::CopyOutcome;
use pcow_protocol::wire::{REGION_READ_ONLY, REGISTER_SYNC, REGISTER_WRITABLE, Register};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::backend::{
    CLUSTER, Fault, PAGE, REGION_SIZE, attach, file, load, load_fault, map, mappings, range,
    region, spawn_load, spawn_store, store, store_fault, wait_until, writable,
};

fn word(file: &std::fs::File, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_ne_bytes(bytes)
}

#[test]
fn a_store_waits_for_map_and_lands_in_the_file() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    let storing = spawn_store(&frontend, CLUSTER + 8, 0x1122);
    assert_eq!(backend.fault(), store_fault(CLUSTER));
    backend
        .outbox
        .send(&map(CLUSTER, CLUSTER), None, None)
        .unwrap();
    storing.join().unwrap();
    assert_eq!(word(&data, CLUSTER + 8), 0x1122);

    store(frontend.region(), 2 * CLUSTER - 8, 0x3344);
    assert_eq!(word(&data, 2 * CLUSTER - 8), 0x3344);
    backend.assert_quiet();
    assert_eq!(frontend.mapping_counts().maps, 1);
}

#[test]
fn a_read_copy_is_read_without_a_fault_and_a_store_into_it_is_a_wp_fault() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    let loading = spawn_load(&frontend, 16);
    assert_eq!(backend.fault(), load_fault(0));
    let base = vec![0xab; CLUSTER.try_into().unwrap()];
    assert_eq!(backend.copy(0, &base), CopyOutcome::Done);
    assert_eq!(loading.join().unwrap(), 0xabab_abab_abab_abab);
    assert_eq!(load(frontend.region(), CLUSTER - 8), 0xabab_abab_abab_abab);
    backend.assert_quiet();

    let storing = spawn_store(&frontend, PAGE, 5);
    assert_eq!(
        backend.fault(),
        Fault {
            offset: PAGE,
            write: true,
            wp: true
        }
    );
    data.write_all_at(&base, 0).unwrap();
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    storing.join().unwrap();
    assert_eq!(word(&data, PAGE), 5);
    assert_eq!(word(&data, PAGE + 8), 0xabab_abab_abab_abab);
}

#[test]
fn evict_drops_read_copies_and_harms_no_mapping() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    assert_eq!(backend.copy(0, &[1; 4096]), CopyOutcome::Done);
    assert_eq!(backend.ask(&map(PAGE, PAGE), None), Status::OK);
    store(frontend.region(), PAGE, 77);
    assert_eq!(load(frontend.region(), 0), 0x0101_0101_0101_0101);

    assert_eq!(
        backend.ask(&BackendRequest::Evict(range(0, 2 * PAGE)), None),
        Status::OK
    );
    assert_eq!(load(frontend.region(), PAGE), 77);
    let loading = spawn_load(&frontend, 0);
    assert_eq!(backend.fault(), load_fault(0));
    assert_eq!(backend.copy(0, &[2; 4096]), CopyOutcome::Done);
    assert_eq!(loading.join().unwrap(), 0x0202_0202_0202_0202);
    assert_eq!(frontend.mapping_counts().evicts, 1);
}

#[test]
fn unmap_keeps_the_bytes_in_the_file_and_traps_again() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    store(frontend.region(), 24, 99);
    assert_eq!(
        backend.ask(&BackendRequest::Unmap(range(0, CLUSTER)), None),
        Status::OK
    );
    assert_eq!(backend.remaps, 1);
    assert_eq!(word(&data, 24), 99);

    let loading = spawn_load(&frontend, 24);
    assert_eq!(backend.fault(), load_fault(0));
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    assert_eq!(loading.join().unwrap(), 99);
    assert_eq!(frontend.mapping_counts().unmaps, 1);
}

#[test]
fn unmap_gives_the_mappings_back() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    assert_eq!(mappings(frontend.region()), 1);
    for offset in (0..REGION_SIZE).step_by(131_072) {
        assert_eq!(backend.ask(&map(offset, CLUSTER), None), Status::OK);
        store(frontend.region(), offset, offset);
    }
    assert_eq!(mappings(frontend.region()), 64);
    for offset in (0..REGION_SIZE).step_by(131_072) {
        let unmap = BackendRequest::Unmap(range(offset, CLUSTER));
        assert_eq!(backend.ask(&unmap, None), Status::OK);
    }
    assert_eq!(mappings(frontend.region()), 1);
    assert_eq!(backend.remaps, 32);
}

#[test]
fn unmap_gives_the_mappings_back_beside_read_copies() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    assert_eq!(backend.copy(CLUSTER, &[1; 4096]), CopyOutcome::Done);
    for offset in (0..REGION_SIZE).step_by(131_072) {
        assert_eq!(backend.ask(&map(offset, CLUSTER), None), Status::OK);
    }
    for offset in (0..REGION_SIZE).step_by(131_072) {
        let unmap = BackendRequest::Unmap(range(offset, CLUSTER));
        assert_eq!(backend.ask(&unmap, None), Status::OK);
    }
    assert_eq!(mappings(frontend.region()), 1);
}

/// Pieces of trap that got read copies while they stood between mappings have histories of their own, and the kernel
/// does not merge them. An UNMAP that takes them in makes one fresh piece.
#[test]
fn an_unmap_up_to_the_next_mappings_leaves_one_trap_whatever_was_read_there() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    for offset in (0..REGION_SIZE).step_by(131_072) {
        assert_eq!(backend.ask(&map(offset, CLUSTER), None), Status::OK);
    }
    for offset in (CLUSTER..REGION_SIZE).step_by(131_072) {
        assert_eq!(backend.copy(offset, &[1; 4096]), CopyOutcome::Done);
    }
    assert_eq!(mappings(frontend.region()), 64);
    let inner = BackendRequest::Unmap(range(CLUSTER, 61 * CLUSTER));
    assert_eq!(backend.ask(&inner, None), Status::OK);
    assert_eq!(mappings(frontend.region()), 4); // mapped, trap, mapped, trap
    let whole = BackendRequest::Unmap(range(0, REGION_SIZE));
    assert_eq!(backend.ask(&whole, None), Status::OK);
    assert_eq!(mappings(frontend.region()), 1);
}

#[test]
fn an_inaccessible_page_stands_on_either_side_of_the_region() {
    let (frontend, _backend) = attach(region(0), &[]);
    let start = frontend.region().as_ptr().addr();
    let end = start + frontend.region().len();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let inaccessible = |edge: &dyn Fn(&str, &str) -> bool| {
        maps.lines().any(|line| {
            let (range, rest) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            edge(start, end) && rest.starts_with("---p")
        })
    };
    assert!(
        inaccessible(&|_, to| to == format!("{start:x}")),
        "before {start:x} in\n{maps}"
    );
    assert!(
        inaccessible(&|from, _| from == format!("{end:x}")),
        "after {end:x} in\n{maps}"
    );
}

#[test]
fn neighbours_in_the_file_are_one_mapping() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    for offset in (0..REGION_SIZE).step_by(65_536) {
        assert_eq!(backend.ask(&map(offset, CLUSTER), None), Status::OK);
    }
    assert_eq!(mappings(frontend.region()), 1);
}

#[test]
fn unmap_wakes_who_waits_there() {
    let (frontend, mut backend) = attach(region(0), &[]);
    let loading = spawn_load(&frontend, 0);
    assert_eq!(backend.fault(), load_fault(0));
    assert_eq!(
        backend.ask(&BackendRequest::Unmap(range(0, CLUSTER)), None),
        Status::OK
    );
    assert_eq!(backend.fault(), load_fault(0));
    assert_eq!(backend.copy(0, &[1; 4096]), CopyOutcome::Done);
    assert_eq!(loading.join().unwrap(), 0x0101_0101_0101_0101);
}

/// A file that can be mapped writable now, and not any more after it was sealed.
fn sealable_file() -> std::fs::File {
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let file = std::fs::File::from(memfd_create("pcow-test", flags).unwrap());
    file.set_len(REGION_SIZE).unwrap();
    file
}

#[test]
fn a_map_that_fails_leaves_a_trap_and_neither_a_hole_nor_what_was_there() {
    let (data, sealed) = (file(), sealable_file());
    let (frontend, mut backend) = attach(region(0), &[&data, &sealed]);
    assert_eq!(backend.ask(&map(CLUSTER, CLUSTER), None), Status::OK);
    store(frontend.region(), CLUSTER, 1);
    // The scratch test has passed; now writable mappings become impossible, which some kernels find out too late.
    fcntl_add_seals(&sealed, SealFlags::FUTURE_WRITE).unwrap();
    let range = range(CLUSTER, CLUSTER);
    let map = Map {
        slot: 1,
        file_offset: CLUSTER,
        range,
        writable: true,
    };
    assert_eq!(
        backend.ask(&BackendRequest::Map(map), None).errno(),
        Some(libc::EPERM)
    );

    assert_eq!(mappings(frontend.region()), 1);
    let loading = spawn_load(&frontend, CLUSTER);
    assert_eq!(backend.fault(), load_fault(CLUSTER));
    assert_eq!(backend.copy(CLUSTER, &[3; 4096]), CopyOutcome::Done);
    assert_eq!(loading.join().unwrap(), 0x0303_0303_0303_0303);
    assert_eq!(frontend.status(), LinkStatus::Attached);
}

#[test]
fn a_file_that_cannot_be_mapped_so_is_refused_when_it_is_registered() {
    let (frontend, mut backend) = attach(region(0), &[]);
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(REGION_SIZE).unwrap();
    let read_only = std::fs::File::open(named.path()).unwrap();
    assert_eq!(
        backend.register(writable(0), &read_only).errno(),
        Some(libc::EACCES)
    );

    let sync = Register {
        slot: 0,
        flags: REGISTER_WRITABLE | REGISTER_SYNC,
        length: REGION_SIZE,
    };
    // The folder of temporary files may be on persistent memory; this file never is.
    assert_eq!(
        backend.register(sync, &sealable_file()).errno(),
        Some(libc::EOPNOTSUPP)
    );

    assert_eq!(mappings(frontend.region()), 1);
    assert_eq!(backend.register(writable(0), named.as_file()), Status::OK);
    assert_eq!(backend.ask(&map(0, REGION_SIZE), None), Status::OK);
    store(frontend.region(), 0, 1);
    assert_eq!(word(named.as_file(), 0), 1);
}

#[test]
fn slots_are_taken_once_and_forgotten_once_and_their_mappings_stay() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    assert_eq!(
        backend.register(writable(0), &data).errno(),
        Some(libc::EEXIST)
    );
    assert_eq!(backend.ask(&map(0, PAGE), None), Status::OK);
    assert_eq!(backend.ask(&BackendRequest::ForgetFd(0), None), Status::OK);
    assert_eq!(
        backend.ask(&BackendRequest::ForgetFd(0), None).errno(),
        Some(libc::ENOENT)
    );
    store(frontend.region(), 8, 4);
    assert_eq!(word(&data, 8), 4);
    assert_eq!(backend.register(writable(0), &data), Status::OK);
}

#[test]
fn a_read_only_region_takes_read_copies_and_read_only_mappings() {
    let data = file();
    data.write_all_at(&[9; 4096], CLUSTER).unwrap();
    let (frontend, mut backend) = attach(region(REGION_READ_ONLY), &[]);
    assert!(frontend.is_read_only());
    let register = Register {
        slot: 0,
        flags: 0,
        length: REGION_SIZE,
    };
    assert_eq!(backend.register(register, &data), Status::OK);

    let loading = spawn_load(&frontend, 0);
    assert_eq!(backend.fault(), load_fault(0));
    assert_eq!(backend.copy(0, &[4; 4096]), CopyOutcome::Done);
    assert_eq!(loading.join().unwrap(), 0x0404_0404_0404_0404);

    let range = range(CLUSTER, CLUSTER);
    let map = Map {
        slot: 0,
        file_offset: CLUSTER,
        range,
        writable: false,
    };
    assert_eq!(backend.ask(&BackendRequest::Map(map), None), Status::OK);
    assert_eq!(load(frontend.region(), CLUSTER), 0x0909_0909_0909_0909);

    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let base = format!("{:x}-", frontend.region().as_ptr().addr());
    let line = maps.lines().find(|line| line.starts_with(&base)).unwrap();
    assert!(
        line.contains(" rw-p "),
        "a kernel worker that asks for write access to a read-only region is heard: {line}"
    );
}

#[test]
fn a_writable_slot_in_a_read_only_region_ends_the_session() {
    let data = file();
    let (frontend, mut backend) = attach(region(REGION_READ_ONLY), &[]);
    assert_eq!(
        backend.register(writable(0), &data).errno(),
        Some(libc::EINVAL)
    );
    wait_until("the end of the session", || {
        frontend.status() != LinkStatus::Attached
    });
}

#[test]
fn eight_threads_see_what_they_stored_while_pieces_come_and_go() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    let threads: Vec<_> = (0..8u64)
        .map(|thread| {
            let region = std::sync::Arc::clone(frontend.region());
            thread::spawn(move || {
                for round in 1..=200u64 {
                    let offset = (round * 37 + thread * 11) % 64 * CLUSTER + thread * 8;
                    store(&region, offset, round << 8 | thread);
                    assert_eq!(load(&region, offset), round << 8 | thread);
                }
            })
        })
        .collect();
    let mut mapped = 0;
    while !threads.iter().all(std::thread::JoinHandle::is_finished) {
        let Some(fault) = backend.try_fault() else {
            continue;
        };
        let cluster = fault.offset / CLUSTER * CLUSTER;
        assert_eq!(backend.ask(&map(cluster, CLUSTER), None), Status::OK);
        mapped += 1;
        if mapped % 16 == 0 {
            let unmap = BackendRequest::Unmap(range(0, REGION_SIZE));
            assert_eq!(backend.ask(&unmap, None), Status::OK);
        }
    }
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    assert!(mapped >= 64);
}
