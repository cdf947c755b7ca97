// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Moments in which a page cannot be stored to, and who notices them.

use std::os::unix::fs::FileExt;

use pcow_protocol::frontend::{Frontend, repeat_stores_in_bounces};
use pcow_protocol::message::{BackendRequest, Status};
use pcow_protocol::uffd::CopyOutcome;
use pcow_protocol::wire::REGION_READ_ONLY;
use rustix::io::Errno;

use crate::backend::{
    Backend, CLUSTER, Fault, PAGE, attach, file, load, map, mappings, range, region, spawn_store,
    wait_until,
};

const OLD: u64 = 0x0101_0101_0101_0101;

fn bounce(offset: u64) -> BackendRequest {
    BackendRequest::Bounce(range(offset, PAGE))
}

fn end(offset: u64) -> BackendRequest {
    BackendRequest::BounceEnd(range(offset, PAGE))
}

/// Lets the kernel store into the region as a device's system call would: read(2) from /dev/zero.
fn kernel_stores(frontend: &Frontend, offset: u64) -> Result<usize, Errno> {
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    let offset = usize::try_from(offset).unwrap();
    let slice = frontend.region().volatile_slice();
    let slice = slice.subslice(offset, 8).unwrap();
    let guard = slice.ptr_guard_mut();
    // SAFETY: eight bytes inside the region, which lives as long as `frontend`, and to which there is no reference.
    let bytes = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), 8) };
    rustix::io::read(&zeros, bytes)
}

/// A region with a read copy of its first two pages.
fn with_read_copy() -> (std::fs::File, Frontend, Backend) {
    let data = file();
    let (frontend, backend) = attach(region(0), &[&data]);
    assert_eq!(backend.copy(0, &[1; 8192]), CopyOutcome::Done);
    (data, frontend, backend)
}

#[test]
fn a_system_call_that_stores_in_a_moment_fails_and_the_moment_is_known() {
    let (_data, frontend, mut backend) = with_read_copy();
    let before = frontend.bounces().sequence();
    assert!(!frontend.bounces().happened_since(before));
    assert_eq!(backend.ask(&bounce(0), None), Status::OK);
    // The moment may be over by now: it is known all the same.
    assert!(frontend.bounces().happened_since(before));
    assert_eq!(backend.ask(&end(0), None), Status::OK);
    assert!(frontend.bounces().happened_since(before));
    let after = frontend.bounces().sequence();
    assert!(!frontend.bounces().happened_since(after));
    assert_eq!(frontend.mapping_counts().bounces, 1);

    // One of many moments is open long enough for a system call to meet it.
    wait_until("a system call fails", || {
        assert_eq!(backend.ask(&bounce(0), None), Status::OK);
        kernel_stores(&frontend, 8) == Err(Errno::FAULT)
    });
    assert_eq!(backend.ask(&end(0), None), Status::OK);
    assert_eq!(mappings(frontend.region()), 1, "the pieces are one again");
    assert_eq!(load(frontend.region(), 8), OLD);
}

#[test]
fn a_store_in_a_moment_is_repeated_and_then_a_fault() {
    repeat_stores_in_bounces().unwrap();
    repeat_stores_in_bounces().unwrap();
    let (data, frontend, mut backend) = with_read_copy();
    assert_eq!(backend.ask(&bounce(0), None), Status::OK);
    let storing = spawn_store(&frontend, 16, 5);
    let expected = Fault {
        offset: 0,
        write: true,
        wp: true,
    };
    // Nobody ends the moment: the frontend does.
    assert_eq!(backend.fault(), expected);
    data.write_all_at(&[1; 65536], 0).unwrap();
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    storing.join().unwrap();
    assert_eq!(
        (load(frontend.region(), 16), load(frontend.region(), 24)),
        (5, OLD)
    );
}

#[test]
fn device_io_ends_moments_and_keeps_them_away() {
    let (data, frontend, mut backend) = with_read_copy();
    data.write_all_at(&[1; 65536], 0).unwrap();
    assert_eq!(backend.ask(&map(CLUSTER, CLUSTER), None), Status::OK);
    assert_eq!(backend.ask(&bounce(0), None), Status::OK);
    assert_eq!(backend.ask(&bounce(CLUSTER), None), Status::OK);
    let io = frontend.bounces().begin_io();
    assert_eq!(kernel_stores(&frontend, CLUSTER), Ok(8));
    assert_eq!(backend.ask(&bounce(0), None).errno(), Some(libc::EBUSY));
    drop(io);
    assert_eq!(backend.ask(&bounce(0), None), Status::OK);
    let counts = frontend.mapping_counts();
    assert_eq!((counts.bounces, counts.refused_bounces), (3, 1));
}

#[test]
fn an_unmap_beside_device_io_is_done_and_says_so() {
    let (data, frontend, mut backend) = with_read_copy();
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    let io = frontend.bounces().begin_io();
    let unmap = BackendRequest::Unmap(range(0, CLUSTER));
    assert_eq!(backend.ask(&unmap, None).errno(), Some(libc::EBUSY));
    drop(io);
    let storing = spawn_store(&frontend, 0, 3);
    assert_eq!(backend.fault().offset, 0, "it is trap again");
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    storing.join().unwrap();
    assert_eq!(backend.ask(&unmap, None), Status::OK);
    drop(data);
}

#[test]
fn map_and_unmap_end_the_moments_inside_of_them() {
    let (data, frontend, mut backend) = with_read_copy();
    data.write_all_at(&[1; 65536], 0).unwrap();
    for _ in 0..50 {
        assert_eq!(backend.ask(&bounce(0), None), Status::OK);
        assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
        assert_eq!(kernel_stores(&frontend, 0), Ok(8));
        assert_eq!(backend.ask(&bounce(PAGE), None), Status::OK);
        let unmap = BackendRequest::Unmap(range(0, CLUSTER));
        assert_eq!(backend.ask(&unmap, None), Status::OK);
        assert_eq!(backend.ask(&end(PAGE), None), Status::OK, "nothing to do");
        assert_eq!(mappings(frontend.region()), 1);
    }
}

#[test]
fn more_moments_than_there_may_be_are_refused_until_others_are_over() {
    let (_data, frontend, mut backend) = with_read_copy();
    let mut refused = None;
    wait_until("a moment is refused", || {
        for page in 0..65 {
            backend.send(&bounce(page * PAGE), None);
        }
        let answers: Vec<Status> = (0..65).map(|_| backend.answer()).collect();
        refused = answers.iter().find_map(|status| status.errno());
        refused.is_some()
    });
    assert_eq!(refused, Some(libc::EBUSY));
    wait_until("the frontend ends them", || {
        mappings(frontend.region()) == 1
    });
    assert_eq!(backend.ask(&bounce(0), None), Status::OK);
}

#[test]
fn moments_end_with_the_session() {
    let (_data, frontend, mut backend) = with_read_copy();
    assert_eq!(backend.ask(&bounce(0), None), Status::OK);
    drop(backend);
    wait_until("the frontend ends it", || mappings(frontend.region()) == 1);
}

#[test]
fn a_bounce_in_a_read_only_region_ends_the_session() {
    let (frontend, mut backend) = attach(region(REGION_READ_ONLY), &[]);
    assert_eq!(backend.ask(&bounce(0), None).errno(), Some(libc::EINVAL));
    assert!(frontend.wait_detached(crate::backend::PATIENCE));
}
