// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which calls of which operations are cut off on which medium, and why the others are not.
//!
//! A cell is an operation, a medium and a call site. What an operation does is written down here in steps; a cell outside
//! of them is empty because the operation has no such step. A cell that is empty though it should not be, or the other way
//! round, is a fault of this table or of the search.

mod gaps;
mod operations;
mod steps;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use pcow_format::medium::Domain;

use crate::sites::{self, is_of_others};
use crate::workload::OPERATIONS;
use gaps::{ALSO, EXCEPT, NEVER, ONLY, RARE};
use operations::DOES;
use steps::STEPS;

/// Operation, medium and call site.
pub type Cell = (&'static str, &'static str, &'static str);
/// How often an operation was cut off in each.
pub type Cells = BTreeMap<Cell, u64>;

const PAGE_CACHE: &str = "page-cache";
const DAX: &str = "dax";
/// The opening that starts a workload.
pub const OPENING: &str = "open";
/// What follows a power cut.
pub const RECOVERY: &str = "recovery";

/// Why a cell is empty; `None` if it must not be.
pub fn reason(operation: &str, medium: &str, site: &str) -> Option<String> {
    if ALSO.contains(&(operation, medium, site)) {
        return None;
    }
    if let Some(reason) = rarity(operation, site) {
        return Some(reason.to_owned());
    }
    if let Some((_, reason)) = NEVER.iter().find(|(s, _)| *s == site) {
        return Some((*reason).to_owned());
    }
    let only = |(s, m, _): &&(&str, &str, &str)| *s == site && *m != medium;
    if let Some((.., reason)) = ONLY.iter().find(only) {
        return Some((*reason).to_owned());
    }
    let except = |(o, s, m, _): &&(&str, &str, &str, &str)| {
        *o == operation && site.starts_with(s) && *m == medium
    };
    if let Some((.., reason)) = EXCEPT.iter().find(except) {
        return Some((*reason).to_owned());
    }
    let step = STEPS.iter().find(|(_, sites)| sites.contains(&site));
    let (step, _) = step?;
    let does = DOES.iter().find(|(name, _)| *name == operation)?.1;
    (!does.contains(step)).then(|| format!("no step: {step}"))
}

/// Why only long workloads fill a cell, if that is so.
fn rarity(operation: &str, site: &str) -> Option<&'static str> {
    let is_it = |(o, s, _): &&(&str, &str, &str)| *o == operation && *s == site;
    RARE.iter().find(is_it).map(|(.., reason)| *reason)
}

/// The operations of the table, in its order.
fn operations() -> Vec<&'static str> {
    let others = OPERATIONS.iter().filter(|o| o.in_short).map(|o| o.name);
    [OPENING, RECOVERY].into_iter().chain(others).collect()
}

/// Every cell, in order, with what was found.
fn all(cells: &Cells) -> impl Iterator<Item = (&'static str, &'static str, &'static str, u64)> {
    let sites: BTreeSet<_> = sites::all();
    let rows = operations().into_iter().flat_map(move |operation| {
        let sites = sites.clone();
        [PAGE_CACHE, DAX].into_iter().flat_map(move |medium| {
            let sites = sites.clone();
            sites.into_iter().map(move |site| (operation, medium, site))
        })
    });
    rows.map(|(o, m, s)| (o, m, s, cells.get(&(o, m, s)).copied().unwrap_or(0)))
}

/// What is wrong with the table: cells that are empty without reason, and reasons for cells that are not empty.
pub fn contradictions(cells: &Cells) -> Vec<String> {
    let one = |(operation, medium, site, count): (_, _, _, u64)| {
        let cell = || format!("{operation}, {medium}, {site}");
        match (count, reason(operation, medium, site)) {
            (0, None) => Some(format!("{}: never cut off, and no reason why", cell())),
            (1.., Some(reason)) if rarity(operation, site).is_none() => {
                Some(format!("{}: cut off, but '{reason}'", cell()))
            }
            _ => None,
        }
    };
    all(cells).filter_map(one).collect()
}

/// The table as text: how often each operation was cut off at each site, and why elsewhere it was not.
pub fn table(cells: &Cells) -> String {
    let mut text = String::from(
        "| operation | medium | call sites, and how often it was cut off there |\n|---|---|---|\n",
    );
    let mut empty: BTreeMap<(usize, &str, String), Vec<&str>> = BTreeMap::new();
    let mut full: BTreeMap<(usize, &str), Vec<String>> = BTreeMap::new();
    let operations = operations();
    for (operation, medium, site, count) in all(cells) {
        let row = operations.iter().position(|o| *o == operation).unwrap_or(0);
        if count > 0 {
            let places = full.entry((row, medium)).or_default();
            places.push(format!("{site} {count}"));
        } else {
            let reason = reason(operation, medium, site).unwrap_or_else(|| "UNEXPLAINED".into());
            empty.entry((row, medium, reason)).or_default().push(site);
        }
    }
    for ((row, medium), places) in full {
        let _ = writeln!(
            text,
            "| {} | {medium} | {} |",
            operations[row],
            places.join(", ")
        );
    }
    text.push_str("\n| operation | medium | not cut off at | because |\n|---|---|---|---|\n");
    for ((row, medium, reason), sites) in empty {
        let name = operations[row];
        let _ = writeln!(
            text,
            "| {name} | {medium} | {} | {reason} |",
            sites.join(", ")
        );
    }
    text
}

/// Adds what a search has cut off. Calls of the guest and of the user are none of the format's.
pub fn add(cells: &mut Cells, found: Cells) {
    let own = found.into_iter().filter(|(key, _)| !is_of_others(key.2));
    own.for_each(|(key, count)| *cells.entry(key).or_default() += count);
}

/// What the table calls it.
pub fn medium(domain: Domain) -> &'static str {
    domain.name()
}
