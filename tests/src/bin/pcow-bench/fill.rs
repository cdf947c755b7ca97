// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many memory mappings a fill of 4 GiB leaves in the frontend.

use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::proc;
use pcow_tests::random::Random;
use pcow_tests::scratch::Scratch;

use crate::CLUSTER;
use crate::place::Place;

const FILL_BYTES: u64 = 4 << 30;

/// Prints a table.
pub fn report(place: &Place) {
    println!(
        "| fill of 4 GiB on {} | mappings at the end | most at any time | UNMAPs |",
        place.filesystem
    );
    println!("|---|---|---|---|");
    let sequential: Vec<u64> = (0..FILL_BYTES / CLUSTER).collect();
    row(place, "sequential", &sequential);
    row(place, "random", &shuffled(sequential));
}

fn shuffled(mut clusters: Vec<u64>) -> Vec<u64> {
    let mut random = Random::new(2);
    for last in (1..clusters.len()).rev() {
        let other = random.below(u64::try_from(last).unwrap() + 1);
        clusters.swap(last, usize::try_from(other).unwrap());
    }
    clusters
}

fn row(place: &Place, name: &str, clusters: &[u64]) {
    let scratch = Scratch::below(&place.dir);
    let image = scratch.image("image", FILL_BYTES, CLUSTER);
    let backend = Backend::start(&image, &[]);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let memory = Memory::new(frontend.region());
    let mut most = 0;
    // In a random fill the number rises and falls again: it is looked at often enough to see where.
    for part in clusters.chunks(clusters.len() / 16) {
        part.iter()
            .for_each(|cluster| memory.store(cluster * CLUSTER, 1));
        most = most.max(proc::mappings(frontend.region()).len());
    }
    let end = proc::mappings(frontend.region()).len();
    let unmaps = frontend.mapping_counts().unmaps;
    println!("| {name} | {end} | {most} | {unmaps} |");
}
