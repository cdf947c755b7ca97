// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The speed of `pcow-img`, beside others that do the same, or the least that it takes.

mod check;
mod content;
mod create;

use std::fs::File;
use std::process::Command;
use std::time::Instant;

use pcow_tests::program;

use crate::Effort;
use crate::place::Place;
use crate::stats::text;

/// Prints all tables of `place`.
///
/// # Panics
/// If something that is compared with is not there.
pub fn report(place: &Place, effort: &Effort) {
    println!(
        "pcow-img on {}, against {}. Medians, and from where to where they went, of {} rounds, turn and turn about; what is \
         read is in the page cache, and nothing waits to be written when a turn starts.\n",
        place.filesystem,
        peer_version(),
        effort.conversions
    );
    head();
    content::report(place, effort);
    check::report(place, effort);
    println!(
        "\nCreations, {} rounds (goal: at most twice as many bare creations as there are new files, each written, synced, and \
         its folder synced):\n",
        effort.starts
    );
    create::report(place, effort);
}

/// What was measured in one round: `pcow-img`, and what it is compared with.
struct Turn {
    ours: f64,
    other: f64,
}

fn head() {
    println!("| what | pcow-img | against | which took | ratio |");
    println!("|---|---|---|---|---|");
}

fn row(what: &str, against: &str, turns: &[Turn]) {
    let of = |side: fn(&Turn) -> f64| text(turns.iter().map(side).collect(), 2);
    println!(
        "| {what} | {} | {against} | {} | {} |",
        of(|t| t.ours),
        of(|t| t.other),
        of(|t| t.ours / t.other)
    );
}

fn pcow_img() -> Command {
    let mut command = Command::new(program("pcow-img"));
    command.arg("--quiet");
    command
}

/// The seconds from the start of a process to its end.
fn seconds(command: &mut Command) -> f64 {
    let begin = Instant::now();
    let output = command.output().unwrap();
    let took = begin.elapsed();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    took.as_secs_f64()
}

/// Leaves nothing to write, so that a turn pays for nobody else's.
fn settle(place: &Place) {
    rustix::fs::syncfs(File::open(&place.dir).unwrap()).unwrap();
}

fn peer_version() -> String {
    let output = Command::new("qemu-img").arg("--version").output();
    let output = output.unwrap_or_else(|e| {
        panic!("there is nothing to compare with: qemu-img cannot be run ({e}); it is in Debian's package qemu-utils")
    });
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().unwrap_or("qemu-img").to_owned()
}
