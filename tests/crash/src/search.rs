// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Searches on two threads: all short workloads of a scene, and long random ones over all scenes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::digest::DigestSet;
use crate::explorer::{Explorer, Limits, Stats};
use crate::random::Random;
use crate::setting::{Scene, Setting};
use crate::violation::{Trace, Violation};
use crate::workload::{OPERATIONS, Operation};

/// For single operations.
pub const CLOSE: Limits = Limits {
    name: "close",
    workloads: 1,
    acts: 1,
    exhaustive: 32,
    samples: 12,
    nested: 3,
    uses: 6,
    deaths: 1,
    depth: 1,
    contents: 16,
};

/// Where there are many workloads.
pub const WIDE: Limits = Limits {
    name: "wide",
    workloads: 1,
    acts: 1,
    exhaustive: 12,
    samples: 6,
    nested: 2,
    uses: 1,
    deaths: 1,
    depth: 1,
    contents: 8,
};

/// Where there are very many.
pub const FAST: Limits = Limits {
    name: "fast",
    workloads: 1,
    acts: 1,
    exhaustive: 6,
    samples: 4,
    nested: 1,
    uses: 1,
    deaths: 1,
    depth: 3,
    contents: 4,
};

/// For three operations in the long form: a death after each act takes half as long again, and pairs have it.
pub const MANY: Limits = Limits {
    name: "many",
    deaths: 3,
    ..FAST
};

/// Where there are more still.
pub const BRIEF: Limits = Limits {
    name: "brief",
    workloads: 1,
    acts: 3,
    exhaustive: 4,
    samples: 3,
    nested: 1,
    uses: 1,
    deaths: 16,
    depth: 16,
    contents: 8,
};

/// The same for one in three, in the test run.
pub const THIN: Limits = Limits {
    name: "thin",
    workloads: 3,
    ..BRIEF
};

/// For long random workloads: most of what they leave is new.
pub const LONG: Limits = Limits {
    name: "long",
    workloads: 1,
    acts: 5,
    exhaustive: 8,
    samples: 8,
    nested: 1,
    uses: 1,
    deaths: 2,
    depth: 2,
    contents: 4096,
};

/// For the long form: the more contents are looked at behind one opening, the less time goes into openings.
pub const LONGEST: Limits = Limits {
    name: "longest",
    contents: 16384,
    ..LONG
};

/// The limits that a trace calls so.
pub fn limits_named(name: &str) -> Option<Limits> {
    let all = [CLOSE, WIDE, FAST, MANY, BRIEF, THIN, LONG, LONGEST];
    all.into_iter().find(|limits| limits.name == name)
}

/// Stores with which a long workload begins, at most, before its first flush.
const MAX_FIRST_STORES: usize = 40;
/// Operations of a long workload after that, at most.
const MAX_OPERATIONS: usize = 64;
/// Operations to choose from, at most, where there are only a few.
const MAX_FEW: usize = 12;

/// Threads of a search.
const THREADS: usize = 2;

const SHARDS: usize = 64;

/// Digests of what there was after recovery, each once.
#[derive(Debug)]
pub struct Recovered {
    shards: Vec<Mutex<DigestSet>>,
    count: AtomicU64,
}

impl Default for Recovered {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            count: AtomicU64::new(0),
        }
    }
}

impl Recovered {
    /// Notes one.
    pub fn note(&self, digest: u64) {
        // Not by the bits that the set itself goes by.
        let shard = usize::try_from(digest >> 32).unwrap_or(0) % SHARDS;
        let mut shard = self.shards[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if shard.insert(digest) {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many different ones there were.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// A sequence of operations.
pub type Workload = Vec<&'static Operation>;

/// Every sequence of `length` operations.
pub fn workloads(length: u32) -> Vec<Workload> {
    let table: Workload = OPERATIONS.iter().filter(|o| o.in_short).collect();
    let all = table.len();
    let digit = |number: usize, place: u32| number / all.pow(place) % all;
    let one = |number| {
        let digits = (0..length).map(|place| digit(number, place));
        digits.map(|d| table[d]).collect()
    };
    (0..all.pow(length)).map(one).collect()
}

/// Longer workloads in which something happens that no two operations bring about.
const LONGER: &[&[&str]] = &[
    &["touch", "flush", "give back clean"],
    &["snapshot", "store to base", "older root"],
    &["store to leftover", "flush", "give back clean"],
    // Another process does not know yet which clusters have storage.
    &["store to absent", "kill", "store to absent"],
    &["store to zero", "kill", "store to zero"],
    &["store to leftover", "kill", "store to leftover"],
    &["store to absent", "kill", "live snapshot"],
    &["store to absent", "kill", "delete below a sealed layer"],
    // In another boot what was live is absent, and its bytes are left over.
    &["store to absent", "reboot", "store to absent"],
    &["store to absent", "reboot", "touch"],
    &["store to absent", "reboot", "live snapshot"],
    &["store to absent", "reboot", "delete below a sealed layer"],
    &["write zeros", "snapshot", "store to base"],
    &["store to leftover", "snapshot", "store to leftover"],
    // Names of layers come back.
    &["store to base", "rebase", "power cut", "repair"],
    &[
        "store to base",
        "rebase",
        "power cut",
        "flush that fails, and repair",
    ],
    // Marks of a deletion that is over come back, and with them the root before it.
    &[
        "delete below a sealed layer",
        "flush, store after its sync",
        "older root",
    ],
    // A mark that stays would be about a layer which the first root does not name.
    &[
        "snapshot",
        "delete below a sealed layer",
        "store to base",
        "oldest root",
    ],
    &[
        "store to absent",
        "reboot",
        "delete below a sealed layer, beside a guest",
    ],
    // Clusters share their storage with a copy.
    &[
        "flush, store before its sync",
        "copy by reflink",
        "flush, store before its sync",
    ],
    &[
        "flush, store after its sync",
        "copy by reflink",
        "flush, store after its sync",
    ],
    // What the image was rolled back from has nothing on it.
    &["snapshot", "store to base", "rollback", "delete the newest"],
    &["snapshot", "store to base", "snapshot", "delete the newest"],
    // Names that were removed come back.
    &["snapshot", "resize", "power cut"],
    &["snapshot", "resize", "resize", "power cut"],
    // Clusters whose storage another process has given, and clusters that it gave up.
    &[
        "store to absent",
        "kill",
        "delete below a sealed layer, sharing",
    ],
    &[
        "store to absent",
        "give up",
        "delete below a sealed layer, sharing",
    ],
    // Under the older root, the active layer lies on the base that it left, and holds less than it did then.
    &[
        "rebase",
        "snapshot",
        "rebase",
        "rebase on nothing",
        "write zeros",
        "older root",
    ],
    &[
        "delete below a sealed layer, beside a guest",
        "rebase on nothing",
        "write zeros",
        "older root",
    ],
    // The older root's layer was last used in another boot.
    &["snapshot", "reboot", "store to base", "flush", "older root"],
];

/// Those longer workloads.
pub fn longer() -> Vec<Workload> {
    let named = |name: &&str| Operation::named(name).expect("in the table");
    let workload = |names: &&[&str]| names.iter().map(named).collect();
    LONGER.iter().map(workload).collect()
}

/// Runs `work` for the numbers from 0 on, until it says that there is no more or one finds a violation.
fn on_threads<'a, E>(
    begin: impl Fn() -> E + Sync,
    work: impl Fn(&mut E, u64) -> Result<bool, Box<Violation>> + Sync,
    end: impl Fn(E) -> Stats + Sync + 'a,
) -> Result<Stats, Box<Violation>> {
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let total = Mutex::new(Ok(Stats::default()));
    let thread = || {
        let mut explorer = begin();
        let mut result = Ok(true);
        while matches!(result, Ok(true)) && !stop.load(Ordering::Relaxed) {
            result = work(&mut explorer, next.fetch_add(1, Ordering::Relaxed));
        }
        let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *total, result) {
            (Ok(total), Ok(_)) => total.add(end(explorer)),
            (total @ Ok(_), Err(violation)) => {
                stop.store(true, Ordering::Relaxed);
                *total = Err(violation);
            }
            (Err(_), _) => {}
        }
    };
    std::thread::scope(|scope| {
        (1..THREADS).for_each(|_| drop(scope.spawn(thread)));
        thread();
    });
    total.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Explores workloads, up to the first violation.
pub fn explore(
    setting: &Setting,
    limits: Limits,
    workloads: &[Workload],
    recovered: &Recovered,
) -> Result<Stats, Box<Violation>> {
    on_threads(
        || Explorer::new(setting, limits, recovered),
        |explorer, number| {
            let workload = usize::try_from(number).ok().and_then(|n| workloads.get(n));
            match workload {
                // The number's digits are its operations: what is left has each of them in each place.
                Some(_) if !number.is_multiple_of(limits.workloads) => Ok(true),
                Some(workload) => explorer.explore(workload, number).map(|_| true),
                None => Ok(false),
            }
        },
        |explorer| explorer.stats,
    )
}

/// Explores the opening alone, the longer workloads, and all workloads of one operation, of two, and so on, each within its
/// limits.
pub fn explore_short(
    limits: &[Limits],
    setting: &Setting,
    recovered: &Recovered,
) -> Result<Stats, Box<Violation>> {
    let first = workloads(0).into_iter().chain(longer());
    let mut total = explore(setting, CLOSE, &first.collect::<Vec<_>>(), recovered)?;
    for (limits, length) in limits.iter().zip(1..) {
        total.add(explore(setting, *limits, &workloads(length), recovered)?);
    }
    Ok(total)
}

/// A long workload by chance: stores and a flush, so that there is something to lose, then anything. Returns also how
/// many operations come before the anything. Every second one is of a few operations only, again and again: among all of
/// them, those that meet badly rarely do.
pub fn long_workload(random: &mut Random) -> (Workload, usize) {
    let weights = OPERATIONS.iter().flat_map(|o| vec![o; o.weight]);
    let mut weighted: Workload = weights.collect();
    if random.once_in(2) {
        let few = 4 + random.below(MAX_FEW - 3);
        weighted = (0..few)
            .map(|_| weighted[random.below(weighted.len())])
            .collect();
    }
    let stores = random.below(MAX_FIRST_STORES);
    let named = |name| Operation::named(name).expect("in the table");
    let mut workload = vec![named("store anywhere"); stores];
    workload.push(named("flush"));
    let first = workload.len();
    for _ in 0..2 + random.below(MAX_OPERATIONS - 1) {
        workload.push(weighted[random.below(weighted.len())]);
    }
    (workload, first)
}

/// Explores long random workloads over all scenes, from `seed` on, until there are `wanted` states that differ after recovery.
pub fn explore_long(
    settings: &[Setting],
    limits: Limits,
    (seed, wanted): (u64, u64),
    recovered: &Recovered,
    progress: &(impl Fn() + Sync),
) -> Result<Stats, Box<Violation>> {
    on_threads(
        || {
            let explorer = |s| Explorer::new(s, limits, recovered);
            settings.iter().map(explorer).collect::<Vec<_>>()
        },
        |explorers, number| {
            if recovered.count() >= wanted {
                return Ok(false);
            }
            progress();
            let seed = Random(seed.wrapping_add(number << 32)).number();
            let mut random = Random(seed);
            let explorer = usize::try_from(number).unwrap_or(0) % explorers.len();
            let (workload, first) = long_workload(&mut random);
            let explored = explorers[explorer].explore_from(first, &workload, seed);
            explored
                .map(|_| true)
                .map_err(|v| shorten(&settings[explorer], v))
        },
        |explorers| {
            let mut total = Stats::default();
            explorers.into_iter().for_each(|e| total.add(e.stats));
            total
        },
    )
}

/// Leaves out operations without which the violation is still found. What comes of that has a trace of its own: it was found
/// by looking more closely, and at all of its operations.
fn shorten(setting: &Setting, mut violation: Box<Violation>) -> Box<Violation> {
    let recovered = Recovered::default();
    let mut i = 0;
    while i < violation.trace.operations.len() {
        let mut fewer = violation.trace.operations.clone();
        fewer.remove(i);
        let mut explorer = Explorer::new(setting, CLOSE, &recovered);
        match explorer.explore_from(0, &fewer, violation.trace.seed) {
            Err(shorter) => violation = shorter,
            Ok(_) => i += 1,
        }
    }
    violation
}

/// Explores once more what was explored when a violation was found.
pub fn replay(trace: &Trace) -> Result<Stats, Box<Violation>> {
    let scene = Scene::named(trace.scene).expect("a trace names a scene");
    replay_on(&Setting::new(scene, None), trace)
}

/// The same, on a setting of that scene that may have a fault.
pub fn replay_on(setting: &Setting, trace: &Trace) -> Result<Stats, Box<Violation>> {
    let recovered = Recovered::default();
    let mut explorer = Explorer::new(setting, trace.limits, &recovered);
    explorer.replay(trace)?;
    Ok(explorer.stats)
}
