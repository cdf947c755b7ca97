// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Backends that die in a snapshot of memory that 16 threads store to.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use pcow_format::check::check;
use pcow_format::{Image, Stored};
use pcow_protocol::control::Client;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::causal::{self, Guest, check_point, check_snapshot};
use pcow_tests::scratch::Scratch;
use pcow_tests::waiting::wait_until;
use serde_json::json;

/// How often the backend is killed.
const KILLS: u32 = 24;
/// How far the moments of death reach, in lengths of a snapshot.
const SPREAD: u32 = 6;
/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

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

/// The moments of death are spread over several times what a snapshot takes, which varies, so that every step meets some.
#[test]
fn a_backend_killed_in_a_snapshot_leaves_the_old_tree_or_the_new_one_and_the_guest_goes_on() {
    let scratch = Scratch::new();
    let image = causal::image(&scratch);
    let mut backend = Backend::start(&image, &[]);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let guest = Guest::start(&frontend);
    let mut client = Client::connect(&image, None).unwrap().unwrap();
    let asked = Instant::now();
    let taken = client.execute("snapshot-create", json!({}), PATIENCE);
    taken.unwrap();
    let length = asked.elapsed();
    let mut outcomes = [0, 0];
    for kill in 0..KILLS {
        let snapshots = snapshot_count(&image);
        kill_in_snapshot(&image, &mut backend, length * SPREAD * kill / KILLS);
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
    let memory = guest.memory();
    guest.end();
    let last = check_point(&|offset| memory.load(offset));
    drop((memory, frontend));
    assert!(backend.terminate().success());
    let stored = Stored::open(&image, &[]).unwrap();
    let report = check(&stored).unwrap();
    assert!(report.corruptions.is_empty(), "{:?}", report.corruptions);
    let numbers = stored.root().snapshots.iter().map(|s| s.number);
    let mut points: Vec<_> = numbers.map(|n| check_snapshot(&image, n)).collect();
    let disk = Image::open(&image, &[]).unwrap();
    points.push(check_point(&|offset| {
        let mut raw = [0; 8];
        disk.read(offset, &mut raw).unwrap();
        u64::from_le_bytes(raw)
    }));
    assert_eq!(points.last(), Some(&last));
    let not_after = |a: &Vec<u64>, b: &Vec<u64>| a.iter().zip(b).all(|(a, b)| a <= b);
    assert!(points.is_sorted_by(not_after), "{points:?}");
}
