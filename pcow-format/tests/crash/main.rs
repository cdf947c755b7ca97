// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Crash consistency, by search: images on a simulated filesystem, cut at every ordering point of short workloads.
#![allow(missing_docs, clippy::unwrap_used)]

mod explorer;
mod model;
mod oracle;
mod setting;
mod workload;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use explorer::{Explorer, Limits, Stats, Violation};
use pcow_format::medium::{Domain, Site};
use setting::Setting;
use workload::OPERATIONS;

/// Every sequence of `length` operations.
fn workloads(length: u32) -> Vec<Vec<usize>> {
    let all = OPERATIONS.len();
    let digit = |number: usize, place: u32| number / all.pow(place) % all;
    let one = |number| (0..length).map(|place| digit(number, place)).collect();
    (0..all.pow(length)).map(one).collect()
}

fn explore(
    setting: &Setting,
    limits: Limits,
    workloads: &[Vec<usize>],
) -> Result<Stats, Box<Violation>> {
    let next = AtomicUsize::new(0);
    let total = Mutex::new(Ok(Stats::default()));
    let work = || {
        let mut explorer = Explorer::new(setting, limits);
        let mut result = Ok(());
        while result.is_ok() && total.lock().unwrap().is_ok() {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(workload) = workloads.get(number) else {
                break;
            };
            result = explorer.explore(workload, number as u64);
        }
        let mut total = total.lock().unwrap();
        match (&mut *total, result) {
            (Ok(total), Ok(())) => total.add(explorer.stats),
            (total, Err(violation)) => *total = Err(violation),
            (Err(_), Ok(())) => {}
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    total.into_inner().unwrap()
}

fn must_hold(name: &str, setting: &Setting) {
    let start = Instant::now();
    let limits = Limits {
        exhaustive: 32,
        samples: 12,
        nested: 3,
    };
    let mut total = Stats::default();
    let lengths: u32 = std::env::var("LEN").map_or(2, |l| l.parse().unwrap());
    for length in 1..=lengths {
        match explore(setting, limits, &workloads(length)) {
            Ok(stats) => total.add(stats),
            Err(violation) => panic!("{name}: {violation}"),
        }
    }
    println!(
        "{name}: {} workloads, {} acts, {} crash states, {} different after recovery, {:?}",
        total.workloads,
        total.acts,
        total.states,
        total.recovered.len(),
        start.elapsed()
    );
}

#[test]
fn page_cache() {
    must_hold(
        "page cache",
        &Setting::new(Domain::PageCache, Domain::PageCache, None),
    );
}

#[test]
fn dax() {
    must_hold("DAX", &Setting::new(Domain::Dax, Domain::Dax, None));
}
#[test]
fn dbg() {
    let s = Setting::new(Domain::Dax, Domain::Dax, None);
    let mut r = workload::Run::new(&s, 0).unwrap();
    assert!(r.perform(&OPERATIONS[3]).unwrap());
    for (m, p) in r.moments() {
        println!("{:?} {} {}", m.act(), m.choices().len(), p.len());
    }
}
