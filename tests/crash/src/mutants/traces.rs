// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which calls follow each other in which workloads, and those workloads with their calls in another order.

use std::collections::{BTreeMap, BTreeSet};

use pcow_format::medium::sim::{Moment, replay};

use super::Mutant;
use crate::explorer::Explorer;
use crate::search::{Recovered, WIDE, Workload};
use crate::setting::{Scene, Setting};
use crate::sites::is_of_others;
use crate::workload::{Expected, Point, Run};

/// Workloads in which a mutant is tried, at most, in each scene, if there are enough that end in the same operation.
const MAX_TRIES: usize = 16;
/// Enough of those.
const MIN_TRIES: usize = 4;

/// What short workloads of one scene do.
#[derive(Debug)]
pub(super) struct Traces {
    setting: Setting,
    /// Call sites, with the numbers of the workloads in which there are such calls.
    sites: BTreeMap<&'static str, BTreeSet<u64>>,
    /// Workloads, with the place in the last operation where the calls are.
    places: BTreeMap<Mutant, Vec<(Workload, usize)>>,
}

/// What became of a mutant in one scene.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tried {
    Caught(String),
    Impossible,
    Missed,
}

impl Traces {
    /// Performs all workloads of one operation and of two.
    pub(super) fn record(scene: &'static Scene) -> Self {
        let mut traces = Self {
            setting: Setting::new(scene, None),
            sites: BTreeMap::new(),
            places: BTreeMap::new(),
        };
        for (number, workload) in (0..).zip(super::tried()) {
            if let Some(done) = perform(&traces.setting, &workload) {
                traces.note_calls(number, &done.calls);
                traces.note_order(&workload, &done.points);
            }
        }
        traces
    }

    fn note_calls(&mut self, workload: u64, calls: &BTreeSet<&'static str>) {
        for site in calls {
            self.sites.entry(site).or_default().insert(workload);
        }
    }

    fn note_order(&mut self, workload: &Workload, points: &[Point]) {
        let sites: Vec<_> = points.iter().map(|p| p.moment.act().site.0).collect();
        let mut note = |mutant, place| {
            let places: &mut Vec<(Workload, usize)> = self.places.entry(mutant).or_default();
            let last = |w: &Workload| w.last().map(|o| o.name);
            let alike = places.iter().filter(|(w, _)| last(w) == last(workload));
            if places.len() < MAX_TRIES || alike.count() < MIN_TRIES {
                places.push((workload.clone(), place));
            }
        };
        for (i, pair) in sites.windows(2).enumerate() {
            let by_user = pair.iter().any(|site| site.starts_with("user."));
            // A user begins when a program has ended, and the other way round.
            let by_others = pair.iter().all(|site| is_of_others(site));
            if !by_user && !by_others {
                note(Mutant::Swapped(pair[0], pair[1]), i);
            }
        }
        if let Some(last) = sites.last().filter(|s| !is_of_others(s)) {
            note(Mutant::Hasty(last), sites.len() - 1);
        }
    }

    pub(super) fn scene(&self) -> &'static Scene {
        self.setting.scene
    }

    /// Whether a call at `site` was made.
    pub(super) fn has(&self, site: &str) -> bool {
        self.sites.contains_key(site)
    }

    /// Whether one was made in the workload of that number.
    pub(super) fn has_in(&self, site: &str, workload: u64) -> bool {
        let with_it = self.sites.get(site);
        with_it.is_some_and(|w| w.contains(&workload))
    }

    /// Orders in which the calls could have come.
    pub(super) fn mutants(&self) -> Vec<Mutant> {
        self.places.keys().copied().collect()
    }

    /// Tries a mutant in every workload in which it is one; `None` if there is none.
    pub(super) fn attempt(&self, mutant: &Mutant) -> Option<Tried> {
        let mut result = Tried::Impossible;
        for (seed, (workload, place)) in (0..).zip(self.places.get(mutant)?) {
            let done = perform(&self.setting, workload)?;
            let crashes = match mutant {
                Mutant::Hasty(_) => hasty(&done.before, &done.points),
                _ => swapped(&done.before, &done.points, *place),
            };
            let Some(crashes) = crashes else { continue };
            result = Tried::Missed;
            let recovered = Recovered::default();
            let mut explorer = Explorer::new(&self.setting, WIDE, &recovered);
            explorer.start(seed);
            for (moment, expected) in &crashes {
                if let Err(broken) = explorer.crash(moment, expected, done.boot) {
                    let names: Vec<_> = workload.iter().map(|o| o.name).collect();
                    let (scene, names) = (self.scene().name, names.join(", "));
                    return Some(Tried::Caught(format!(
                        "{} ({scene}: {names})",
                        broken.problem
                    )));
                }
            }
        }
        Some(result)
    }
}

/// A workload that was performed.
struct Done {
    /// The filesystem before its last operation.
    before: Moment,
    /// The calls of that.
    points: Vec<Point>,
    /// The sites of all its calls.
    calls: BTreeSet<&'static str>,
    /// The boot that it ended in.
    boot: u128,
}

/// `None` if it cannot be done.
fn perform(setting: &Setting, workload: &Workload) -> Option<Done> {
    let mut run = Run::new(setting, 1).expect("the start of every scene opens");
    let mut points = run.points();
    let mut calls = BTreeSet::new();
    let mut note = |points: &[Point]| calls.extend(points.iter().map(|p| p.moment.act().site.0));
    note(&points);
    for operation in workload {
        if !run.perform(operation).expect("the format is sound") {
            return None;
        }
        points = run.points();
        note(&points);
    }
    Some(Done {
        before: run.before()?.clone(),
        points,
        calls,
        boot: run.boot,
    })
}

type Crashes = Vec<(Moment, Expected)>;

/// The last operation is over before its last call: what follows may meet a crash first.
fn hasty(before: &Moment, points: &[Point]) -> Option<Crashes> {
    let (last, earlier) = points.split_last()?;
    let moment = earlier.last().map_or(before, |p| &p.moment);
    Some(vec![(moment.clone(), last.expected.clone())])
}

/// The calls at `place` and behind it come in the other order. `None` if they cannot.
fn swapped(before: &Moment, points: &[Point], place: usize) -> Option<Crashes> {
    let start = place.checked_sub(1).map_or(before, |i| &points[i].moment);
    let mut acts: Vec<_> = points[place..].iter().map(|p| p.moment.clone()).collect();
    acts.swap(0, 1);
    let moments = replay(start, &acts)?;
    // Between the two, either may count as done: what the first was part of may have been answered.
    let mut between = points[place].expected.clone();
    between
        .possible
        .extend(points[place + 1].expected.possible.iter().cloned());
    let mut crashes = vec![(moments[0].clone(), between)];
    // Then the same calls were made. It is at a rename, when a name goes, or at the latest at the end, that one of them is missed.
    let rest: Vec<_> = moments.into_iter().zip(&points[place..]).skip(1).collect();
    let last = rest.len();
    for (i, (moment, point)) in rest.into_iter().enumerate() {
        let site = moment.act().site.0;
        let counts = site.ends_with(".rename") || site.ends_with(".unlink");
        if i == 0 || counts || i + 1 == last {
            crashes.push((moment, point.expected.clone()));
        }
    }
    Some(crashes)
}
