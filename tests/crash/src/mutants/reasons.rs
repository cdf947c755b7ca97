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
const FREE: &[(&str, &str, &str)] = &[];

fn removal(site: &str) -> Option<&'static str> {
    let listed = NOT_FOR_CRASHES.iter().find(|(name, _)| *name == site);
    listed.map(|(_, reason)| *reason)
}
