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
    (
        "active.import.copy",
        "fills a new image, which has no name before it is flushed",
    ),
    (
        "active.import.sync",
        "fills a new image, which has no name before it is flushed",
    ),
    ("repair.flush_failed.unlink", "gives a name back"),
    ("repair.flush_failed.sync", "gives a name back"),
    ("repair.past_end.word", "speaks of no cluster of the disk"),
    ("repair.past_end.sync", "speaks of no cluster of the disk"),
    (
        "repair.trust.data_sync",
        "the bytes are of an earlier boot: none of them is in the page cache",
    ),
    (
        "repair.live.word",
        "decides before an opening, which decides in its own way without it",
    ),
    (
        "repair.live.sync",
        "decides before an opening, which decides in its own way without it",
    ),
    ("create.part.rmdir", "gives space back"),
    ("create.part.unlink", "gives space back"),
    (
        "root.part.unlink",
        "for a commit after one that failed in the same process",
    ),
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
    (
        "receive.done.unlink",
        "gives a name back that means nothing in an image that has its own",
    ),
    (
        "receive.progress.unlink",
        "for a note after one that was cut off in the same partial image",
    ),
];

/// Calls after which something is durable, and renames, which make it count.
fn orders(site: &str) -> bool {
    let ordering = ["sync", "fence", "durable", "rename", "rmdir"];
    let by_name = ordering.iter().any(|part| site.contains(part));
    by_name
        || matches!(
            site,
            "active.flush.data" | "active.flush.map" | "active.prepare.zeros"
        )
}

/// Why nothing can be found wrong with `mutant`, so that it is not tried.
pub(super) fn without_trial(mutant: &Mutant) -> Option<&'static str> {
    match mutant {
        Mutant::Named(_) => None,
        Mutant::Without(site) => removal(site),
        Mutant::Hasty(site) => hasty(site),
        Mutant::Swapped(first, second) => by_kind(first, second),
    }
}

fn by_kind(first: &str, second: &str) -> Option<&'static str> {
    if first == second {
        return Some("the same call for another file, word or cluster");
    }
    if first.ends_with(".reserve") || second.ends_with(".reserve") {
        return Some("a reservation changes no byte (M7)");
    }
    if !orders(first) && !orders(second) {
        return Some(
            "neither is an ordering point, so the medium orders them as it likes (M2, M5, M8)",
        );
    }
    None
}

fn hasty(site: &str) -> Option<&'static str> {
    if site == "flush.mark.sync" {
        return Some("the flush before, which failed first, has synced the mark");
    }
    let in_process = [
        "active.open.",
        "active.prepare.",
        "active.word",
        "open.dir.sync",
    ];
    if in_process.iter().any(|start| site.starts_with(start)) {
        return Some(
            "the answer promises nothing; what is promised later misses the call: see 'without' it",
        );
    }
    let gives_space_back = [".punch", ".unlink", ".rmdir"];
    let only_space = gives_space_back.iter().any(|end| site.ends_with(end));
    (only_space || site.ends_with(".reserve")).then_some("it only takes or gives back space")
}

/// Why nothing was found wrong with `mutant`.
pub(super) fn reason(mutant: &Mutant) -> Option<&'static str> {
    let Mutant::Swapped(first, second) = mutant else {
        return None;
    };
    let fits = |(a, b, _): &&(&str, &str, &str)| first.starts_with(a) && second.starts_with(b);
    FREE.iter().find(fits).map(|(_, _, reason)| *reason)
}

/// Swaps with an ordering point whose order is free: how the sites of the first and the second call begin, and why.
const FREE: &[(&str, &str, &str)] = &[
    ("", "root.part.create", NOT_NAMED),
    ("", "layer.data.create", NOT_NAMED),
    ("", "create.lock", NOT_NAMED),
    ("", "adopt.copy.create", NOT_NAMED),
    ("", "adopt.link", NOT_NAMED),
    ("create.", "open.dir.sync", "of different directories"),
    (
        "root.dir.sync",
        "create.part.unlink",
        "of different directories",
    ),
    ("layer.", "layer.", BEFORE_RENAME),
    ("layer.dir.sync", "active.flush.data", BEFORE_RENAME),
    ("adopt.", "active.flush.data", BEFORE_RENAME),
    ("adopt.copy.sync", "adopt.dir.sync", BEFORE_RENAME),
    ("adopt.dir.sync", "active.fill.write", "of different files"),
    ("open.dir.sync", "active.open.", NOT_OPEN),
    (
        "open.dir.sync",
        "adopt.dir.sync",
        "two syncs of one directory",
    ),
    ("active.open.", "adopt.dir.sync", "of different files"),
    (
        "active.open.tag_sync",
        "active.open.map_sync",
        "two syncs of one file",
    ),
    (
        "active.open.tag",
        "active.open.tag_sync",
        "live words come after the opening: see 'without active.open.tag_sync'",
    ),
    (
        "active.word.write_back",
        "active.open.map_sync",
        "the sync covers lines that were not written back (M10)",
    ),
    (
        "active.flush.data",
        "active.flush.map",
        "no word turned durable between the two",
    ),
    (
        "active.flush.data",
        "flush.mark.create",
        "the mark tells of a sync that failed, not of one that comes",
    ),
    ("active.flush.data", "", BESIDE),
    ("guest.store", "active.flush.", BESIDE),
    (
        "active.word",
        "active.flush.data",
        "the bytes that the word speaks of were written before both",
    ),
    (
        "active.word.fence",
        "",
        "nothing is promised for a cluster before the guest's own fence or a flush, and both come later still",
    ),
    (
        "flush.mark.create",
        "flush.mark.sync",
        "the next flush, which fails as well, syncs the mark again",
    ),
];

const NOT_NAMED: &str = "no root names the new file yet (I4)";
const BEFORE_RENAME: &str = "the root's rename needs both, and comes after both (I4)";
const NOT_OPEN: &str = "nothing is promised before the image is open, which needs both";
const BESIDE: &str = "what a guest stores beside a flush is promised nothing by it";

fn removal(site: &str) -> Option<&'static str> {
    let listed = NOT_FOR_CRASHES.iter().find(|(name, _)| *name == site);
    listed.map(|(_, reason)| *reason)
}
