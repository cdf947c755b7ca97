// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The budget of mappings holds over any number of maps, read copies and unmaps.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::atomic::Ordering;

use pcow_protocol::frontend::{Frontend, FrontendOptions, GuestRegion};
use pcow_tests::backend::Backend;
use pcow_tests::scratch::Scratch;
use vm_memory::Bytes;

const CLUSTER: usize = 64 << 10;
const CLUSTERS: usize = 4096;
const BUDGET: usize = 64;

fn mappings_of(region: &GuestRegion) -> usize {
    let start = region.as_ptr() as usize;
    let inside = |line: &str| {
        let from = line.split('-').next().unwrap();
        let from = usize::from_str_radix(from, 16).unwrap();
        (start..start + region.len()).contains(&from)
    };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|l| inside(l)).count()
}

/// Each round maps every other cluster and then loads from those between, so that pieces of the trap stand alone when they
/// get their first read copy. The kernel may keep such pieces apart for ever; the budget must hold all the same.
#[test]
fn read_copies_between_mappings_leave_no_pieces_behind() {
    let scratch = Scratch::new();
    let size = u64::try_from(CLUSTERS * CLUSTER).unwrap();
    let image = scratch.image("image", size, u64::try_from(CLUSTER).unwrap());
    let backend = Backend::start(&image, &["--max-mappings", &BUDGET.to_string()]);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let region = frontend.region();
    let memory = region.volatile_slice();
    for round in (0..CLUSTERS).step_by(BUDGET) {
        for cluster in (round..round + BUDGET - 4).step_by(2) {
            memory
                .store(1u64, cluster * CLUSTER, Ordering::Relaxed)
                .unwrap();
        }
        for cluster in (round + 1..round + BUDGET - 6).step_by(2) {
            let beside: u64 = memory.load(cluster * CLUSTER, Ordering::Relaxed).unwrap();
            assert_eq!(beside, 0);
        }
    }
    assert!(
        mappings_of(region) <= BUDGET,
        "{} mappings with a budget of {BUDGET}",
        mappings_of(region)
    );
    assert!(frontend.mapping_counts().unmaps > 1000);
}
