// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why some faults cannot be found by a crash.

use super::Mutant;

/// Calls whose absence no crash shows.
const NOT_FOR_CRASHES: &[(&str, &str)] = &[
    ("active.give_back.punch", "gives space back"),
    ("active.give_back_clean.punch", "gives space back"),
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
    ("layer.unlink", "gives space back"),
    ("sweep.part.unlink", "gives space back"),
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

/// Why a swap of such calls is none, without trying.
pub(super) fn by_kind(mutant: &Mutant) -> Option<&'static str> {
    let Mutant::Swapped(first, second) = mutant else {
        return None;
    };
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

/// Why nothing is wrong with `mutant`.
pub(super) fn reason(mutant: &Mutant) -> Option<&'static str> {
    match mutant {
        Mutant::Named(_) => None,
        Mutant::Without(site) => removal(site),
        Mutant::Swapped(..) | Mutant::Hasty(_) => None,
    }
}

fn removal(site: &str) -> Option<&'static str> {
    let listed = NOT_FOR_CRASHES.iter().find(|(name, _)| *name == site);
    listed.map(|(_, reason)| *reason)
}
