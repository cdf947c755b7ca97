// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshots of memory that 16 threads store to: each is a point in time. In a program of its own: a process that starts
//! others lends them its open files for a moment, and a snapshot is refused while somebody has the layer open.
#![allow(missing_docs, clippy::unwrap_used)]

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

const SNAPSHOTS: usize = 100;
/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

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
    let image = causal::image(&scratch);
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
