// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Backends that die in front of each message and each durable act of a snapshot, and of the deletion of one.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use pcow_format::Stored;
use pcow_format::chain::Chain;
use pcow_format::check::check;
use pcow_format::root::Snapshot;
use pcow_protocol::control::Client;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::scratch::Scratch;
use pcow_tests::strace::{Strace, has_ended};
use pcow_tests::waiting::wait_until;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 64 * MIB;
/// Words that are stored to in this order, far away from each other.
const WORDS: u64 = 8;
const APART: u64 = 5 * MIB;
/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Messages to the frontend and to operators, and whatever changes what is on disk or says who may.
const ACTS: [&str; 17] = [
    "sendmsg",
    "sendto",
    "recvmsg",
    "ioctl",
    "pwrite64",
    "pwritev2",
    "fsync",
    "fdatasync",
    "fallocate",
    "ftruncate",
    "copy_file_range",
    "fcntl",
    "renameat",
    "renameat2",
    "linkat",
    "unlinkat",
    "fchmod",
];
/// More than an operation has of one kind; reached only if it never ends.
const MOST_ACTS: u32 = 200;

/// A guest that stores the same number to one word after the other, and then the next number.
struct Guest {
    memory: Memory,
    /// The last number that was stored everywhere. Not read from the memory, where whoever looks might wait for a backend.
    number: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Guest {
    fn start(frontend: &Frontend) -> Self {
        let memory = Memory::new(frontend.region());
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let (mine, over, number_done) = (memory.clone(), Arc::clone(&stop), Arc::clone(&done));
        let thread = std::thread::spawn(move || {
            let mut number = 0;
            while !over.load(Ordering::Relaxed) {
                number += 1;
                for word in 0..WORDS {
                    assert_eq!(mine.load(word * APART), number - 1, "word {word}");
                    mine.store_release(word * APART, number);
                }
                number_done.store(number, Ordering::Relaxed);
                std::thread::yield_now();
            }
        });
        Self {
            memory,
            number: done,
            stop,
            thread,
        }
    }

    fn number(&self) -> u64 {
        self.number.load(Ordering::Relaxed)
    }

    fn goes_on(&self) {
        let before = self.number();
        wait_until("the guest goes on", PATIENCE, || self.number() > before);
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.memory.load(0)
    }
}

/// A guest on an image whose backend dies now and then.
struct Setting {
    _scratch: Scratch,
    image: PathBuf,
    backend: Backend,
    frontend: Frontend,
    guest: Guest,
}

impl Setting {
    fn new() -> Self {
        let scratch = Scratch::new();
        let image = scratch.image("vm.pcow", SIZE, CLUSTER);
        let backend = Backend::start(&image, &[]);
        let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
        let guest = Guest::start(&frontend);
        guest.goes_on();
        Self {
            _scratch: scratch,
            image,
            backend,
            frontend,
            guest,
        }
    }

    /// The answer, unless the backend dies before.
    fn execute(&self, command: &str, arguments: Value) -> Option<Value> {
        let mut client = Client::connect(&self.image, None).ok().flatten()?;
        client.execute(command, arguments, PATIENCE).ok()
    }

    fn snapshot(&self, name: &str) {
        let taken = self.execute("snapshot-create", json!({ "name": name }));
        assert!(taken.is_some(), "{name}: {:#?}", self.backend.log());
        self.guest.goes_on();
    }

    /// Has `command` carried out by a backend that is killed in front of the `number`th `act` of a thread. Returns whether
    /// it came to that.
    fn killed_at(&mut self, act: &str, number: u32, command: &str, arguments: Value) -> bool {
        let strace = Strace::kill_at(self.backend.pid(), act, number);
        let answered = self.execute(command, arguments).is_some();
        // What it does for the guest afterwards are acts, too.
        let before = self.guest.number();
        let process = self.backend.pid();
        wait_until("the backend dies or the guest goes on", PATIENCE, || {
            has_ended(process) || (answered && self.guest.number() > before)
        });
        strace.end();
        let killed = has_ended(process);
        if killed {
            self.backend.wait();
            self.backend = Backend::start(&self.image, &[]);
            // A snapshot would be refused before; the guest may go on without.
            self.backend.wait_for_log("frontend attached");
            self.guest.goes_on();
        }
        killed
    }

    fn snapshots(&self) -> BTreeMap<String, u64> {
        snapshots(&Stored::open(&self.image, &[]).unwrap())
    }

    /// Ends everything, and looks at what is left.
    fn end(mut self) -> BTreeMap<String, u64> {
        let last = self.guest.end();
        drop(self.frontend);
        assert!(self.backend.terminate().success());
        let stored = Stored::open(&self.image, &[]).unwrap();
        let report = check(&stored).unwrap();
        assert!(report.corruptions.is_empty(), "{:?}", report.corruptions);
        let active = stored.chain(stored.root().active).unwrap();
        assert_eq!(point(&|offset| word_of(&active, offset)), last);
        snapshots(&stored)
    }
}

fn word_of(chain: &Chain, offset: u64) -> u64 {
    let mut raw = [0; 8];
    chain.read(offset, &mut raw).unwrap();
    u64::from_le_bytes(raw)
}

/// The guest's number at the point in time that a disk shows.
fn point(load: &dyn Fn(u64) -> u64) -> u64 {
    let words: Vec<u64> = (0..WORDS).map(|word| load(word * APART)).collect();
    assert!(words.is_sorted_by(|a, b| a >= b), "{words:?}");
    assert!(words[0] <= words[words.len() - 1] + 1, "{words:?}");
    words[0]
}

/// All snapshots, with the points in time that they show.
fn snapshots(image: &Stored) -> BTreeMap<String, u64> {
    let shown = |snapshot: &Snapshot| {
        let chain = image.chain(snapshot.layer).unwrap();
        (
            snapshot.name.clone(),
            point(&|offset| word_of(&chain, offset)),
        )
    };
    image.root().snapshots.iter().map(shown).collect()
}

/// How often a backend was killed in front of each kind of act, and whether what it was at was done all the same.
#[derive(Debug, Default)]
struct Deaths {
    acts: BTreeMap<&'static str, u32>,
    outcomes: [u32; 2],
}

impl Deaths {
    fn note(&mut self, act: &'static str, done: bool) {
        *self.acts.entry(act).or_default() += 1;
        self.outcomes[usize::from(done)] += 1;
    }

    fn tell(&self, operation: &str) {
        let [old, new] = self.outcomes;
        println!(
            "{operation}: {} deaths, {old} before it was done, {new} after: {:?}",
            old + new,
            self.acts
        );
        // The messages of the protocol, what is synced, and what commits.
        assert!(old > 0 && new > 0);
        for act in ["sendto", "fdatasync", "fsync", "renameat", "unlinkat"] {
            assert!(
                self.acts.contains_key(act),
                "{act} is no act of it any more"
            );
        }
    }
}

/// Calls `step` with each act, and with 1, 2, … until it says that there are not so many.
fn at_each_act(mut step: impl FnMut(&'static str, u32) -> bool) {
    for act in ACTS {
        let more = (1..MOST_ACTS).find(|number| !step(act, *number));
        assert!(more.is_some(), "{act}");
    }
}

#[test]
fn a_backend_killed_at_any_act_of_a_snapshot_leaves_the_old_tree_or_the_new_one() {
    let mut setting = Setting::new();
    let mut deaths = Deaths::default();
    let mut count = 0;
    at_each_act(|act, number| {
        let before = setting.snapshots();
        count += 1;
        let name = format!("s{count}");
        let killed = setting.killed_at(act, number, "snapshot-create", json!({ "name": name }));
        let mut after = setting.snapshots();
        let taken = after.remove(&name).is_some();
        assert_eq!(after, before, "no other snapshot is touched");
        if killed {
            deaths.note(act, taken);
        }
        if !taken {
            assert!(killed);
            // As if nothing had happened.
            setting.snapshot(&name);
        }
        killed
    });
    deaths.tell("snapshot");
    let snapshots = setting.end();
    let points: Vec<_> = (1..=count).map(|n| snapshots[&format!("s{n}")]).collect();
    // The guest went on in between.
    assert!(points.is_sorted_by(|a, b| a < b), "{points:?}");
}

#[test]
fn a_backend_killed_at_any_act_of_a_deletion_leaves_all_other_snapshots_as_they_were() {
    let mut setting = Setting::new();
    setting.snapshot("kept");
    let mut deaths = Deaths::default();
    let mut count = 0;
    at_each_act(|act, number| {
        count += 1;
        let name = format!("d{count}");
        setting.snapshot(&name);
        setting.snapshot(&format!("above-{count}"));
        let mut expected = setting.snapshots();
        let order = json!({ "snapshot": name });
        let killed = setting.killed_at(act, number, "snapshot-delete", order.clone());
        let after = setting.snapshots();
        let deleted = !after.contains_key(&name);
        if killed {
            deaths.note(act, deleted);
        }
        if !deleted {
            assert!(killed);
            assert_eq!(after, expected, "nothing has changed");
            let again = setting.execute("snapshot-delete", order);
            assert!(again.is_some(), "{:#?}", setting.backend.log());
        }
        expected.remove(&name);
        assert_eq!(setting.snapshots(), expected);
        killed
    });
    deaths.tell("deletion");
    let left = setting.end();
    assert_eq!(left.len(), count + 1, "{left:?}");
}
