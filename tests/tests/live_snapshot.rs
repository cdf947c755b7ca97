// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshots of memory that 16 threads store to: each is a point in time, before and after a backend that dies in between.
//!
//! Every thread stores its next record at a place of its own, and only then its number in a word that is far away; and the
//! threads pass a token round, so that what one stores is caused by what another one did. A snapshot that holds an effect
//! must hold its cause.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pcow_format::Stored;
use pcow_format::check::check;
use pcow_protocol::control::Client;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::random::Random;
use pcow_tests::scratch::{Scratch, store};
use pcow_tests::waiting::wait_until;
use serde_json::{Value, json};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 512 * MIB;
const CLUSTER: u64 = 64 * KIB;
const THREADS: u64 = 16;
/// Places for records of each thread; a record replaces the one that many before it.
const PLACES: u64 = 64;
/// Where the base has data that nobody stores to.
const QUIET: u64 = 384 * MIB;
const QUIET_CLUSTERS: u64 = 64;
const SNAPSHOTS: usize = 100;
/// How often the backend is killed.
const KILLS: u32 = 24;
/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a thread's record with this number goes: its places are spread over its 16 MiB.
fn place(thread: u64, record: u64) -> u64 {
    thread * 16 * MIB + record % PLACES * 256 * KIB + record % 7 * 8
}

/// Each place of a record holds all seven words that it may be in; only the newest counts.
fn newest(load: &dyn Fn(u64) -> u64, thread: u64, slot: u64) -> u64 {
    (0..7)
        .map(|word| load(thread * 16 * MIB + slot * 256 * KIB + word * 8))
        .max()
        .unwrap()
}

/// Where a thread's number is, in another cluster than all the others.
fn counter(thread: u64) -> u64 {
    320 * MIB + thread * MIB
}

/// Where the token that a thread has passed on is.
fn token(thread: u64) -> u64 {
    352 * MIB + thread * MIB
}

fn base_word(offset: u64) -> u64 {
    offset ^ 0x5eed
}

fn image(scratch: &Scratch) -> PathBuf {
    let base = scratch.image("base", SIZE, CLUSTER);
    {
        let base = pcow_format::Image::open(&base, &[]).unwrap();
        for cluster in 0..QUIET_CLUSTERS {
            let offset = QUIET + cluster * CLUSTER;
            store(&base, offset, &base_word(offset).to_le_bytes());
        }
        // Under the records, too, so that stores copy.
        store(&base, place(0, 1) + 4096, &[1; 8]);
    }
    scratch.clone_of("vm.pcow", &base, CLUSTER)
}

/// The threads of a guest.
struct Guest {
    memory: Memory,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Guest {
    fn start(frontend: &Frontend) -> Self {
        let memory = Memory::new(frontend.region());
        let stop = Arc::new(AtomicBool::new(false));
        let start = |thread| {
            let (memory, stop) = (memory.clone(), Arc::clone(&stop));
            std::thread::spawn(move || work(&memory, thread, &stop))
        };
        Self {
            threads: (0..THREADS).map(start).collect(),
            memory,
            stop,
        }
    }

    fn counters(&self) -> Vec<u64> {
        let load = |thread| self.memory.load(counter(thread));
        (0..THREADS).map(load).collect()
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

fn work(memory: &Memory, thread: u64, stop: &AtomicBool) {
    let mut random = Random::new(thread);
    let mut record = memory.load(counter(thread));
    while !stop.load(Ordering::Relaxed) {
        record += 1;
        memory.store(place(thread, record), record);
        memory.store_release(counter(thread), record);
        pass_token(memory, thread);
        let quiet = QUIET + random.below(QUIET_CLUSTERS) * CLUSTER;
        assert_eq!(
            memory.load(quiet),
            base_word(quiet),
            "what nobody stores to"
        );
        check_own(memory, thread, record);
        std::thread::yield_now();
    }
}

/// The first thread starts a new round when the last one has passed the token on.
fn pass_token(memory: &Memory, thread: u64) {
    let from = (thread + THREADS - 1) % THREADS;
    let seen = memory.load_acquire(token(from));
    let round = if thread == 0 { seen + 1 } else { seen };
    if memory.load(token(thread)) < round {
        memory.store_release(token(thread), round);
    }
}

/// A thread finds what it stored last.
fn check_own(memory: &Memory, thread: u64, record: u64) {
    let oldest = record.saturating_sub(PLACES - 1).max(1);
    for back in [oldest, record] {
        assert_eq!(memory.load(place(thread, back)), back, "thread {thread}");
    }
}

/// Whether a disk is as a point in time of the guest leaves it. Returns the threads' numbers.
fn check_point(load: &dyn Fn(u64) -> u64) -> Vec<u64> {
    for cluster in 0..QUIET_CLUSTERS {
        let offset = QUIET + cluster * CLUSTER;
        assert_eq!(load(offset), base_word(offset));
    }
    let tokens: Vec<_> = (0..THREADS).map(|t| load(token(t))).collect();
    assert!(tokens.is_sorted_by(|a, b| a >= b), "{tokens:?}");
    assert!(tokens[0] <= tokens[15] + 1, "{tokens:?}");
    let check_thread = |thread: u64| {
        let number = load(counter(thread));
        for slot in 0..PLACES {
            // The newest of this place up to `number`, or the one that was under way.
            let back = (number % PLACES + PLACES - slot) % PLACES;
            let expected = number.saturating_sub(back);
            let expected = if expected % PLACES == slot {
                expected
            } else {
                0
            };
            let found = newest(load, thread, slot);
            let under_way = number + 1;
            assert!(
                found == expected || (found == under_way && under_way % PLACES == slot),
                "thread {thread}, number {number}, place {slot}: {found}, not {expected}"
            );
        }
        number
    };
    (0..THREADS).map(check_thread).collect()
}

/// What the snapshot `number` of the image shows.
fn check_snapshot(image: &Path, number: u64) -> Vec<u64> {
    let stored = Stored::open(image, &[]).unwrap();
    let layer = stored.root().snapshot(&number.to_string()).unwrap().layer;
    let chain = stored.chain(layer).unwrap();
    check_point(&|offset| {
        let mut raw = [0; 8];
        chain.read(offset, &mut raw).unwrap();
        u64::from_le_bytes(raw)
    })
}

fn attach(backend: &Backend) -> Frontend {
    Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap()
}

/// While the guest stores on.
fn delete_every_second(client: &mut Client, bounds: &mut Vec<(u64, Vec<u64>, Vec<u64>)>) {
    for (number, _, _) in bounds.iter().step_by(2) {
        let arguments = json!({ "snapshot": number.to_string() });
        let deleted = client.execute("snapshot-delete", arguments, PATIENCE);
        assert_eq!(deleted.unwrap()["number"], *number);
    }
    let mut index = 0;
    bounds.retain(|_| {
        index += 1;
        index % 2 == 0
    });
}

fn take_snapshot(client: &mut Client) -> Value {
    let taken = client.execute("snapshot-create", json!({}), PATIENCE);
    taken.unwrap_or_else(|e| panic!("no snapshot: {e}"))
}

#[test]
fn every_snapshot_of_memory_under_load_is_a_point_in_time() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    let mut backend = Backend::start(&image, &[]);
    let frontend = attach(&backend);
    let guest = Guest::start(&frontend);
    let mut client = Client::connect(&image, None).unwrap().unwrap();
    let mut bounds = Vec::new();
    for _ in 0..SNAPSHOTS {
        let before = guest.counters();
        let taken = take_snapshot(&mut client);
        let after = guest.counters();
        assert_eq!(taken["proof"], "lease");
        bounds.push((taken["snapshot"]["number"].as_u64().unwrap(), before, after));
    }
    delete_every_second(&mut client, &mut bounds);
    wait_until("checksums follow", PATIENCE, || {
        let layers = client.execute("query-layers", json!({}), PATIENCE).unwrap();
        let sealed = |l: &&Value| l["active"] == false;
        let mut layers = layers.as_array().unwrap().iter().filter(sealed);
        layers.all(|l| l["map-checksum"].is_string())
    });
    let last = guest.counters();
    guest.end();
    drop(frontend);
    assert!(backend.terminate().success());
    for (number, before, after) in &bounds {
        let found = check_snapshot(&image, *number);
        let within = |((a, b), c): ((&u64, &u64), &u64)| a <= b && b <= c;
        let all = before.iter().zip(&found).zip(after);
        assert!(
            all.clone().all(within),
            "snapshot {number}: {before:?} {found:?} {after:?}"
        );
    }
    let progress: u64 = last.iter().sum();
    assert!(
        progress > 10 * SNAPSHOTS as u64,
        "the guest has gone on: {progress}"
    );
    let stored = Stored::open(&image, &[]).unwrap();
    assert_eq!(stored.root().snapshots.len(), SNAPSHOTS / 2);
    let sealed = stored.root().layers.iter().filter(|l| l.sealed);
    assert!(
        sealed.clone().all(|l| l.map_checksum.is_some()),
        "checksums have followed"
    );
    let report = check(&stored).unwrap();
    assert!(report.corruptions.is_empty(), "{:?}", report.corruptions);
}

/// Has a snapshot taken in another thread, and kills the backend `delay` after that was asked for.
fn kill_in_snapshot(image: &Path, backend: &mut Backend, delay: Duration) {
    let mut client = Client::connect(image, None).unwrap().unwrap();
    std::thread::scope(|scope| {
        let asked = Instant::now();
        // Killed before the answer, or not.
        scope.spawn(move || client.execute("snapshot-create", json!({}), PATIENCE).ok());
        while asked.elapsed() < delay {
            std::thread::yield_now();
        }
        backend.kill();
    });
}

fn snapshot_count(image: &Path) -> usize {
    let stored = Stored::open(image, &[]).unwrap();
    stored.root().snapshots.len()
}

/// The moments of death are spread over twice the time that a snapshot takes, so that every step meets some.
#[test]
fn a_backend_killed_in_a_snapshot_leaves_the_old_tree_or_the_new_one_and_the_guest_goes_on() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    let mut backend = Backend::start(&image, &[]);
    let frontend = attach(&backend);
    let guest = Guest::start(&frontend);
    let mut client = Client::connect(&image, None).unwrap().unwrap();
    let asked = Instant::now();
    take_snapshot(&mut client);
    let length = asked.elapsed();
    let mut outcomes = [0, 0];
    for kill in 0..KILLS {
        let snapshots = snapshot_count(&image);
        kill_in_snapshot(&image, &mut backend, length * 2 * kill / KILLS);
        let taken = snapshot_count(&image) - snapshots;
        assert!(taken <= 1);
        outcomes[taken] += 1;
        backend = Backend::start(&image, &[]);
        let before = guest.counters();
        wait_until("every thread of the guest goes on", PATIENCE, || {
            let now = guest.counters();
            before.iter().zip(&now).all(|(a, b)| a < b)
        });
    }
    assert!(outcomes.iter().all(|n| *n > 0), "old and new: {outcomes:?}");
    let memory = guest.memory.clone();
    guest.end();
    let last = check_point(&|offset| memory.load(offset));
    drop((memory, frontend));
    assert!(backend.terminate().success());
    let stored = Stored::open(&image, &[]).unwrap();
    let report = check(&stored).unwrap();
    assert!(report.corruptions.is_empty(), "{:?}", report.corruptions);
    let numbers = stored.root().snapshots.iter().map(|s| s.number);
    let mut points: Vec<_> = numbers.map(|n| check_snapshot(&image, n)).collect();
    let disk = pcow_format::Image::open(&image, &[]).unwrap();
    points.push(check_point(&|offset| {
        let mut raw = [0; 8];
        disk.read(offset, &mut raw).unwrap();
        u64::from_le_bytes(raw)
    }));
    assert_eq!(points.last(), Some(&last));
    let not_after = |a: &Vec<u64>, b: &Vec<u64>| a.iter().zip(b).all(|(a, b)| a <= b);
    assert!(points.is_sorted_by(not_after), "{points:?}");
}
