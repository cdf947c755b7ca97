// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The backend flushes by itself: in time, whoever stored, whatever ends, and not in silence if the storage is slow.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use pcow_format::check::check;
use pcow_format::{ErrorKind, Stored};
use pcow_protocol::control::Client;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::program;
use pcow_tests::scratch::Scratch;
use pcow_tests::strace::Strace;
use pcow_tests::waiting::wait_until;
use serde_json::json;

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;
/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);
const MORE_THAN_ANYBODY_WAITS: Duration = Duration::from_secs(3600);

fn connect(socket: &Path) -> Frontend {
    Frontend::connect(socket, &FrontendOptions::default()).unwrap()
}

/// How many clusters are data, and how many are not durable yet.
fn clusters(image: &Path) -> (u64, u64) {
    let report = check(&Stored::open(image, &[]).unwrap()).unwrap();
    (report.data_clusters, report.live_clusters)
}

/// Of many rounds one has to be in time: a slow machine makes no round shorter.
#[test]
fn what_a_guest_wrote_is_durable_within_the_interval() {
    const MOST_ROUNDS: u64 = 50;
    const INTERVAL: Duration = Duration::from_secs(1);
    let s = Scratch::new();
    let rare = s.image("rare", 4 * MIB, CLUSTER);
    let mut never = Backend::start(&rare, &["--flush-interval", "0"]);
    let rare_frontend = connect(never.socket());
    Memory::new(rare_frontend.region()).store(8, 7);
    // They end together, and nobody has flushed.
    never.kill();
    drop(rare_frontend);
    assert_eq!(clusters(&rare), (1, 1), "flushed without being asked");
    let rare_backend = Backend::start(&rare, &["--flush-interval", "86400"]);
    wait_until("the flush of a start", PATIENCE, || {
        clusters(&rare) == (1, 0)
    });
    let rare_frontend = connect(rare_backend.socket());
    Memory::new(rare_frontend.region()).store(CLUSTER, 7);

    let often = s.image("often", 4 * MIB, CLUSTER);
    let backend = Backend::start(&often, &["--flush-interval", "1"]);
    let frontend = connect(backend.socket());
    let memory = Memory::new(frontend.region());
    memory.store(8, 7);
    wait_until("the first flush", PATIENCE, || clusters(&often) == (1, 0));
    // What is stored now is stored since the last flush began: it is as old as can be when the next one ends.
    let mut rounds = (1..=MOST_ROUNDS).map(|round| {
        let stored = Instant::now();
        memory.store(round * CLUSTER, 7);
        wait_until("the next flush", PATIENCE, || {
            clusters(&often) == (round + 1, 0)
        });
        let took = stored.elapsed();
        assert_eq!(clusters(&rare), (2, 1), "flushed before its time");
        took
    });
    // Not by the little that it is noticed late: whoever waits a whole interval between flushes is never below it.
    assert!(rounds.any(|took| took <= INTERVAL * 15 / 16));
}

#[test]
fn what_the_first_frontend_stores_is_durable_within_the_interval() {
    const MOST_ROUNDS: u64 = 20;
    const INTERVAL: Duration = Duration::from_secs(1);
    let s = Scratch::new();
    let mut rounds = (0..MOST_ROUNDS).map(|round| {
        let image = s.image(&format!("image{round}"), 4 * MIB, CLUSTER);
        let backend = Backend::start(&image, &["--flush-interval", "1"]);
        let frontend = connect(backend.socket());
        let stored = Instant::now();
        Memory::new(frontend.region()).store(8, 7);
        wait_until("a flush", PATIENCE, || clusters(&image) == (1, 0));
        stored.elapsed()
    });
    // Not in the second interval, as if it had come too late for the first one. A busy machine may take longer now and then.
    assert!(rounds.any(|took| took <= INTERVAL));
}

#[test]
fn a_flush_that_hangs_is_told_of_while_it_does() {
    let s = Scratch::new();
    let image = s.image("slow", 4 * MIB, CLUSTER);
    let backend = Backend::start(&image, &["--flush-interval", "1"]);
    let storage = Strace::hold_up(backend.pid(), "fdatasync", MORE_THAN_ANYBODY_WAITS);
    let frontend = connect(backend.socket());
    Memory::new(frontend.region()).store(8, 7);
    backend.wait_for_log("flushing is slow: what was stored");
    assert_eq!(clusters(&image), (1, 1), "it has ended");
    // Then the calls that wait are made.
    drop(storage);
    backend.wait_for_log("flushing is in time again");
}

#[test]
fn what_a_virtual_machine_stored_is_flushed_though_it_ends_before_it_is_back() {
    let s = Scratch::new();
    let image = s.image("image", 4 * MIB, CLUSTER);
    let mut first = Backend::start(&image, &["--flush-interval", "0"]);
    let frontend = connect(first.socket());
    Memory::new(frontend.region()).store(8, 7);
    first.kill();
    // It is not found by the frontend, which keeps the image until it ends.
    let elsewhere = Backend::start_at(&s.path("s"), &image, &["--flush-interval", "1"]);
    elsewhere.wait_for_log("waiting for it to come back");
    wait_until("a flush", PATIENCE, || clusters(&image) == (1, 0));
    drop(frontend);
    // Flushes go on: one hangs, and the one after it, which began when the frontend was gone, does not.
    let storage = Strace::hold_up(elsewhere.pid(), "fdatasync", MORE_THAN_ANYBODY_WAITS);
    elsewhere.wait_for_log("flushing is slow");
    drop(storage);
    elsewhere.wait_for_log("flushing is in time again");
}

#[test]
fn a_backend_that_cannot_wait_any_more_flushes_before_it_ends() {
    let s = Scratch::new();
    let image = s.image("image", 4 * MIB, CLUSTER);
    let mut backend = Backend::start(&image, &["--flush-interval", "0"]);
    let frontend = connect(backend.socket());
    Memory::new(frontend.region()).store(8, 7);
    assert_eq!(clusters(&image), (1, 1), "flushed without being asked");
    // Only there: a frontend's thread that cannot wait flushes as well.
    let kernel = Strace::fail_in_thread(backend.pid(), "pcow-backend", "ppoll", "ENOMEM");
    assert_eq!(backend.wait().code(), Some(1));
    kernel.end();
    let log = backend.log().join("\n");
    assert!(log.contains("cannot wait for frontends"), "{log}");
    assert_eq!(clusters(&image), (1, 0));
}

#[test]
fn a_backend_whose_first_flush_fails_ends_if_nobody_has_the_image() {
    let s = Scratch::new();
    let image = s.image("image", 4 * MIB, CLUSTER);
    let ended = Strace::failing("fdatasync", "EIO", &program("pcow-backend"))
        .arg("--socket")
        .arg(s.path("s"))
        .arg("--image")
        .arg(&image)
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&ended.stderr);
    assert!(log.contains("nobody has the image"), "{log}");
    assert_eq!(ended.status.code(), Some(1), "{log}");
    // Nor does the next one begin.
    let stored = Stored::open(&image, &[]).unwrap();
    let refused = stored.refuse_after_failed_flush().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::FlushFailed);
}

#[test]
fn a_first_touch_is_served_while_a_flush_hangs_and_the_layer_tree_waits_for_it() {
    let s = Scratch::new();
    let image = s.image("image", 4 * MIB, CLUSTER);
    let mut pcow_img = Command::new(program("pcow-img"));
    let taken = pcow_img.arg("snapshot").arg(&image).status().unwrap();
    assert!(taken.success());
    let backend = Backend::start(&image, &["--flush-interval", "1"]);
    let frontend = connect(backend.socket());
    let memory = Memory::new(frontend.region());
    memory.store(0, 7);
    let lines = |text| {
        let log = backend.log();
        log.iter().filter(|l| l.contains(text)).count()
    };
    // The storage may have been slow by itself.
    wait_until("flushes in time", PATIENCE, || {
        clusters(&image) == (1, 0) && lines("is slow") == lines("in time again")
    });
    // Not those of others: the new name is written to the medium.
    let storage =
        Strace::hold_up_thread(backend.pid(), "flush", "fdatasync", MORE_THAN_ANYBODY_WAITS);
    let before = lines("is slow");
    memory.store(CLUSTER, 8);
    wait_until("a flush that hangs", PATIENCE, || lines("is slow") > before);
    assert_eq!(clusters(&image), (2, 1), "it has ended");
    let mut client = Client::connect(&image, None).unwrap().unwrap();
    let renaming = std::thread::spawn(move || {
        let names = json!({ "snapshot": "1", "name": "another" });
        client.execute("snapshot-rename", names, PATIENCE)
    });
    wait_until("the new name", PATIENCE, || {
        let root = Stored::open(&image, &[]).unwrap().root().clone();
        root.snapshots[0].name == "another"
    });
    // It needs the image for itself as soon as that is there, and must not wait for it where loads and stores do.
    std::thread::sleep(Duration::from_millis(100));
    assert!(!renaming.is_finished());
    let (served, is_served) = mpsc::channel();
    std::thread::spawn(move || {
        memory.store(2 * CLUSTER, 9);
        served.send(memory.load(2 * CLUSTER)).unwrap();
    });
    let loaded = is_served.recv_timeout(PATIENCE / 2);
    drop(storage);
    assert_eq!(loaded, Ok(9));
    renaming.join().unwrap().unwrap();
}
