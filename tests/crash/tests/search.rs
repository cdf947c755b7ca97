// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A short form of the search, so that `cargo test` alone tries every operation on every medium.
#![allow(missing_docs, clippy::unwrap_used)]

use pcow_crash::explorer::Explorer;
use pcow_crash::search::{BRIEF, CLOSE, LONG, Recovered, explore_long, explore_short, replay};
use pcow_crash::setting::{SCENES, Setting};
use pcow_crash::violation::Trace;
use pcow_format::medium::Site;

/// Without optimization everything takes thirty times as long.
const STATES: u64 = if cfg!(debug_assertions) { 300 } else { 20_000 };

/// A search that finds nothing to do must not pass for one that finds nothing wrong, so each has a floor.
#[test]
fn no_crash_of_a_short_workload_breaks_a_promise() {
    for scene in &SCENES {
        let limits = match cfg!(debug_assertions) || scene.is_wide() {
            true => &[CLOSE][..],
            false => &[CLOSE, BRIEF],
        };
        let setting = Setting::new(scene, None);
        let recovered = Recovered::default();
        let stats = explore_short(limits, &setting, &recovered).unwrap_or_else(|v| panic!("{v}"));
        let name = scene.name;
        println!(
            "{name}: {} states, {} after recovery",
            stats.states,
            recovered.count()
        );
        assert!(
            stats.workloads >= 14,
            "{name}: {} workloads",
            stats.workloads
        );
        assert!(recovered.count() >= 50, "{name}: {}", recovered.count());
    }
}

#[test]
fn no_crash_of_a_long_workload_breaks_a_promise() {
    let settings: Vec<_> = SCENES.iter().map(|s| Setting::new(s, None)).collect();
    let recovered = Recovered::default();
    let searched = explore_long(&settings, LONG, (1, STATES), &recovered, &|| ());
    let stats = searched.unwrap_or_else(|v| panic!("{v}"));
    println!(
        "{} states, {} after recovery",
        stats.states,
        recovered.count()
    );
    assert!(recovered.count() >= STATES);
}

#[test]
fn what_a_violation_prints_finds_it_again() {
    let scene = &SCENES[0];
    let setting = Setting::new(scene, Some(Site("active.flush.data")));
    let found = explore_short(&[CLOSE], &setting, &Recovered::default());
    let violation = found.expect_err("a flush without sync loses something");
    let text = violation.trace.to_string();
    let trace = Trace::parse(&text).unwrap();
    assert_eq!(trace.to_string(), text);
    let recovered = Recovered::default();
    let mut again = Explorer::new(&setting, CLOSE, &recovered);
    let same = again.explore(&trace.operations, trace.seed).unwrap_err();
    assert_eq!(same.acts.len(), violation.acts.len());
    // The sound format stands the same.
    replay(&trace).unwrap_or_else(|v| panic!("{v}"));
}
