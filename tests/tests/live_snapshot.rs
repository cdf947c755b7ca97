// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshots of memory that 16 threads store to: each is a point in time. In a program of its own: a process that starts
//! others lends them its open files for a moment, and a snapshot is refused while somebody has the layer open.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use pcow_format::Stored;
use pcow_format::check::check;
use pcow_protocol::control::Client;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::causal::{self, Guest, check_snapshot};
use pcow_tests::scratch::Scratch;
use pcow_tests::waiting::wait_until;
use serde_json::{Value, json};

/// Snapshots of a batch. Those of the last one stay.
const BATCH: usize = 100;
/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// How many batches are taken; the snapshots of the long form are in `PCOW_SNAPSHOTS`.
fn batches() -> usize {
    let count = std::env::var("PCOW_SNAPSHOTS");
    count.map_or(1, |count| count.parse::<usize>().unwrap().div_ceil(BATCH))
}

/// A snapshot, with the numbers of the guest's threads before and after it.
struct Bounds {
    number: u64,
    before: Vec<u64>,
    after: Vec<u64>,
}

impl Bounds {
    /// The snapshot is a point in time between the two.
    fn check(&self, image: &Path) {
        let found = check_snapshot(image, self.number);
        let within = |((a, b), c): ((&u64, &u64), &u64)| a <= b && b <= c;
        let mut all = self.before.iter().zip(&found).zip(&self.after);
        let Self {
            number,
            before,
            after,
        } = self;
        assert!(
            all.all(within),
            "snapshot {number}: {before:?} {found:?} {after:?}"
        );
    }
}

struct Operator {
    image: PathBuf,
    client: Client,
}

impl Operator {
    fn take_batch(&mut self, guest: &Guest) -> Vec<Bounds> {
        let take = |_| {
            let before = guest.counters();
            let taken = self.execute("snapshot-create", json!({}));
            assert_eq!(taken["proof"], "lease");
            Bounds {
                number: taken["snapshot"]["number"].as_u64().unwrap(),
                before,
                after: guest.counters(),
            }
        };
        (0..BATCH).map(take).collect()
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let done = self.client.execute(command, arguments, PATIENCE);
        done.unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    /// While the guest stores on. One on which only the active layer lies cannot go.
    fn delete(&mut self, bounds: &Bounds) {
        let arguments = json!({ "snapshot": bounds.number.to_string() });
        let deleted = self.execute("snapshot-delete", arguments);
        assert_eq!(deleted["number"], bounds.number);
    }

    fn delete_every_second(&mut self, bounds: Vec<Bounds>) -> Vec<Bounds> {
        bounds.iter().step_by(2).for_each(|b| self.delete(b));
        bounds.into_iter().skip(1).step_by(2).collect()
    }

    fn wait_for_checksums(&mut self) {
        wait_until("checksums follow", PATIENCE, || {
            let layers = self.execute("query-layers", json!({}));
            let sealed = |l: &&Value| l["active"] == false;
            let mut layers = layers.as_array().unwrap().iter().filter(sealed);
            layers.all(|l| l["map-checksum"].is_string())
        });
    }
}

#[test]
fn every_snapshot_of_memory_under_load_is_a_point_in_time() {
    let scratch = Scratch::new();
    let image = causal::image(&scratch);
    let mut backend = Backend::start(&image, &[]);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let guest = Guest::start(&frontend);
    let mut operator = Operator {
        client: Client::connect(&image, None).unwrap().unwrap(),
        image: image.clone(),
    };
    let mut last: Vec<Bounds> = Vec::new();
    for batch in 1..=batches() {
        let taken = operator.take_batch(&guest);
        last.iter().for_each(|b| operator.delete(b));
        last = operator.delete_every_second(taken);
        // What is sealed can be read meanwhile.
        last.iter().for_each(|b| b.check(&operator.image));
        println!("{} snapshots, each of them a point in time", batch * BATCH);
    }
    operator.wait_for_checksums();
    let progress: u64 = guest.counters().iter().sum();
    guest.end();
    drop(frontend);
    assert!(backend.terminate().success());
    assert!(
        progress > 10 * (BATCH * batches()) as u64,
        "the guest has gone on: {progress}"
    );
    last.iter().for_each(|b| b.check(&image));
    let stored = Stored::open(&image, &[]).unwrap();
    assert_eq!(stored.root().snapshots.len(), BATCH / 2);
    let sealed = stored.root().layers.iter().filter(|l| l.sealed);
    assert!(
        sealed.clone().all(|l| l.map_checksum.is_some()),
        "checksums have followed"
    );
    let report = check(&stored).unwrap();
    assert!(report.corruptions.is_empty(), "{:?}", report.corruptions);
    assert!(report.leaks.is_empty(), "{:?}", report.leaks);
}
