// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why some faults cannot be found by a crash.

use super::Mutant;

/// Calls whose absence no crash shows.
const NOT_FOR_CRASHES: &[(&str, &str)] = &[
    ("active.give_back.punch", "gives space back"),
    ("active.give_back_clean.punch", "gives space back"),
    ("active.give_back_unused.punch", "gives space back"),
    ("active.map.reserve", "for full disks"),
    (
        "active.import.punch",
        "for images that are not new; new ones have holes there",
    ),
    ("repair.flush_failed.unlink", "gives a name back"),
    (
        "repair.past_end.word",
        "speaks of no cluster of the disk, and no crash leaves such a word",
    ),
    ("create.part.rmdir", "gives space back"),
    ("create.part.unlink", "gives space back"),
    ("root.discard.unlink", "gives space back"),
    (
        "root.part.unlink",
        "for a commit after one that failed in the same process",
    ),
    ("active.ensure.reserve", "for full disks"),
    ("active.fill.reserve", "for full disks"),
    ("active.prepare.reserve", "for full disks"),
    (
        "layer.map.tag",
        "saves the first opening a sync: an untagged map has no live words",
    ),
    (
        "layer.map.zeros",
        "for full disks, and so that stores need no journal",
    ),
    ("layer.unlink", "gives space back"),
    ("sweep.part.unlink", "gives space back"),
    (
        "receive.done.unlink",
        "gives a name back that means nothing in an image that has its own",
    ),
    (
        "create.back.rename",
        "after a sync of the parent that failed: tried with the calls that fail",
    ),
];

fn by_kind(first: &str, second: &str) -> Option<&'static str> {
    if first == second {
        return Some("the same call for another file, word or cluster");
    }
    if first.ends_with(".reserve") || second.ends_with(".reserve") {
        return Some("a reservation changes no byte (M7)");
    }
    None
}

fn hasty(site: &str) -> Option<&'static str> {
    if site == "flush.mark.sync" {
        return Some("the flush before, which failed first, has synced the mark");
    }
    let in_process = [
        "active.ensure.write_durable",
        "active.open.",
        "active.prepare.",
        "active.word",
        "delete.unmark.sync",
        "open.dir.sync",
    ];
    if in_process.iter().any(|start| site.starts_with(start)) {
        return Some(
            "the answer promises nothing; what is promised later misses the call: see 'without' it",
        );
    }
    is_of_space(site).then_some("it only takes or gives back space")
}

/// Calls that no workload makes, nor what comes after its crash.
const NEVER_MADE: [&str; 2] = ["create.back.rename", "repair.past_end.word"];

/// Why nothing can be found wrong with `mutant`, so that it is not tried: it leaves out a call that makes nothing durable, but
/// takes space or gives it back, or one that is never made.
pub(super) fn without_trial(mutant: &Mutant) -> Option<&'static str> {
    match mutant {
        Mutant::Without(site) if is_of_space(site) || NEVER_MADE.contains(site) => removal(site),
        _ => None,
    }
}

fn is_of_space(site: &str) -> bool {
    let kinds = [".punch", ".unlink", ".rmdir", ".reserve"];
    kinds.iter().any(|end| site.ends_with(end))
}

/// Why nothing was found wrong with `mutant`.
pub(super) fn reason(mutant: &Mutant) -> Option<&'static str> {
    match mutant {
        Mutant::Named(_) => None,
        Mutant::Without(site) => removal(site),
        Mutant::Hasty(site) => hasty(site),
        Mutant::Swapped(first, second) => by_kind(first, second).or_else(|| free(first, second)),
    }
}

fn free(first: &str, second: &str) -> Option<&'static str> {
    if NEW_FILES.contains(&second) {
        return Some("nothing names the new file yet: a root (I4), or the rename of a part file");
    }
    let pairs = FREE
        .iter()
        .find(|(_, pairs)| pairs.contains(&(first, second)));
    pairs.map(|(reason, _)| *reason)
}

/// Calls that make a file which no root names, and which has another name than it is to have.
const NEW_FILES: [&str; 6] = [
    "root.part.create",
    "layer.data.create",
    "create.lock",
    "adopt.copy.create",
    "adopt.link",
    "receive.progress.create",
];

/// Swaps whose order is free, but those of a kind that always is ([`by_kind`], [`NEW_FILES`]): why, and the first and the second
/// call. Each pair is written out: a pair that is not was looked at by nobody.
const FREE: &[(&str, &[(&str, &str)])] = &[
    (
        "the root's rename needs both, and comes after both (I4)",
        &[
            ("adopt.copy.len", "adopt.copy.write"),
            ("layer.data.len", "layer.map.create"),
            ("layer.map.header", "layer.map.tag"),
            ("layer.map.header", "layer.map.zeros"),
            ("layer.map.len", "layer.map.header"),
            ("adopt.copy.sync", "adopt.dir.sync"),
            ("adopt.dir.sync", "active.flush.data"),
            ("layer.data.sync", "layer.map.sync"),
            ("layer.dir.sync", "active.flush.data"),
            ("layer.map.tag", "layer.data.sync"),
            ("layer.map.zeros", "layer.data.sync"),
            ("layer.map.sync", "layer.dir.sync"),
            ("base.raw.sync", "base.raw.dir.sync"),
            ("create.dir", "base.raw.sync"),
        ],
    ),
    (
        "of different files or directories",
        &[
            ("create.part.rmdir", "open.dir.sync"),
            ("create.dir", "open.dir.sync"),
            ("create.dir", "base.dir.sync"),
            ("root.dir.sync", "create.part.unlink"),
            ("active.open.map_sync", "adopt.dir.sync"),
            ("adopt.dir.sync", "active.fill.write"),
            ("adopt.dir.sync", "active.word"),
            ("active.open.map_sync", "active.flush.data"),
            ("active.open.tag_sync", "active.flush.data"),
            ("active.open.map_sync", "active.import.copy"),
            ("open.dir.sync", "active.import.copy"),
            ("active.flush.map", "open.dir.sync"),
            ("active.flush.data", "open.dir.sync"),
            ("open.dir.sync", "active.flush.data"),
            ("active.give_back_unused.punch", "open.dir.sync"),
            ("repair.live.sync", "open.dir.sync"),
            ("layer.unlink", "receive.gone.rename"),
            ("receive.done.unlink", "open.dir.sync"),
        ],
    ),
    (
        "no root names the merged layer before all of it is flushed",
        &[
            ("delete.clone", "active.word"),
            ("layer.dir.sync", "delete.clone"),
        ],
    ),
    (
        "the bytes are durable already (M15), or those of a copy, for which nothing is promised before both are synced",
        &[
            ("repair.trust.data_sync", "repair.live.sync"),
            ("repair.trust.data_sync", "repair.live.word"),
        ],
    ),
    (
        "two syncs of one file or directory",
        &[
            ("root.dir.sync", "open.dir.sync"),
            ("open.dir.sync", "adopt.dir.sync"),
            ("receive.progress.dir.sync", "open.dir.sync"),
            ("active.open.tag_sync", "active.open.map_sync"),
        ],
    ),
    (
        "nothing is promised before the image is open, which needs both",
        &[
            ("open.dir.sync", "active.open.data_sync"),
            ("open.dir.sync", "active.open.discard"),
            ("open.dir.sync", "active.open.map_sync"),
            ("open.dir.sync", "active.open.tag"),
            ("open.dir.sync", "active.again.data"),
            ("open.dir.sync", "active.again.map"),
        ],
    ),
    (
        "until the tag comes, the next opening does both again",
        &[
            ("active.open.discard", "active.again.data"),
            ("active.open.discard", "active.again.map"),
            ("active.again.data", "active.again.map"),
        ],
    ),
    (
        "a flush that promises the store comes after the opening, which needs the sync",
        &[
            ("open.dir.sync", "active.fill.write"),
            ("open.dir.sync", "active.word"),
        ],
    ),
    (
        "the sync covers the word as well, and makes sure of words of other clusters, whose bytes are durable (I1)",
        &[("active.open.map_sync", "active.word")],
    ),
    (
        "prepared storage that was not used: no word speaks of it, and nobody stores to it any more",
        &[
            ("active.flush.data", "active.give_back.punch"),
            ("active.flush.map", "active.give_back.punch"),
            ("active.give_back.punch", "active.flush.data"),
            ("layer.dir.sync", "active.give_back.punch"),
        ],
    ),
    (
        "the note is of what was durable before; the flush is of what came in since",
        &[("receive.progress.dir.sync", "active.flush.data")],
    ),
    (
        "how far a partial image is means nothing once it has the name of a whole one, or is given up",
        &[
            ("receive.progress.dir.sync", "receive.rename"),
            ("receive.progress.dir.sync", "receive.gone.rename"),
        ],
    ),
    (
        "no harm before the repair is answered: see 'without open.dir.sync'",
        &[("repair.flush_failed.unlink", "open.dir.sync")],
    ),
    (
        "no harm before an older root is put back: see 'without delete.unmark.sync'",
        &[("delete.mark.unlink", "delete.unmark.sync")],
    ),
    (
        "live words come after the opening: see 'without active.open.tag_sync'",
        &[("active.open.tag", "active.open.tag_sync")],
    ),
    (
        "the sync covers lines that were not written back (M10)",
        &[
            ("active.flush.word", "active.word.write_back"),
            ("active.word.write_back", "active.open.map_sync"),
        ],
    ),
    (
        "what the guest stores, or a word that turns live, beside a flush is promised nothing by it",
        &[
            ("guest.store", "active.flush.word"),
            ("active.flush.data", "active.fill.write"),
            ("active.flush.data", "active.word"),
            ("active.flush.data", "guest.store"),
            ("active.flush.map", "active.fill.write"),
            ("active.flush.map", "active.word"),
            ("active.flush.map", "guest.store"),
            ("guest.store", "active.flush.map"),
        ],
    ),
    (
        "the bytes that are written over stay what they are, and the flush is of what came in before",
        &[("active.flush.data", "active.ensure.write_durable")],
    ),
    (
        "a write that came first would be undone at once, crash or not, and before it is answered nothing promises it",
        &[("active.ensure.write_durable", "active.overwrite")],
    ),
    (
        "of two clusters, each of which is in order",
        &[
            ("active.word", "active.prepare.zero"),
            ("active.give_back_clean.punch", "active.word"),
            ("active.word", "active.fill.write"),
            ("active.word", "active.import.copy"),
        ],
    ),
    (
        "the guest's store is the later one: it cannot store before the word is visible (I2)",
        &[("active.word", "guest.store")],
    ),
    (
        "for space: files of a layer that no root names may be left without their mark",
        &[
            ("delete.mark.unlink", "layer.unlink"),
            ("layer.unlink", "delete.mark.unlink"),
        ],
    ),
    (
        "what is live is promised nothing, and may be given up early",
        &[("active.flush.data", "active.flush.distrust")],
    ),
    (
        "no word turned durable between the two",
        &[("active.flush.data", "active.flush.map")],
    ),
    (
        "the next flush: it begins early, and notes its words before",
        &[("active.flush.map", "active.flush.data")],
    ),
    (
        "the mark tells of a sync that failed, not of one that comes",
        &[
            ("active.flush.map", "flush.mark.create"),
            ("active.flush.word", "flush.mark.create"),
            ("active.flush.data", "flush.mark.create"),
        ],
    ),
    (
        "the next flush, which fails as well, syncs the mark again",
        &[("flush.mark.create", "flush.mark.sync")],
    ),
    (
        "the mark is removed, synced or not",
        &[("flush.mark.sync", "repair.flush_failed.unlink")],
    ),
    (
        "the bytes that the word speaks of were written before both",
        &[("active.word.fence", "active.flush.data")],
    ),
    (
        "nothing is promised for a cluster before the guest's own fence or a flush, and both come later still",
        &[
            ("active.word.fence", "active.overwrite"),
            ("active.word.fence", "active.import.copy"),
            ("active.word.fence", "active.word"),
            ("active.word.fence", "guest.store"),
        ],
    ),
    (
        "no root names the layer any more, or yet",
        &[
            ("layer.unlink", "open.dir.sync"),
            ("repair.flush_failed.unlink", "layer.unlink"),
            ("active.flush.data", "layer.unlink"),
            ("active.flush.map", "layer.unlink"),
            ("active.open.map_sync", "layer.unlink"),
            ("active.open.tag_sync", "layer.unlink"),
            ("active.open.map_sync", "delete.mark.unlink"),
            ("active.open.tag_sync", "delete.mark.unlink"),
            ("layer.dir.sync", "active.fill.write"),
            ("layer.dir.sync", "active.word"),
        ],
    ),
    (
        "what is not data became so durably before (active.give_back_clean.sync, active.open.tag_sync)",
        &[
            ("active.flush.data", "active.give_back_unused.punch"),
            ("active.flush.map", "active.give_back_unused.punch"),
            ("active.give_back_clean.punch", "active.flush.data"),
        ],
    ),
    (
        "the bytes of a cluster that is absent or says zero are shown by nobody",
        &[
            ("active.flush.map", "active.over_zero.zero"),
            ("active.flush.map", "active.prepare.zero"),
        ],
    ),
    (
        "the new image has no name before all of it is flushed",
        &[("active.import.copy", "active.word")],
    ),
];

fn removal(site: &str) -> Option<&'static str> {
    let listed = NOT_FOR_CRASHES.iter().find(|(name, _)| *name == site);
    listed.map(|(_, reason)| *reason)
}
