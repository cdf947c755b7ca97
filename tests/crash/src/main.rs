// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask crash`: the search, and what it shows.

use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::Parser;
use clap::builder::PossibleValuesParser;
use pcow_crash::coverage::{self, Cells, contradictions, table};
use pcow_crash::errors::{Medium, Outcome, fail_all};
use pcow_crash::explorer::{Limits, Stats};
use pcow_crash::mutants::{Verdict, try_all};
use pcow_crash::search::{
    BRIEF, CLOSE, FAST, LONG, LONGEST, MANY, Recovered, THIN, WIDE, explore_long, explore_short,
    replay,
};
use pcow_crash::setting::{SCENES, Setting};
use pcow_crash::violation::{Trace, Violation};
use pcow_format::medium::Domain;

/// States that differ after recovery: in the test run, and in the long form.
const STATES: u64 = 1_000_000;
const LONG_STATES: u64 = 100_000_000;

/// Searches for crashes that break a promise of the image format.
///
/// The last line says how many states were judged that differ after recovery (in layers, map words or readable content,
/// whatever the payloads are), how many of them broke a promise, and how many there were in a second.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask crash", bin_name = "cargo xtask crash")]
struct Arguments {
    /// Search until 10^8 states differ after recovery, instead of 10^6
    #[arg(long)]
    long: bool,
    /// Where chance starts from in long workloads
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many states are to differ after recovery
    #[arg(long)]
    states: Option<u64>,
    /// Leave out the short workloads, all of which are tried otherwise
    #[arg(long)]
    no_short: bool,
    /// Only in this scene (may be repeated); all otherwise
    #[arg(long, value_name = "NAME", value_parser = scene_names(), conflicts_with_all = ["mutants", "errors", "replay"])]
    scene: Vec<String>,
    /// Put faults into the format, one at a time, and say whether the search finds them; only those with PART in their name
    #[arg(long, value_name = "PART", num_args = 0..=1, default_missing_value = "")]
    mutants: Option<String>,
    /// Let each call of each operation fail in every way, and say what comes of it
    #[arg(long)]
    errors: bool,
    /// Explore only what a violation named
    #[arg(long, value_name = "TRACE")]
    replay: Option<String>,
}

fn scene_names() -> PossibleValuesParser {
    PossibleValuesParser::new(SCENES.iter().map(|s| s.name))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.replay {
        Some(text) => again(text),
        None => match &arguments.mutants {
            Some(part) => mutants(part),
            None if arguments.errors => errors(),
            None => search(&arguments),
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn again(text: &str) -> Result<(), String> {
    let trace = Trace::parse(text).ok_or_else(|| format!("{text} is no trace"))?;
    let stats = replay(&trace).map_err(|v| v.to_string())?;
    println!("no violation in {} crash states", stats.states);
    Ok(())
}

fn errors() -> Result<(), String> {
    let media = [
        Medium::Sim(Domain::PageCache),
        Medium::Sim(Domain::Dax),
        Medium::Real,
    ];
    let mut total = 0;
    for medium in media {
        println!(
            "| {medium:?}: operation | call that fails | refused | tolerated |\n|---|---|---|---|"
        );
        for ((operation, call), outcomes) in fail_all(medium)? {
            let count = |o| outcomes.get(&o).copied().unwrap_or(0);
            let (refused, tolerated) = (count(Outcome::Refused), count(Outcome::Tolerated));
            total += refused + tolerated;
            println!("| {operation} | {call} | {refused} | {tolerated} |");
        }
    }
    println!("{total} failed calls, all handled");
    Ok(())
}

fn mutants(part: &str) -> Result<(), String> {
    let all = try_all(part, &|mutant, verdict| println!("{mutant}: {verdict}"));
    let count = |wanted: fn(&Verdict) -> bool| all.iter().filter(|(_, v)| wanted(v)).count();
    let missed = count(|v| *v == Verdict::Missed);
    println!(
        "{} mutants: {} caught, {} impossible, {} harmless for a reason, {missed} missed",
        all.len(),
        count(|v| matches!(v, Verdict::Caught(_))),
        count(|v| *v == Verdict::Impossible),
        count(|v| matches!(v, Verdict::Harmless(_)))
    );
    if missed > 0 {
        return Err("not every mutant was caught".to_owned());
    }
    Ok(())
}

/// How close to look at workloads of one operation, of two, and of three. In the test run a third of those of three are for the two plain media:
/// the others differ from them in what shorter workloads reach.
fn limits(scene: &str, long: bool) -> &'static [Limits] {
    match scene {
        "page-cache" | "dax" if long => &[CLOSE, WIDE, MANY],
        "page-cache" | "dax" => &[CLOSE, FAST, THIN],
        "page-cache-wide" | "dax-wide" => &[CLOSE],
        _ if long => &[CLOSE, FAST, BRIEF],
        _ => &[CLOSE, BRIEF],
    }
}

fn search(arguments: &Arguments) -> Result<(), String> {
    let start = Instant::now();
    let recovered = Recovered::default();
    let chosen = &arguments.scene;
    let scenes = SCENES
        .iter()
        .filter(|s| chosen.is_empty() || chosen.iter().any(|name| name == s.name));
    let settings: Vec<_> = scenes.map(|s| Setting::new(s, None)).collect();
    let searched = search_all(arguments, &settings, &recovered);
    let (violations, text) = match searched {
        Ok(wrong) => (0, wrong.join("\n")),
        Err(violation) => (1, violation.to_string()),
    };
    let (count, seconds) = (recovered.count(), start.elapsed().as_secs_f64());
    println!(
        "{count} states that differ after recovery, {violations} violations, {:.0} states per second",
        per_second(count, seconds)
    );
    if text.is_empty() { Ok(()) } else { Err(text) }
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn per_second(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds
}

/// Returns what is wrong with the table of what was cut off.
fn search_all(
    arguments: &Arguments,
    settings: &[Setting],
    recovered: &Recovered,
) -> Result<Vec<String>, Box<Violation>> {
    let wrong = if arguments.no_short {
        Vec::new()
    } else {
        search_short(arguments.long, settings, recovered)?
    };
    search_long(arguments, settings, recovered)?;
    Ok(wrong)
}

fn search_short(
    long: bool,
    settings: &[Setting],
    recovered: &Recovered,
) -> Result<Vec<String>, Box<Violation>> {
    let mut cells = Cells::new();
    for setting in settings {
        let (start, before, name) = (Instant::now(), recovered.count(), setting.scene.name);
        let stats = explore_short(limits(name, long), setting, recovered)?;
        say(name, &stats, recovered.count() - before, start.elapsed());
        coverage::add(&mut cells, stats.cells);
    }
    println!("{}", table(&cells));
    // What only some scenes reach says nothing of all.
    let is_whole = settings.len() == SCENES.len();
    Ok(if is_whole {
        contradictions(&cells)
    } else {
        Vec::new()
    })
}

fn search_long(
    arguments: &Arguments,
    settings: &[Setting],
    recovered: &Recovered,
) -> Result<(), Box<Violation>> {
    let (limits, states) = if arguments.long {
        (LONGEST, LONG_STATES)
    } else {
        (LONG, STATES)
    };
    let from_to = (arguments.seed, arguments.states.unwrap_or(states));
    let (start, before) = (Instant::now(), recovered.count());
    let told = Mutex::new(Instant::now());
    let progress = || {
        let mut told = told.lock().unwrap_or_else(|e| e.into_inner());
        if told.elapsed() > Duration::from_secs(30) {
            *told = Instant::now();
            eprintln!("{} states so far", recovered.count());
        }
    };
    let stats = explore_long(settings, limits, from_to, recovered, &progress)?;
    let new = recovered.count() - before;
    say("long workloads", &stats, new, start.elapsed());
    Ok(())
}

fn say(name: &str, stats: &Stats, new: u64, time: Duration) {
    println!(
        "{name}: {} workloads, {} acts, {} crash states, {new} new after recovery, {time:.0?}",
        stats.workloads, stats.acts, stats.states
    );
}
