// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Formats with one fault each, from the call sites: a call left out, two neighbours swapped, an answer given before the
//! last call. The search must find each of them; where it cannot, there is a reason.

mod named;
pub use named::two_writers;
mod reasons;
mod traces;

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use pcow_format::medium::Site;
use pcow_format::mutant::{self, Mutant as Flaw};

use crate::explorer::Explorer;
use crate::search::{CLOSE, Recovered, WIDE, Workload, longer, workloads};
use crate::setting::{Scene, Setting};
use crate::sites;
use traces::Traces;

/// A format with one fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutant {
    /// One that no swap or removal makes.
    Named(&'static str),
    /// The calls at a site do nothing.
    Without(&'static str),
    /// The second call comes before the first.
    Swapped(&'static str, &'static str),
    /// An operation ends before its last call.
    Hasty(&'static str),
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(what) => f.write_str(what),
            Self::Without(site) => write!(f, "without {site}"),
            Self::Swapped(first, second) => write!(f, "{second} before {first}"),
            Self::Hasty(site) => write!(f, "answer before {site}"),
        }
    }
}

/// What became of a mutant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The search found what is wrong with it.
    Caught(String),
    /// The second call needs what the first one makes.
    Impossible,
    /// Nothing is wrong with it, for that reason.
    Harmless(&'static str),
    /// The search did not find it.
    Missed,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caught(problem) => write!(f, "caught: {problem}"),
            Self::Impossible => f.write_str("impossible: the second needs what the first makes"),
            Self::Harmless(reason) => write!(f, "harmless: {reason}"),
            Self::Missed => f.write_str("MISSED"),
        }
    }
}

/// The scenes that mutants are tried in.
const SCENES: [&str; 4] = [
    "page-cache",
    "dax",
    "dax-to-page-cache",
    "page-cache-to-dax",
];

/// Tries every mutant whose name has `part` in it on two threads; calls `tell` for each as it is done.
pub fn try_all(part: &str, tell: &(impl Fn(&Mutant, &Verdict) + Sync)) -> Vec<(Mutant, Verdict)> {
    let traces: Vec<_> = SCENES.map(|s| Traces::record(named_scene(s))).into();
    let mut mutants = enumerate(&traces);
    mutants.retain(|m| m.to_string().contains(part));
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let work = || {
        while let Some(mutant) = mutants.get(next.fetch_add(1, Ordering::Relaxed)) {
            let verdict = verdict(mutant, &traces);
            tell(mutant, &verdict);
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            done.push((*mutant, verdict));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(mutant, _)| *mutant);
    done
}

/// Tries the mutants that have a name.
pub fn try_named() -> Vec<(Mutant, Verdict)> {
    let names = named::ALL.iter().map(|n| Mutant::Named(n.name));
    names.map(|m| (m, verdict(&m, &[]))).collect()
}

fn named_scene(name: &str) -> &'static Scene {
    Scene::named(name).expect("a scene of the table")
}

fn enumerate(traces: &[Traces]) -> Vec<Mutant> {
    let mut mutants: Vec<_> = named::ALL.iter().map(|n| Mutant::Named(n.name)).collect();
    let sites = sites::all();
    mutants.extend(sites.iter().map(|s| Mutant::Without(s)));
    let mut orders: Vec<_> = traces.iter().flat_map(Traces::mutants).collect();
    orders.sort_unstable();
    orders.dedup();
    mutants.extend(orders);
    mutants
}

fn verdict(mutant: &Mutant, traces: &[Traces]) -> Verdict {
    if let Some(reason) = reasons::without_trial(mutant) {
        return Verdict::Harmless(reason);
    }
    let found = match mutant {
        Mutant::Named(name) => named::catch(name),
        Mutant::Without(site) => without(site, traces),
        Mutant::Swapped(..) | Mutant::Hasty(_) => {
            let tried: Vec<_> = traces.iter().filter_map(|t| t.attempt(mutant)).collect();
            if !tried.is_empty() && tried.iter().all(|t| *t == traces::Tried::Impossible) {
                return Verdict::Impossible;
            }
            tried.into_iter().find_map(|t| match t {
                traces::Tried::Caught(problem) => Some(problem),
                _ => None,
            })
        }
    };
    match (found, reasons::reason(mutant)) {
        (Some(problem), _) => Verdict::Caught(problem),
        (None, Some(reason)) => Verdict::Harmless(reason),
        (None, None) => Verdict::Missed,
    }
}

/// The first violation of the format without the calls at `site`, in the workloads that have such calls. If there are none, in
/// all: they are made after a crash.
fn without(site: &'static str, traces: &[Traces]) -> Option<String> {
    let nowhere = traces.iter().all(|t| !t.has(site));
    let with_it = traces.iter().filter(|t| nowhere || t.has(site));
    with_it.into_iter().find_map(|t| {
        let setting = Setting::new(t.scene(), Some(Site(site)));
        first_violation(&setting, None, |n, _| nowhere || t.has_in(site, n))
    })
}

/// The workloads that mutants are tried on: the opening alone, one operation, two, and a few of three.
fn tried() -> Vec<Workload> {
    let short = (0..=2).flat_map(workloads);
    // These first: they are few.
    longer().into_iter().chain(short).collect()
}

/// The first violation in those workloads of [`tried`] that are wanted, by their number or themselves, with a flaw in the format.
fn first_violation(
    setting: &Setting,
    flaw: Option<Flaw>,
    wanted: impl Fn(u64, &Workload) -> bool,
) -> Option<String> {
    let recovered = Recovered::default();
    mutant::set(flaw);
    let violation = (0..).zip(tried()).find_map(|(seed, workload)| {
        let limits = if workload.len() == 2 { WIDE } else { CLOSE };
        let mut explorer = Explorer::new(setting, limits, &recovered);
        let explored = wanted(seed, &workload).then(|| explorer.explore(&workload, seed).err());
        explored.flatten()
    });
    mutant::set(None);
    violation.map(|v| format!("{} ({})", v.problem, v.trace))
}
