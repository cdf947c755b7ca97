// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A backend that is killed again and again under load, and one that frontends come to and leave.
//!
//! What is wrong is counted and not asserted here, so that a long run tells everything at its end.

mod coming;
mod load;

use std::fmt;
use std::time::{Duration, Instant};

use pcow_protocol::frontend::{Frontend, FrontendOptions};

use crate::backend::Backend;
use crate::random::Random;
use crate::scratch::Scratch;
use crate::waiting::wait_until;

pub use coming::{Coming, Usage, come_and_go};
pub use load::{Difference, Load, Place, build};

/// Longer than any restart takes on a busy machine; only a fault that is lost reaches it.
const PATIENCE: Duration = Duration::from_secs(120);
/// A backend lives for a random time up to this after all that waited for it has gone on.
const LONGEST_LIFE_US: u64 = 40_000;

/// What a run of kills has shown.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// How often a backend was killed.
    pub kills: usize,
    /// Of those, how often at least one thread waited for the answer to a fault.
    pub in_service: usize,
    /// How many such threads there were, over all kills.
    pub parked: usize,
    /// From each such kill to the moment when the last of them had gone on, shortest first.
    pub resumed: Vec<Duration>,
    /// Touches of all threads.
    pub touches: u64,
    /// Flushes that were answered.
    pub flushes: u64,
    /// What was not as the oracle says.
    pub difference: Difference,
}

impl Report {
    /// Whether nothing was wrong and enough kills met a fault.
    pub fn is_good(&self) -> bool {
        self.difference == Difference::default() && self.in_service * 2 >= self.kills
    }

    fn resumed_ms(&self, percent: usize) -> f64 {
        let last = self.resumed.len().saturating_sub(1);
        let at = self.resumed.get(last * percent / 100);
        at.map_or(0.0, |d| d.as_secs_f64() * 1e3)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} touches, {} flushes; {} threads waited in all at the kills",
            self.touches, self.flushes, self.parked
        )?;
        writeln!(
            f,
            "from a kill until all that waited went on, in ms: {:.1} at least, {:.1} median, {:.1} 90 %, {:.1} 99 %, {:.1} at most",
            self.resumed_ms(0),
            self.resumed_ms(50),
            self.resumed_ms(90),
            self.resumed_ms(99),
            self.resumed_ms(100)
        )?;
        write!(
            f,
            "{} kills, {} of them with a fault in service: {}",
            self.kills, self.in_service, self.difference
        )
    }
}

/// Kills the backend of a frontend `kills` times at random moments, and starts another at once.
///
/// # Panics
/// If a thread that waits does not go on, or a program cannot be started.
pub fn kill_again_and_again(kills: usize, seed: u64, mut progress: impl FnMut(usize)) -> Report {
    let scratch = Scratch::new();
    let image = build(&scratch, seed);
    let mut backend = Backend::start(&image, &[]);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let load = Load::start(&frontend, seed);
    let mut random = Random::new(seed ^ 0x5ea);
    let mut report = Report::default();
    let flushes = std::thread::scope(|scope| {
        let flusher = scope.spawn(|| flush_until_stopped(&frontend, &load));
        for kill in 0..kills {
            std::thread::sleep(Duration::from_micros(random.below(LONGEST_LIFE_US)));
            let waiting = load.waiting();
            let killed_at = Instant::now();
            backend.kill();
            // Nobody can answer any more: who is in the same touch as before waits.
            let parked = load.still_in(&waiting);
            backend.restart(&image, &[]);
            let name = format!("{} threads go on after kill {kill}", parked.len());
            wait_until(&name, PATIENCE, || load.still_in(&parked).is_empty());
            report.note(&parked, killed_at.elapsed());
            progress(kill + 1);
        }
        load.stop();
        flusher.join().unwrap()
    });
    report.flushes = flushes;
    report.resumed.sort_unstable();
    let done = load.finish();
    report.touches = done.touches;
    drop(frontend);
    // The last one, too, does not end by itself.
    backend.kill();
    report.difference = done.compare_with_disk(&image);
    report
}

impl Report {
    fn note(&mut self, parked: &[Place], took: Duration) {
        self.kills += 1;
        self.parked += parked.len();
        if !parked.is_empty() {
            self.in_service += 1;
            self.resumed.push(took);
        }
    }
}

fn flush_until_stopped(frontend: &Frontend, load: &Load) -> u64 {
    let mut flushes = 0;
    while !load.is_stopped() {
        frontend.flush().unwrap();
        flushes += 1;
        std::thread::sleep(Duration::from_millis(20));
    }
    flushes
}
