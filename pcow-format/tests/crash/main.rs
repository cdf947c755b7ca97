// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Crash consistency, by search: images on a simulated filesystem, cut at every ordering point of short workloads.
//!
//! | file | its part |
//! |---|---|
//! | `setting` | the images that workloads start from |
//! | `workload` | the operations, and how each changes what must be shown |
//! | `model` | what must be shown: bytes and promises |
//! | `explorer` | every crash of a workload |
//! | `oracle` | the verdict on what a crash left |
//! | `stories` | faults that this found |
#![allow(missing_docs, clippy::unwrap_used)]

mod explorer;
mod model;
mod oracle;
mod setting;
mod stories;
mod workload;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use explorer::{Explorer, Limits, Stats, Violation};
use pcow_format::medium::{Domain, Site};
use setting::Setting;
use workload::OPERATIONS;

/// For short workloads.
const CLOSE: Limits = Limits {
    exhaustive: 32,
    samples: 12,
    nested: 3,
    uses: 4,
};

/// Where there are many workloads.
const WIDE: Limits = Limits {
    exhaustive: 12,
    samples: 6,
    nested: 2,
    uses: 1,
};

/// How close to look at workloads of one operation, of two, and so on. Without optimization everything takes thirty
/// times as long, so that less is done there.
const LIMITS: &[Limits] = if cfg!(debug_assertions) {
    &[CLOSE]
} else {
    &[CLOSE, CLOSE, WIDE]
};

/// The same for what is explored many times over.
const SHORT: &[Limits] = if cfg!(debug_assertions) {
    &[CLOSE]
} else {
    &[CLOSE, WIDE]
};

/// Every sequence of `length` operations.
fn workloads(length: u32) -> Vec<Vec<usize>> {
    let all = OPERATIONS.len();
    let digit = |number: usize, place: u32| number / all.pow(place) % all;
    let one = |number| (0..length).map(|place| digit(number, place)).collect();
    (0..all.pow(length)).map(one).collect()
}

/// Explores workloads on two threads, up to the first violation.
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
            result = explorer.explore(workload, u64::try_from(number).unwrap());
        }
        let mut total = total.lock().unwrap();
        match (&mut *total, result) {
            (Ok(total), Ok(())) => total.add(explorer.stats),
            (total @ Ok(_), Err(violation)) => *total = Err(violation),
            (Err(_), _) => {}
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    total.into_inner().unwrap()
}

/// Explores all workloads of one operation, of two, and so on, each within its limits.
fn explore_all(limits: &[Limits], setting: &Setting) -> Result<Stats, Box<Violation>> {
    let mut total = Stats::default();
    for (limits, length) in limits.iter().zip(1..) {
        total.add(explore(setting, *limits, &workloads(length))?);
    }
    Ok(total)
}

/// Explores, says how far, and fails if that was less than `floor` crash states: a search that finds nothing to do
/// must not pass for one that finds nothing wrong.
fn assert_holds(name: &str, limits: &[Limits], setting: &Setting, floor: u64) {
    let start = Instant::now();
    let total = explore_all(limits, setting).unwrap_or_else(|v| panic!("{name}: {v}"));
    println!(
        "{name}: {} workloads, {} acts at {} sites, {} crash states, {} different after recovery, {:.0?}",
        total.workloads,
        total.acts,
        total.sites.len(),
        total.states,
        total.recovered.len(),
        start.elapsed()
    );
    assert!(total.states >= floor, "only {} crash states", total.states);
}

/// Crash states that a search over [`LIMITS`] must reach.
const FLOOR: u64 = if cfg!(debug_assertions) { 500 } else { 60_000 };
/// The same for [`SHORT`].
const SHORT_FLOOR: u64 = if cfg!(debug_assertions) { 500 } else { 6_000 };

#[test]
fn no_crash_in_the_page_cache_breaks_a_promise() {
    let setting = Setting::new(Domain::PageCache, Domain::PageCache, None);
    assert_holds("page cache", LIMITS, &setting, FLOOR);
}

#[test]
fn no_crash_on_dax_breaks_a_promise() {
    let setting = Setting::new(Domain::Dax, Domain::Dax, None);
    assert_holds("DAX", LIMITS, &setting, FLOOR);
}

#[test]
fn no_crash_of_an_image_that_moved_between_the_domains_breaks_a_promise() {
    let to_page_cache = Setting::new(Domain::Dax, Domain::PageCache, None);
    assert_holds("DAX to page cache", SHORT, &to_page_cache, SHORT_FLOOR);
    let to_dax = Setting::new(Domain::PageCache, Domain::Dax, None);
    assert_holds("page cache to DAX", SHORT, &to_dax, SHORT_FLOOR);
}

/// Calls whose absence no crash shows, with the reason why they are there.
const NOT_FOR_CRASHES: &[(&str, &str)] = &[
    ("active.ensure.reserve", "for full disks"),
    ("active.fill.reserve", "for full disks"),
    ("active.prepare.reserve", "for full disks"),
    (
        "adopt.unlink",
        "removes nothing unless a rebase was cut off, and then the link fails",
    ),
    (
        "layer.map.tag",
        "saves the first opening a sync: an untagged map has no live words",
    ),
    (
        "layer.map.zeros",
        "for full disks, and so that stores need no journal",
    ),
    (
        "delete.mark.sync",
        "for space: without it a power cut may leave a deletion's files without their marks",
    ),
    ("delete.mark.unlink", "gives a name back"),
    ("layer.unlink", "gives space back"),
    ("sweep.part.unlink", "gives space back"),
];

/// Calls that hand out what they make: nothing goes on without them, crash or not.
fn makes_something(site: Site) -> bool {
    site.0.starts_with("guest.")
        || site.0.ends_with(".create")
        || site.0 == "create.dir"
        || site.0 == "create.lock"
}

#[test]
fn every_call_that_is_left_out_is_missed_in_some_crash() {
    let media = [
        (Domain::PageCache, Domain::PageCache),
        (Domain::Dax, Domain::Dax),
        (Domain::Dax, Domain::PageCache),
    ];
    let mut calls: BTreeMap<Site, Vec<(Domain, Domain)>> = BTreeMap::new();
    for (created, used) in media {
        let sound = Setting::new(created, used, None);
        let stats = explore_all(&[CLOSE], &sound).unwrap_or_else(|v| panic!("{v}"));
        for site in stats.sites {
            calls.entry(site).or_default().push((created, used));
        }
    }
    let excused = |site: &Site| NOT_FOR_CRASHES.iter().any(|(name, _)| *name == site.0);
    calls.retain(|site, _| !makes_something(*site) && !excused(site));
    assert!(calls.len() >= 30, "only {} calls are made", calls.len());
    for (site, media) in calls {
        let catch = |(created, used)| {
            let mutant = Setting::new(created, used, Some(site));
            explore_all(&[CLOSE, WIDE], &mutant).err()
        };
        let caught = media.into_iter().find_map(catch);
        let violation = caught.unwrap_or_else(|| panic!("nothing breaks without {}", site.0));
        println!("without {}: {}", site.0, violation.problem);
    }
}
