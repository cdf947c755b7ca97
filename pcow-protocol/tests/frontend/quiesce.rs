// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! RESET of the whole region, and I/O that is held for it.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pcow_protocol::frontend::{Bounces, Frontend};
use pcow_protocol::message::{BackendRequest, Status};
use pcow_protocol::wire::{Quiesce, Resume};

use crate::backend::{
    Backend, CLUSTER, attach, file, load_fault, map, mappings, region, spawn_load, store,
    store_fault, wait_until, writable,
};

const NOW: u32 = 0;
const LONG: u32 = 60_000;

fn quiesce(id: u64, deadline_ms: u32) -> BackendRequest {
    BackendRequest::Quiesce(Quiesce {
        id,
        deadline_ms,
        reserved: 0,
    })
}

fn resume(id: u64) -> BackendRequest {
    BackendRequest::Resume(Resume { id, layer: [8; 16] })
}

fn attached() -> (Frontend, Backend) {
    attach(region(0), &[])
}

/// I/O in a thread of its own, which ends at once if nothing holds it.
fn spawn_io(bounces: &Arc<Bounces>) -> thread::JoinHandle<()> {
    let bounces = Arc::clone(bounces);
    thread::spawn(move || drop(bounces.begin_io()))
}

fn assert_held(io: &thread::JoinHandle<()>) {
    // Long enough for a thread that is not held to end on any machine that is not stopped altogether; one that is held
    // never ends by itself, so that this cannot fail by chance.
    thread::sleep(Duration::from_millis(50));
    assert!(!io.is_finished());
}

#[test]
fn a_reset_makes_everything_trap_and_wakes_and_frees_all_slots() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data, &data]);
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    store(frontend.region(), 0, 5);
    assert_eq!(
        backend.ask(&BackendRequest::Bounce(page(CLUSTER)), None),
        Status::OK
    );
    let waiting = spawn_load(&frontend, 2 * CLUSTER);
    assert_eq!(backend.fault(), load_fault(2 * CLUSTER));
    assert_eq!(backend.ask(&BackendRequest::Reset, None), Status::OK);
    assert_eq!(backend.remaps, 1, "in one move");
    assert_eq!(mappings(frontend.region()), 1, "moments have ended");
    assert_eq!(backend.fault(), load_fault(2 * CLUSTER), "it was woken");
    for slot in [0, 1] {
        assert_eq!(backend.register(writable(slot), &data), Status::OK);
    }
    let loading = spawn_load(&frontend, 0);
    assert_eq!(backend.fault(), load_fault(0));
    assert_eq!(backend.ask(&map(0, 4 * CLUSTER), None), Status::OK);
    assert_eq!((loading.join().unwrap(), waiting.join().unwrap()), (5, 0));
}

fn page(offset: u64) -> pcow_protocol::message::RegionRange {
    crate::backend::range(offset, crate::backend::PAGE)
}

#[test]
fn a_reset_beside_io_is_carried_out_and_says_so() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    let io = frontend.bounces().begin_io();
    let busy = Status::from_errno(libc::EBUSY);
    assert_eq!(backend.ask(&BackendRequest::Reset, None), busy);
    assert_eq!(mappings(frontend.region()), 1);
    assert_eq!(backend.register(writable(0), &data), Status::OK);
    drop(io);
}

#[test]
fn io_under_way_is_waited_for_and_new_io_is_held_until_resume() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    let under_way = frontend.bounces().begin_io();
    assert_eq!(backend.ask(&quiesce(1, LONG), None), Status::OK);
    let held = spawn_io(frontend.bounces());
    // The mapping thread does not wait for I/O, which may wait for it.
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    backend.assert_no_message();
    drop(under_way);
    let quiesced = backend.quiesced();
    assert_eq!((quiesced.id, quiesced.error), (1, 0));
    assert_held(&held);
    assert_eq!(backend.ask(&BackendRequest::Reset, None), Status::OK);
    assert_held(&held);
    assert_eq!(backend.ask(&resume(1), None), Status::OK);
    held.join().unwrap();
}

#[test]
fn io_that_does_not_end_in_time_leaves_nothing_held() {
    let (frontend, mut backend) = attached();
    let under_way = frontend.bounces().begin_io();
    assert_eq!(backend.ask(&quiesce(1, NOW), None), Status::OK);
    let quiesced = backend.quiesced();
    assert_eq!(quiesced.error, libc::ETIMEDOUT.unsigned_abs());
    spawn_io(frontend.bounces()).join().unwrap();
    drop(under_way);
    // The next one is begun with a greater number.
    wait_until("the thread of the first has ended", || {
        backend.ask(&quiesce(next_id(), LONG), None) == Status::OK
    });
    assert_eq!(backend.quiesced().error, 0);
}

/// Numbers that grow.
fn next_id() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(100);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[test]
fn a_second_quiesce_is_refused_and_an_old_id_ends_nothing() {
    let (frontend, mut backend) = attached();
    assert_eq!(backend.ask(&quiesce(3, LONG), None), Status::OK);
    assert_eq!(backend.quiesced().id, 3);
    let busy = Status::from_errno(libc::EBUSY);
    assert_eq!(backend.ask(&quiesce(4, LONG), None), busy);
    for old in [BackendRequest::Cancel(2), resume(4)] {
        assert_eq!(backend.ask(&old, None), Status::OK);
    }
    let held = spawn_io(frontend.bounces());
    assert_held(&held);
    assert_eq!(backend.ask(&BackendRequest::Cancel(3), None), Status::OK);
    held.join().unwrap();
}

#[test]
fn a_cancel_while_io_ends_is_followed_by_no_answer() {
    let (frontend, mut backend) = attached();
    let under_way = frontend.bounces().begin_io();
    assert_eq!(backend.ask(&quiesce(1, LONG), None), Status::OK);
    assert_eq!(backend.ask(&BackendRequest::Cancel(1), None), Status::OK);
    spawn_io(frontend.bounces()).join().unwrap();
    drop(under_way);
    wait_until("the thread of the first has ended", || {
        backend.ask(&quiesce(next_id(), LONG), None) == Status::OK
    });
    assert!(backend.quiesced().id >= 100, "not of the first");
}

#[test]
fn the_end_of_the_session_lets_io_go_on() {
    let (frontend, mut backend) = attached();
    assert_eq!(backend.ask(&quiesce(1, LONG), None), Status::OK);
    assert_eq!(backend.quiesced().error, 0);
    let held = spawn_io(frontend.bounces());
    assert_held(&held);
    drop(backend);
    held.join().unwrap();
}

#[test]
fn a_store_waits_for_the_trap_and_not_for_the_quiesce() {
    let data = file();
    let (frontend, mut backend) = attach(region(0), &[&data]);
    assert_eq!(backend.ask(&quiesce(1, LONG), None), Status::OK);
    assert_eq!(backend.quiesced().error, 0);
    let storing = crate::backend::spawn_store(&frontend, 0, 1);
    assert_eq!(backend.fault(), store_fault(0));
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    storing.join().unwrap();
}
