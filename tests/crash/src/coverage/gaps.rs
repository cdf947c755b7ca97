// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why operations do not make all calls of their steps on each medium.

use super::{DAX, OPENING, PAGE_CACHE};

const MAPPING: &str = "only on DAX words are stored through a mapping";
const JOURNAL: &str = "only on DAX bytes are durable before their word";
const BOOT: &str = "only in the page cache are clusters live, or durable with a flush";
const STORAGE: &str = "only in the page cache: on DAX written zeros take the place of it";

/// Calls that are made on one medium only.
pub(super) const ONLY: &[(&str, &str, &str)] = &[
    (
        "active.ensure.reserve",
        PAGE_CACHE,
        "only in the page cache: on DAX the filesystem tells, and a write does it",
    ),
    ("active.ensure.write_durable", DAX, JOURNAL),
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
    ("layer.map.zeros", DAX, MAPPING),
    ("layer.map.tag", PAGE_CACHE, BOOT),
    ("active.flush.map", PAGE_CACHE, BOOT),
    ("active.flush.word", PAGE_CACHE, BOOT),
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
];

/// Calls that no workload makes.
pub(super) const NEVER: &[(&str, &str)] = &[
    (
        "receive.joined.sync",
        "only when a reception that was cut off at its end is made again: what a death leaves is used like that, and cut when all of it is over",
    ),
    (
        "active.import.punch",
        "a new image has holes there: import makes no other",
    ),
    (
        "adopt.unlink",
        "removes something only when a rebase that was cut off is made again: what a death leaves is used like that, and cut when all of it is over",
    ),
    (
        "create.back.rename",
        "after a sync of the parent that failed: tried with the calls that fail",
    ),
    (
        "receive.progress.unlink",
        "for a note after one that was cut off in the same partial image: what a death leaves is used like that, and cut when all of it is over",
    ),
    (
        "repair.past_end.word",
        "no crash makes words past the end: tried with damaged images",
    ),
    (
        "root.discard.unlink",
        "after a commit that fails: tried with the calls that fail",
    ),
    (
        "root.part.unlink",
        "after a commit that failed in the same process: tried with the calls that fail",
    ),
];

const NONE_UNFLUSHED: &str = "on DAX nothing is left unflushed";
const SETTLED: &str = "on DAX an opening settles what is live, so that another boot finds none";
const TAGGED: &str = "on DAX an image is tagged only if it was in the page cache before";

/// Calls of a step that an operation does not make: operation, beginning of the sites, medium, reason.
pub(super) const EXCEPT: &[(&str, &str, &str, &str)] = &[
    ("power cut", "active.open.discard", DAX, SETTLED),
    ("reboot", "active.open.discard", DAX, SETTLED),
    (
        "flush that fails, and repair",
        "active.open.discard",
        DAX,
        SETTLED,
    ),
    (OPENING, "active.open.tag", DAX, TAGGED),
    ("trust after a reboot", "", DAX, NONE_UNFLUSHED),
    ("trust a copy", "", DAX, NONE_UNFLUSHED),
    ("give up", "", DAX, NONE_UNFLUSHED),
    (
        "flush of the map that fails",
        "",
        DAX,
        "on DAX a flush of no live cluster syncs no map",
    ),
    (
        "flush of the map that fails, going on",
        "",
        DAX,
        "on DAX a flush of no live cluster syncs no map",
    ),
    (
        "flush of the map that fails, going on",
        "active.open.discard",
        PAGE_CACHE,
        "the flush had settled what was live before its last sync",
    ),
    (
        "flush that fails, and repair",
        "active.flush.word",
        PAGE_CACHE,
        "what was live was given up before the flush",
    ),
    (
        "create by reference",
        "active.flush.word",
        PAGE_CACHE,
        "what it is put on has nothing that was not flushed",
    ),
    (
        "write",
        "active.prepare.reserve",
        PAGE_CACHE,
        "in the page cache a write fills the clusters that no layer has",
    ),
];

/// Calls of steps on the other medium, or of other steps, that an operation makes all the same.
pub(super) const ALSO: &[(&str, &str, &str)] = &[
    // An opening on DAX settles what was live when the filesystem was mounted without it.
    (OPENING, DAX, "active.flush.word"),
    (OPENING, DAX, "active.word.write_back"),
    ("flush of data that fails", PAGE_CACHE, "active.flush.data"),
    ("flush of data that fails", DAX, "active.flush.data"),
];

/// Calls that only long workloads get to: their cells may be empty, for this reason, and need not be.
pub(super) const RARE: &[(&str, &str, &str)] = &[(
    "rollback",
    "active.give_back.punch",
    "takes four operations: a snapshot, a store, storage prepared ahead, and this",
)];
