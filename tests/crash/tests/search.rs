// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A short form of the search, so that `cargo test` alone tries every operation on every medium; `cargo xtask crash`, which
//! every change must pass as well, tries all pairs.
#![allow(missing_docs, clippy::unwrap_used)]

use pcow_crash::coverage::{self, Cells, contradictions};
use pcow_crash::explorer::Explorer;
use pcow_crash::random::Random;
use pcow_crash::search::{
    BRIEF, CLOSE, LONG, Recovered, Workload, explore, explore_long, explore_short, long_workload,
    replay, replay_on, workloads,
};
use pcow_crash::setting::{SCENES, Scene, Setting};
use pcow_crash::violation::{Part, Trace, Violation};
use pcow_crash::workload::Operation;
use pcow_format::medium::Site;

/// Without optimization everything takes thirty times as long.
const STATES: u64 = if cfg!(debug_assertions) { 300 } else { 20_000 };

/// A search that finds nothing to do must not pass for one that finds nothing wrong, so each has a floor.
#[test]
fn no_crash_of_a_short_workload_breaks_a_promise() {
    let mut cells = Cells::new();
    for scene in &SCENES {
        let setting = Setting::new(scene, None);
        let recovered = Recovered::default();
        let explored = explore_short(&[CLOSE], &setting, &recovered);
        let stats = explored.unwrap_or_else(|v| panic!("{v}"));
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
        coverage::add(&mut cells, stats.cells);
    }
    // Some calls come only in pairs of operations.
    let mut wrong = contradictions(&cells);
    wrong.retain(|text| !text.ends_with("no reason why"));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
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

/// What a violation prints leads to the same one, where the fault is, and to none in the sound format.
fn assert_found_again(setting: &Setting, violation: &Violation) {
    let text = violation.trace.to_string();
    let trace = Trace::parse(&text).unwrap_or_else(|| panic!("{text}"));
    assert_eq!(trace.to_string(), text);
    let same = replay_on(setting, &trace).expect_err(&text);
    assert_eq!(same.trace.to_string(), text);
    let sites = |v: &Violation| {
        let site = |act: &String| act.split(' ').next().map(str::to_owned);
        v.acts.iter().map(site).collect::<Vec<_>>()
    };
    assert_eq!(sites(&same), sites(violation), "{text}");
    assert_eq!(same.crash.len(), violation.crash.len(), "{text}");
    let stats = replay(&trace).unwrap_or_else(|v| panic!("{v}"));
    assert!(stats.states > 0, "{text}");
}

fn faulty(scene: &str, without: &'static str) -> Setting {
    Setting::new(Scene::named(scene).unwrap(), Some(Site(without)))
}

#[test]
fn a_violation_of_a_single_operation_is_found_again() {
    let setting = faulty("page-cache", "active.flush.data");
    let found = explore_short(&[CLOSE], &setting, &Recovered::default());
    let violation = found.expect_err("a flush without sync loses something");
    assert_found_again(&setting, &violation);
}

#[test]
fn a_violation_that_is_found_in_brief_is_found_again() {
    let setting = faulty("page-cache", "active.flush.map");
    let found = explore(&setting, BRIEF, &workloads(2), &Recovered::default());
    let violation = found.expect_err("a flush without sync of the map loses something");
    assert_eq!(violation.trace.limits.name, "brief");
    assert_found_again(&setting, &violation);
}

/// Which acts these are is for the workloads before to decide, so they are in the trace.
#[test]
fn a_violation_at_a_site_that_chance_left_out_is_found_again() {
    let setting = faulty("page-cache", "active.flush.data");
    let recovered = Recovered::default();
    let workload: Workload = ["store to base", "flush"]
        .iter()
        .map(|name| Operation::named(name).unwrap())
        .collect();
    let mut found = (0..1000).filter_map(|seed| {
        let mut explorer = Explorer::new(&setting, BRIEF, &recovered);
        explorer.explore(&workload, seed).err()
    });
    let violation = found.find(|v| v.trace.part != Part::Last(Vec::new()));
    assert_found_again(&setting, &violation.unwrap());
}

#[test]
fn a_violation_of_a_long_workload_is_found_again() {
    let setting = faulty("dax", "layer.dir.sync");
    let recovered = Recovered::default();
    let mut found = (0..1000).filter_map(|seed| {
        let (workload, first) = long_workload(&mut Random(seed));
        let mut explorer = Explorer::new(&setting, LONG, &recovered);
        explorer.explore_from(first, &workload, seed).err()
    });
    let violation = found
        .find(|v| matches!(v.trace.part, Part::From(1..)))
        .unwrap();
    assert_eq!(violation.trace.limits.name, "long");
    assert_found_again(&setting, &violation);
}

/// What is left of it was found in another way than the whole.
#[test]
fn a_violation_of_a_long_workload_that_was_made_shorter_is_found_again() {
    let settings = [faulty("page-cache", "active.flush.data")];
    let recovered = Recovered::default();
    let found = explore_long(&settings, LONG, (1, u64::MAX), &recovered, &|| ());
    let violation = found.expect_err("a flush without sync loses something");
    assert_eq!(violation.trace.limits.name, "close");
    assert_eq!(violation.trace.part, Part::From(0));
    assert_found_again(&settings[0], &violation);
}

#[test]
fn what_is_no_trace_is_refused() {
    let texts = [
        "page-cache:brief:last:7:snapshot;flush",
        "dax:wide:last+0+12:7:flush",
        "dax:long:from 1:7:flush;flush",
        "page-cache:close:last:0:",
    ];
    for text in texts {
        assert!(Trace::parse(text).is_some(), "{text}");
    }
    let texts = [
        "",
        "page-cache:7:snapshot;flush",
        "nowhere:brief:last:7:flush",
        "dax:Brief:last:7:flush",
        "dax:brief:first:7:flush",
        "dax:brief:last+:7:flush",
        "dax:brief:last+x:7:flush",
        "dax:brief:lasting:7:flush",
        "dax:brief:from:7:flush",
        "dax:brief:from  1:7:flush",
        "dax:brief:last:+7:flush",
        "dax:brief:last:07:flush",
        "dax:brief:last::flush",
        "dax:brief:last:7",
        "dax:brief:last:7:flush;",
        "dax:brief:last:7:;flush",
        "dax:brief:last:7:no operation",
        "dax:brief:last:7:flush:flush",
        "dax:brief:last:7:flush ",
    ];
    for text in texts {
        assert!(Trace::parse(text).is_none(), "{text}");
    }
}
