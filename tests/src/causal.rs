// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! 16 threads whose stores cause each other, and the check that a disk is a point in time of theirs.
//!
//! Every thread stores its next record at a place of its own, and only then its number in a word that is far away; and the
//! threads pass a token round, so that what one stores is caused by what another one did. A snapshot that holds an effect
//! must hold its cause.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use pcow_format::{Image, Stored};
use pcow_protocol::frontend::Frontend;

use crate::memory::Memory;
use crate::random::Random;
use crate::scratch::{Scratch, store};

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

/// An image on a base, with data in both.
pub fn image(scratch: &Scratch) -> PathBuf {
    let base = scratch.image("base", SIZE, CLUSTER);
    {
        let base = Image::open(&base, &[]).unwrap();
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
#[derive(Debug)]
pub struct Guest {
    memory: Memory,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Guest {
    /// Starts them.
    pub fn start(frontend: &Frontend) -> Self {
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

    /// The threads' numbers now.
    pub fn counters(&self) -> Vec<u64> {
        let load = |thread| self.memory.load(counter(thread));
        (0..THREADS).map(load).collect()
    }

    /// The guest's memory.
    pub fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Ends them.
    ///
    /// # Panics
    /// If one has found what it did not store.
    pub fn end(mut self) {
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
pub fn check_point(load: &dyn Fn(u64) -> u64) -> Vec<u64> {
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
pub fn check_snapshot(image: &Path, number: u64) -> Vec<u64> {
    let stored = Stored::open(image, &[]).unwrap();
    let layer = stored.root().snapshot(&number.to_string()).unwrap().layer;
    let chain = stored.chain(layer).unwrap();
    check_point(&|offset| {
        let mut raw = [0; 8];
        chain.read(offset, &mut raw).unwrap();
        u64::from_le_bytes(raw)
    })
}
