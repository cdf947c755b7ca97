// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each system call of each operation of `pcow-img`, and of a backend that serves a guest, fails, is interrupted, does less than it
//! was asked for, or is the last.
//!
//! Whatever happens there is no panic; an error says what failed and why; a check finds nothing; every disk shows what it
//! showed, or what it is to show; and the operation can be done again.
//!
//! `PCOW_FAILING_CALLS` is a part of the command lines that the long form is to be of.
#![cfg(target_arch = "x86_64")]
#![allow(missing_docs, clippy::unwrap_used)]

mod judge;
mod operations;
mod serving;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::available_parallelism;

use judge::{Outcome, Whole};
use operations::{OPERATIONS, make};
use pcow_tests::random::Random;
use pcow_tests::scratch::Scratch;
use pcow_tests::tracer::{Call, Failure, Fault};

/// How many cases are tried in the test run.
const SAMPLE: usize = 1200;
/// The same, of a backend.
const SERVED: usize = 60;
const SEED: u64 = 1;

const FAILURES: [(&str, Failure); 6] = [
    ("EIO", Failure::Error(libc::EIO)),
    ("ENOSPC", Failure::Error(libc::ENOSPC)),
    ("ENOMEM", Failure::Error(libc::ENOMEM)),
    ("EINTR", Failure::Error(libc::EINTR)),
    ("short", Failure::Short),
    ("killed", Failure::Kill),
];

/// Where faults were found: an operation, and which call on which file. These are tried in every run.
const FOUND: &[(&str, &str, &str)] = &[
    // The folder of a new image was there, could not be opened, and stayed.
    ("create new 2M", "openat2", ".part"),
    // The files of the layer that was to join stayed, and a root without its name.
    ("snapshot vm third", "renameat", "image.json.part"),
    ("rollback vm first", "renameat", "image.json.part"),
    ("resize vm 4M", "renameat", "image.json.part"),
    (
        "receive replica second.stream",
        "renameat",
        "image.json.part",
    ),
    // The merged layer stayed, and the marks of the deletion.
    ("delete vm first", "renameat", "image.json.part"),
    // What was received was left under a name that nobody looks for, or that the error did not say.
    ("receive --abort cut", "fsync", ""),
    ("receive --abort cut", "unlinkat", "receive"),
    // What was joined and could not be listed was left under such a name.
    ("receive replica second.stream", "openat", ".part"),
    ("receive replica second.stream", "getdents64", ".part"),
    // A base of which nothing can be read was not spoken of.
    ("info --chain clone", "openat2", ".map"),
    ("info --chain clone", "pread64", ".map"),
    // A full filesystem was taken for a fault of the image.
    ("check vm", "openat2", ".map"),
    // What was interrupted failed.
    ("snapshot vm third", "openat2", "lock"),
    ("snapshot vm third", "fsync", "vm"),
    // The code of disks that differ, for an answer that could not be printed.
    ("compare vm clone", "write", "stdout"),
];

/// A case: an operation, by its place, and what fails in it.
type Case = (usize, Fault);

#[test]
fn a_call_that_fails_leaves_every_image_as_it_was_or_as_it_is_to_be() {
    println!("seed {SEED}");
    try_cases(|cases, wholes| {
        let was_wrong = |case: &Case| FOUND.iter().any(|found| is_of(case, wholes, found));
        for found in FOUND {
            let is_there = cases.iter().any(|case| is_of(case, wholes, found));
            assert!(is_there, "no such call: {found:?}");
        }
        let (mut chosen, others): (Vec<_>, Vec<_>) = cases.into_iter().partition(was_wrong);
        let more = SAMPLE.saturating_sub(chosen.len());
        chosen.extend(sample(others, more, &mut Random::new(SEED)));
        chosen
    });
}

#[test]
#[ignore = "takes an hour: cargo xtask crash --errors"]
fn each_call_that_fails_leaves_every_image_as_it_was_or_as_it_is_to_be() {
    let part = std::env::var("PCOW_FAILING_CALLS").unwrap_or_default();
    try_cases(|mut cases, _| {
        cases.retain(|(number, _)| OPERATIONS[*number].line.contains(&part));
        cases
    });
}

#[test]
fn a_guest_never_sees_that_a_call_of_its_backend_fails() {
    println!("seed {SEED}");
    // Whoever could not wait once gave up: nobody could ask for a snapshot any more, or the backend ended.
    let was_wrong = |(_, fault): &Case| {
        fault.name == "ppoll" && fault.failure == Failure::Error(libc::ENOMEM) && !fault.lasting
    };
    serve_cases(|cases| {
        let (mut chosen, others): (Vec<_>, Vec<_>) = cases.into_iter().partition(was_wrong);
        assert!(!chosen.is_empty(), "no such call");
        chosen.extend(sample(others, SERVED, &mut Random::new(SEED)));
        chosen
    });
}

#[test]
#[ignore = "takes an hour: cargo xtask crash --errors"]
fn a_guest_never_sees_that_any_call_of_its_backend_fails() {
    serve_cases(|cases| cases);
}

fn serve_cases(choose: impl Fn(Vec<Case>) -> Vec<Case>) {
    let start = start();
    let folder = start.path("images");
    let (calls, outcome) = serving::serve(&folder, None);
    assert_eq!(outcome, serving::Outcome::Missed);
    let all = cases(&calls, 0);
    let count = all.len();
    let chosen = choose(all);
    println!("{} cases of {count}", chosen.len());
    let results = Mutex::new((BTreeMap::<_, usize>::new(), Vec::new()));
    // A backend under a fault waits most of the time.
    on_all_processors(&chosen, 4, |(_, fault)| {
        let session = catch_unwind(|| serving::serve(&folder, Some(*fault)));
        let (outcomes, wrong) = &mut *results.lock().unwrap();
        match session {
            Ok((_, outcome)) => *outcomes.entry((fault.name, outcome)).or_default() += 1,
            // It has said what.
            Err(_) => wrong.push(describe(*fault)),
        }
    });
    let (outcomes, wrong) = results.into_inner().unwrap();
    println!("{} calls: {outcomes:#?}", calls.len());
    assert!(wrong.is_empty(), "{} cases: {wrong:#?}", wrong.len());
    let missed = outcomes
        .iter()
        .filter(|((_, o), _)| *o == serving::Outcome::Missed);
    assert_most_came(missed.map(|(_, count)| count).sum(), chosen.len());
}

/// A search that fails no call must not pass for one in which all is handled.
fn assert_most_came(missed: usize, cases: usize) {
    assert!(missed * 4 < cases, "{missed} calls of {cases} did not come");
}

/// Does `work` for each of `cases`. Whoever starts a process traces it: each thread has its own.
fn on_all_processors(cases: &[Case], threads_each: usize, work: impl Fn(&Case) + Sync) {
    let next = AtomicUsize::new(0);
    let take = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(case) = cases.get(number) else { break };
            if number > 0 && number.is_multiple_of(1000) {
                eprintln!("{number} of {}", cases.len());
            }
            work(case);
        }
    };
    std::thread::scope(|scope| {
        let threads = threads_each * available_parallelism().map_or(1, usize::from);
        (0..threads).for_each(|_| drop(scope.spawn(take)));
    });
}

fn start() -> Scratch {
    let start = Scratch::new();
    let folder = start.path("images");
    std::fs::create_dir(&folder).unwrap();
    make(&folder);
    start
}

fn try_cases(choose: impl Fn(Vec<Case>, &[Whole<'_>]) -> Vec<Case>) {
    let start = start();
    let folder = start.path("images");
    let whole = |operation| {
        Whole::new(&folder, operation).unwrap_or_else(|e| panic!("{}: {e}", operation.line))
    };
    let wholes: Vec<_> = OPERATIONS.iter().map(whole).collect();
    let numbered = (0..).zip(&wholes);
    let all: Vec<_> = numbered
        .flat_map(|(number, whole)| cases(&whole.calls, number))
        .collect();
    let count = all.len();
    let chosen = choose(all, &wholes);
    println!("{} cases of {count}", chosen.len());
    let results = Mutex::new((Table::default(), Vec::new()));
    on_all_processors(&chosen, 1, |(number, fault)| {
        let whole = &wholes[*number];
        let outcome = whole.attempt(&folder, *fault);
        let (table, wrong) = &mut *results.lock().unwrap();
        match outcome {
            Ok(outcome) => table.note(*number, outcome),
            Err(e) => {
                let text = format!("{}: {}: {e}", whole.operation.line, describe(*fault));
                eprintln!("{text}");
                wrong.push(text);
            }
        }
    });
    let (table, wrong) = results.into_inner().unwrap();
    table.print(&wholes);
    assert_most_came(table.count(Outcome::Missed), chosen.len());
    assert!(
        wrong.is_empty(),
        "{} cases:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

fn describe(fault: Fault) -> String {
    let Fault {
        name,
        number,
        failure,
        lasting,
    } = fault;
    let how = FAILURES.iter().find(|(_, f)| *f == failure).unwrap().0;
    let lasting = if lasting { " and all later ones" } else { "" };
    format!("{name} {number}{lasting} ({how})")
}

/// Whether a case is about a call of `operation` of that name, on a file whose name ends so.
fn is_of(
    (number, fault): &Case,
    wholes: &[Whole<'_>],
    (operation, name, file): &(&str, &str, &str),
) -> bool {
    let whole = &wholes[*number];
    let mut calls = whole.calls.iter().filter(|call| call.name == fault.name);
    let call = calls.nth(usize::try_from(fault.number).unwrap());
    whole.operation.line == *operation
        && fault.name == *name
        && call.is_some_and(|call| call.file.to_string_lossy().ends_with(file))
}

/// Every way in which each call of an operation can fail.
fn cases(calls: &[Call], number: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for call in calls {
        let before = seen.entry(call.name).or_default();
        for (_, failure) in FAILURES {
            for lasting in [false, true] {
                let fault = Fault {
                    name: call.name,
                    number: *before,
                    failure,
                    lasting,
                };
                let is_case = match failure {
                    Failure::Short => call.amount > 1,
                    Failure::Kill => !lasting,
                    Failure::Error(_) => true,
                };
                if is_case {
                    cases.push((number, fault));
                }
            }
        }
        *before += 1;
    }
    cases
}

/// A sample that has each kind of call of each operation first, and each way to fail of each kind of call.
fn sample(mut cases: Vec<Case>, size: usize, random: &mut Random) -> Vec<Case> {
    for end in (1..cases.len()).rev() {
        let other = random.below(u64::try_from(end + 1).unwrap());
        cases.swap(end, usize::try_from(other).unwrap());
    }
    let mut kinds = BTreeSet::new();
    let mut ways = BTreeSet::new();
    let is_first = |(number, fault): &Case| {
        let way = format!("{:?} {}", fault.failure, fault.lasting);
        let first_of_kind = kinds.insert((*number, fault.name));
        ways.insert((fault.name, way)) || first_of_kind
    };
    let (mut sample, others): (Vec<_>, Vec<_>) = cases.into_iter().partition(is_first);
    let room = size.saturating_sub(sample.len());
    sample.extend(others.into_iter().take(room));
    sample
}

/// What came of the cases of each operation.
#[derive(Default)]
struct Table(BTreeMap<usize, BTreeMap<Outcome, usize>>);

impl Table {
    fn note(&mut self, number: usize, outcome: Outcome) {
        *self
            .0
            .entry(number)
            .or_default()
            .entry(outcome)
            .or_default() += 1;
    }

    fn count(&self, outcome: Outcome) -> usize {
        let of = |outcomes: &BTreeMap<_, _>| outcomes.get(&outcome).copied().unwrap_or(0);
        self.0.values().map(of).sum()
    }

    fn print(&self, wholes: &[Whole<'_>]) {
        println!("| operation | calls | cases | refused | tolerated | killed | did not come |");
        println!("|---|---|---|---|---|---|---|");
        for (number, outcomes) in &self.0 {
            let whole = &wholes[*number];
            let count = |o| outcomes.get(&o).copied().unwrap_or(0);
            println!(
                "| {} | {} | {} | {} | {} | {} | {} |",
                whole.operation.line,
                whole.calls.len(),
                outcomes.values().sum::<usize>(),
                count(Outcome::Refused),
                count(Outcome::Tolerated),
                count(Outcome::Killed),
                count(Outcome::Missed)
            );
        }
    }
}
