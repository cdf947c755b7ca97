// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each operation does, call by call, and why it does not do the rest.

use super::{OPENING, RECOVERY};

pub(super) const PAGE_CACHE: &str = "page-cache";
pub(super) const DAX: &str = "dax";

/// Steps of operations, and the calls that each makes.
pub(super) const STEPS: &[(&str, &[&str])] = &[
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
    (
        "unmark deletion",
        &["delete.mark.unlink", "delete.unmark.sync"],
    ),
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
    ("sync adopted names", &["adopt.dir.sync"]),
    ("begin image", &["create.dir", "create.lock"]),
    ("name image", &["create.rename", "create.parent.sync"]),
    (
        "discard image",
        &["create.part.unlink", "create.part.rmdir"],
    ),
    ("open", &["open.dir.sync", "active.open.map_sync"]),
    ("tag", &["active.open.tag", "active.open.tag_sync"]),
    ("discard live", &["active.open.discard"]),
    ("write again", &["active.again.data", "active.again.map"]),
    ("share", &["delete.clone"]),
    ("rest on a base", &["base.dir.sync"]),
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
    ("take in", &["active.import.copy"]),
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
    (
        "note progress",
        &[
            "receive.progress.create",
            "receive.progress.write",
            "receive.progress.sync",
            "receive.progress.rename",
            "receive.progress.dir.sync",
        ],
    ),
    (
        "name what was received",
        &[
            "receive.rename",
            "receive.parent.sync",
            "receive.done.unlink",
        ],
    ),
    (
        "drop the partial image",
        &["receive.gone.rename", "receive.gone.sync"],
    ),
];

/// What operations do.
pub(super) const DOES: &[(&str, &[&str])] = &[
    (OPENING, &["open", "tag", "settle live"]),
    (
        RECOVERY,
        &[
            "open",
            "tag",
            "discard live",
            "write again",
            "remove layer",
            "unmark deletion",
            "clean up",
        ],
    ),
    (
        "store to absent",
        &[
            "word",
            "copy",
            "allocate",
            "leave zero",
            "ensure storage",
            "clear leftovers",
        ],
    ),
    (
        "store to base",
        &["word", "copy", "allocate", "leave zero", "ensure storage"],
    ),
    (
        "store to zero",
        &[
            "word",
            "copy",
            "allocate",
            "clear leftovers",
            "leave zero",
            "ensure storage",
        ],
    ),
    (
        "store to leftover",
        &[
            "word",
            "allocate",
            "clear leftovers",
            "leave zero",
            "ensure storage",
            "copy",
        ],
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
    (
        "flush of the map that fails",
        &["flush", "fail", "mark failure"],
    ),
    ("prepare", &["allocate", "clear leftovers"]),
    ("give back", &["give prepared back"]),
    (
        "touch",
        &[
            "word",
            "copy",
            "allocate",
            "leave zero",
            "ensure storage",
            "clear leftovers",
        ],
    ),
    ("give back clean", &["word", "make absent"]),
    (
        "snapshot",
        &["give prepared back", "flush", "new layer", "commit"],
    ),
    (
        "live snapshot",
        &[
            "give prepared back",
            "flush",
            "new layer",
            "commit",
            "remove layer",
            "word",
            "copy",
            "allocate",
            "leave zero",
            "ensure storage",
            "clear leftovers",
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
            "give prepared back",
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
            "ensure storage",
            "clear leftovers",
        ],
    ),
    (
        "delete below a sealed layer, sharing",
        &[
            "give prepared back",
            "word",
            "copy",
            "allocate",
            "leave zero",
            "flush",
            "mark deletion",
            "new layer",
            "share",
            "commit",
            "remove layer",
            "unmark deletion",
            "ensure storage",
            "clear leftovers",
        ],
    ),
    ("rename", &["commit"]),
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
            "sync adopted names",
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
            "sync adopted names",
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
    (
        "resize",
        &[
            "give prepared back",
            "flush",
            "new layer",
            "commit",
            "remove layer",
        ],
    ),
    (
        "repair",
        &["open", "flush", "give unused back", "remove layer"],
    ),
    (
        "flush that fails, and repair",
        &[
            "fail",
            "mark failure",
            "forget failure",
            "open",
            "tag",
            "discard live",
            "write again",
            "flush",
            "give unused back",
            "remove layer",
        ],
    ),
    (
        "flush of the map that fails, going on",
        &[
            "fail",
            "mark failure",
            "open",
            "tag",
            "discard live",
            "write again",
            "flush",
        ],
    ),
    (
        "trust after a reboot",
        &["trust", "settle unflushed", "open", "tag"],
    ),
    ("trust a copy", &["trust", "settle unflushed", "open"]),
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
    (
        "receive",
        &[
            "rest on a base",
            "begin image",
            "link",
            "new layer",
            "commit",
            "name image",
            "open",
            "word",
            "copy",
            "flush",
            "note progress",
            "give prepared back",
            "remove layer",
            "drop the partial image",
            "discard image",
        ],
    ),
    (
        "receive a new image",
        &[
            "begin image",
            "new layer",
            "commit",
            "name image",
            "open",
            "word",
            "copy",
            "flush",
            "note progress",
            "give prepared back",
            "name what was received",
        ],
    ),
    ("kill", &["open"]),
    (
        "power cut",
        &["open", "tag", "discard live", "remove layer"],
    ),
    ("reboot", &["open", "tag", "discard live"]),
    ("older root", &["open", "tag"]),
    ("oldest root", &["open"]),
    ("switch images", &[]),
];

const MAPPING: &str = "only on DAX words are stored through a mapping";
const JOURNAL: &str = "only on DAX bytes are durable before their word";
const BOOT: &str = "only in the page cache are clusters live, or durable with a flush";
const STORAGE: &str = "only in the page cache: on DAX written zeros take the place of it";

/// Calls that are made on one medium only.
pub(super) const ONLY: &[(&str, &str, &str)] = &[
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
    (
        "active.ensure.reserve",
        PAGE_CACHE,
        "only in the page cache: on DAX the filesystem is asked first",
    ),
];

/// Calls that no workload makes.
pub(super) const NEVER: &[(&str, &str)] = &[
    (
        "active.ensure.write_back",
        "only on DAX, for storage that was shared: an active layer of the simulation has its own there",
    ),
    (
        "receive.joined.sync",
        "only when a reception that was cut off at its end is made again: what a death leaves is used like that, and cut when all of it is over",
    ),
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
