// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which calls of which operations are cut off on which medium, and why the others are not.
//!
//! A cell is an operation, a medium and a call site. What an operation does is written down here in steps; a cell outside
//! of them is empty because the operation has no such step. A cell that is empty though it should not be, or the other way
//! round, is a fault of this table or of the search.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use pcow_format::medium::Domain;

use crate::search::{CLOSE, Recovered, explore_short, workloads};
use crate::setting::{SCENES, Setting};
use crate::sites::{self, is_of_others};
use crate::violation::Violation;
use crate::workload::{OPERATIONS, Run};

/// Operation, medium and call site, and how often the operation was cut off there.
pub type Cells = BTreeMap<(&'static str, &'static str, &'static str), u64>;

/// The opening that starts a workload.
pub const OPENING: &str = "open";
/// What follows a power cut.
pub const RECOVERY: &str = "recovery";

const PAGE_CACHE: &str = "page-cache";
const DAX: &str = "dax";

/// Steps of operations, and the calls that each makes.
const STEPS: &[(&str, &[&str])] = &[
    (
        "word",
        &["active.word", "active.word.write_back", "active.word.fence"],
    ),
    (
        "copy",
        &[
            "active.fill.write",
            "active.fill.reserve",
            "active.fill.write_durable",
        ],
    ),
    (
        "allocate",
        &["active.prepare.reserve", "active.prepare.zeros"],
    ),
    ("clear leftovers", &["active.prepare.zero"]),
    (
        "leave zero",
        &["active.over_zero.zero", "active.over_zero.sync"],
    ),
    ("ensure storage", &["active.ensure.reserve"]),
    ("overwrite", &["active.overwrite"]),
    (
        "flush",
        &["active.flush.data", "active.flush.word", "active.flush.map"],
    ),
    ("fail", &["active.flush.distrust"]),
    ("mark failure", &["flush.mark.create", "flush.mark.sync"]),
    (
        "new layer",
        &[
            "layer.data.create",
            "layer.data.len",
            "layer.data.sync",
            "layer.map.create",
            "layer.map.len",
            "layer.map.header",
            "layer.map.tag",
            "layer.map.zeros",
            "layer.map.sync",
            "layer.dir.sync",
        ],
    ),
    (
        "commit",
        &[
            "root.part.create",
            "root.part.write",
            "root.part.sync",
            "root.rename",
            "root.dir.sync",
        ],
    ),
    ("remove layer", &["layer.unlink"]),
    ("mark deletion", &["delete.mark.create", "delete.mark.sync"]),
    ("unmark deletion", &["delete.mark.unlink"]),
    ("link", &["adopt.link"]),
    (
        "copy layers",
        &[
            "adopt.copy.create",
            "adopt.copy.len",
            "adopt.copy.write",
            "adopt.copy.sync",
        ],
    ),
    ("adopt", &["adopt.dir.sync"]),
    ("begin image", &["create.dir", "create.lock"]),
    ("name image", &["create.rename", "create.parent.sync"]),
    (
        "discard image",
        &["create.part.unlink", "create.part.rmdir"],
    ),
    ("open", &["open.dir.sync", "active.open.map_sync"]),
    ("tag", &["active.open.tag", "active.open.tag_sync"]),
    ("discard live", &["active.open.discard"]),
    ("settle live", &["active.open.data_sync"]),
    (
        "make absent",
        &[
            "active.give_back_clean.sync",
            "active.give_back_clean.punch",
        ],
    ),
    ("give prepared back", &["active.give_back.punch"]),
    ("give unused back", &["active.give_back_unused.punch"]),
    ("take in", &["active.import.copy", "active.import.sync"]),
    (
        "settle unflushed",
        &["repair.live.word", "repair.live.sync"],
    ),
    ("trust", &["repair.trust.data_sync"]),
    (
        "forget failure",
        &["repair.flush_failed.unlink", "repair.flush_failed.sync"],
    ),
    ("clean up", &["sweep.part.unlink"]),
];

/// What operations do.
const DOES: &[(&str, &[&str])] = &[
    (OPENING, &["open", "tag", "settle live"]),
    (
        RECOVERY,
        &[
            "open",
            "tag",
            "discard live",
            "remove layer",
            "unmark deletion",
            "clean up",
        ],
    ),
    (
        "store to absent",
        &["word", "copy", "allocate", "leave zero"],
    ),
    (
        "store to base",
        &["word", "copy", "allocate", "leave zero", "ensure storage"],
    ),
    (
        "store to zero",
        &["word", "copy", "allocate", "clear leftovers", "leave zero"],
    ),
    (
        "store to leftover",
        &["word", "allocate", "clear leftovers", "leave zero"],
    ),
    ("guest flush", &[]),
    ("flush", &["flush"]),
    (
        "flush, store before its sync",
        &["flush", "word", "copy", "ensure storage"],
    ),
    (
        "flush, store after its sync",
        &["flush", "word", "copy", "ensure storage"],
    ),
    ("flush of data that fails", &["fail", "mark failure"]),
    ("flush of the map that fails", &["flush", "mark failure"]),
    ("prepare", &["allocate", "clear leftovers"]),
    ("give back", &["give prepared back"]),
    (
        "touch",
        &["word", "copy", "allocate", "leave zero", "ensure storage"],
    ),
    ("give back clean", &["word", "make absent"]),
    ("snapshot", &["flush", "new layer", "commit"]),
    (
        "live snapshot",
        &[
            "flush",
            "new layer",
            "commit",
            "remove layer",
            "word",
            "copy",
            "allocate",
            "leave zero",
        ],
    ),
    (
        "delete",
        &[
            "flush",
            "mark deletion",
            "new layer",
            "word",
            "copy",
            "commit",
            "remove layer",
            "unmark deletion",
        ],
    ),
    (
        "delete below a sealed layer",
        &[
            "word",
            "copy",
            "allocate",
            "leave zero",
            "flush",
            "mark deletion",
            "new layer",
            "commit",
            "remove layer",
            "unmark deletion",
        ],
    ),
    (
        "rollback",
        &["flush", "new layer", "commit", "remove layer"],
    ),
    (
        "rollback, discarding",
        &["new layer", "commit", "remove layer"],
    ),
    (
        "rebase",
        &[
            "open",
            "tag",
            "flush",
            "link",
            "adopt",
            "word",
            "copy",
            "new layer",
            "commit",
            "remove layer",
        ],
    ),
    (
        "rebase, copying",
        &[
            "open",
            "tag",
            "flush",
            "copy layers",
            "adopt",
            "word",
            "copy",
            "new layer",
            "commit",
            "remove layer",
        ],
    ),
    (
        "clone that fails",
        &[
            "open",
            "flush",
            "new layer",
            "commit",
            "begin image",
            "link",
            "adopt",
            "discard image",
        ],
    ),
    (
        "clone",
        &[
            "open",
            "flush",
            "new layer",
            "commit",
            "begin image",
            "link",
            "adopt",
            "name image",
        ],
    ),
    (
        "write",
        &[
            "word",
            "copy",
            "allocate",
            "leave zero",
            "ensure storage",
            "overwrite",
            "flush",
        ],
    ),
    ("write zeros", &["word", "make absent", "flush"]),
    (
        "compact",
        &["word", "make absent", "flush", "give unused back"],
    ),
    ("resize", &["flush", "new layer", "commit", "remove layer"]),
    ("repair", &["open", "flush", "give unused back"]),
    (
        "flush that fails, and repair",
        &[
            "fail",
            "mark failure",
            "forget failure",
            "open",
            "tag",
            "discard live",
            "flush",
            "give unused back",
        ],
    ),
    (
        "trust after a reboot",
        &["trust", "settle unflushed", "open", "tag"],
    ),
    ("give up", &["settle unflushed", "open"]),
    (
        "import",
        &[
            "begin image",
            "new layer",
            "commit",
            "open",
            "take in",
            "word",
            "flush",
            "name image",
        ],
    ),
    ("kill", &["open"]),
    (
        "power cut",
        &[
            "open",
            "tag",
            "discard live",
            "remove layer",
            "unmark deletion",
        ],
    ),
    ("reboot", &["open", "tag", "discard live"]),
    ("older root", &["open"]),
    ("switch images", &[]),
];

const MAPPING: &str = "only on DAX words are stored through a mapping";
const JOURNAL: &str = "only on DAX bytes are durable before their word";
const BOOT: &str = "only in the page cache are clusters live, or durable with a flush";
const STORAGE: &str = "only in the page cache: on DAX written zeros take the place of it";

/// Calls that are made on one medium only.
const ONLY: &[(&str, &str, &str)] = &[
    ("active.word.write_back", DAX, MAPPING),
    ("active.word.fence", DAX, MAPPING),
    ("active.open.map_sync", DAX, MAPPING),
    (
        "active.open.data_sync",
        DAX,
        "only on DAX are live clusters settled at once",
    ),
    ("active.fill.reserve", DAX, JOURNAL),
    ("active.fill.write_durable", DAX, JOURNAL),
    ("active.prepare.zeros", DAX, JOURNAL),
    ("active.import.sync", DAX, JOURNAL),
    ("layer.map.zeros", DAX, MAPPING),
    ("layer.map.tag", PAGE_CACHE, BOOT),
    ("active.flush.map", PAGE_CACHE, BOOT),
    ("active.flush.word", PAGE_CACHE, BOOT),
    ("active.flush.distrust", PAGE_CACHE, BOOT),
    ("active.open.discard", PAGE_CACHE, BOOT),
    ("active.give_back_clean.sync", PAGE_CACHE, BOOT),
    ("repair.live.word", PAGE_CACHE, BOOT),
    ("repair.live.sync", PAGE_CACHE, BOOT),
    ("repair.trust.data_sync", PAGE_CACHE, BOOT),
    (
        "active.fill.write",
        PAGE_CACHE,
        "only in the page cache: on DAX copies are durable",
    ),
    ("active.over_zero.zero", PAGE_CACHE, STORAGE),
    ("active.over_zero.sync", PAGE_CACHE, STORAGE),
    ("active.prepare.zero", PAGE_CACHE, STORAGE),
    (
        "active.ensure.reserve",
        PAGE_CACHE,
        "only in the page cache: on DAX the filesystem is asked first",
    ),
];

/// Calls that no workload makes.
const NEVER: &[(&str, &str)] = &[
    (
        "active.import.punch",
        "a new image has holes there: import makes no other",
    ),
    (
        "active.map.reserve",
        "for preallocated images: it changes no byte (M7)",
    ),
    (
        "adopt.unlink",
        "removes something only when a rebase that was cut off is made again: recovery is used like that",
    ),
    (
        "create.back.rename",
        "after a sync of the parent that failed: tried with the calls that fail",
    ),
    ("delete.clone", "the simulated filesystems share no storage"),
    (
        "delete.clone.sync",
        "the simulated filesystems share no storage",
    ),
    (
        "repair.past_end.sync",
        "no crash makes words past the end: tried with damaged images",
    ),
    (
        "repair.past_end.word",
        "no crash makes words past the end: tried with damaged images",
    ),
    (
        "root.part.unlink",
        "after a commit that failed in the same process: tried with the calls that fail",
    ),
];

const NONE_UNFLUSHED: &str = "on DAX nothing is left unflushed";
const TAGGED: &str = "on DAX an image is tagged only if it was in the page cache before";

/// Calls of a step that an operation does not make: operation, beginning of the sites, medium, reason.
const EXCEPT: &[(&str, &str, &str, &str)] = &[
    (OPENING, "active.open.tag", DAX, TAGGED),
    ("trust after a reboot", "", DAX, NONE_UNFLUSHED),
    ("give up", "", DAX, NONE_UNFLUSHED),
    (
        "flush of the map that fails",
        "",
        DAX,
        "on DAX a flush of no live cluster syncs no map",
    ),
    (
        "flush that fails, and repair",
        "active.flush.word",
        PAGE_CACHE,
        "what was live was given up before the flush",
    ),
    (
        "flush that fails, and repair",
        "active.open.tag",
        DAX,
        TAGGED,
    ),
    (
        "store to base",
        "active.prepare.reserve",
        PAGE_CACHE,
        "in the page cache such a cluster is copied, or leaves zero",
    ),
    (
        "write",
        "active.prepare.reserve",
        PAGE_CACHE,
        "in the page cache a write fills the clusters that no layer has",
    ),
];

/// Calls of steps on the other medium, or of other steps, that an operation makes all the same.
const ALSO: &[(&str, &str, &str)] = &[
    // An opening on DAX settles what was live when the filesystem was mounted without it.
    (OPENING, DAX, "active.flush.word"),
    (OPENING, DAX, "active.word.write_back"),
    ("flush of data that fails", PAGE_CACHE, "active.flush.data"),
    ("flush of data that fails", DAX, "active.flush.data"),
];

/// Why a cell is empty; `None` if it must not be.
pub fn reason(operation: &str, medium: &str, site: &str) -> Option<String> {
    if ALSO.contains(&(operation, medium, site)) {
        return None;
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
            (1.., Some(reason)) => Some(format!("{}: cut off, but '{reason}'", cell())),
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

/// The cells that workloads of up to `length` operations fill, and recovery from single ones.
///
/// # Errors
/// A crash broke a promise.
pub fn observe(length: u32) -> Result<Cells, Box<Violation>> {
    let mut cells = Cells::new();
    for scene in SCENES.iter().filter(|s| !s.is_wide()) {
        let setting = Setting::new(scene, None);
        for workload in (0..=length).flat_map(workloads) {
            let mut run = Run::new(&setting, 1).expect("the start of every scene opens");
            let perform = |run: &mut Run<'_>, o| run.perform(o).expect("the format is sound");
            if !workload.iter().all(|o| perform(&mut run, o)) {
                continue;
            }
            let operation = workload.last().map_or(OPENING, |o| o.name);
            for point in run.points() {
                let key = (
                    operation,
                    medium(setting.domain()),
                    point.moment.act().site.0,
                );
                *cells.entry(key).or_default() += 1;
            }
        }
        let explored = explore_short(&[CLOSE], &setting, &Recovered::default())?;
        let recoveries = explored.cells.into_iter().filter(|(k, _)| k.0 == RECOVERY);
        recoveries.for_each(|(key, count)| *cells.entry(key).or_default() += count);
    }
    cells.retain(|(_, _, site), _| !is_of_others(site));
    Ok(cells)
}

/// What the table calls it.
pub fn medium(domain: Domain) -> &'static str {
    domain.name()
}
