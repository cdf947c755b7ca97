// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A bar on a terminal for what takes longer than a second; nothing otherwise, and nothing with `--quiet`.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How long a command may take in silence.
const SILENCE: Duration = Duration::from_secs(1);

/// How far a command is.
#[derive(Debug)]
pub struct Progress {
    start: Instant,
    total: u64,
    done: u64,
    wanted: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Of `total` bytes nothing is done.
    pub fn new(total: u64, quiet: bool) -> Self {
        Self {
            start: Instant::now(),
            total,
            done: 0,
            wanted: !quiet && stderr().is_terminal(),
            bar: None,
        }
    }

    /// It is `total` bytes.
    pub fn expect(&mut self, total: u64) {
        self.total = total;
    }

    /// All before `done` is done.
    pub fn reach(&mut self, done: u64) {
        self.done = done;
        if !self.wanted || (self.bar.is_none() && self.start.elapsed() < SILENCE) {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| new_bar(self.total));
        bar.set_position(self.done);
    }
}

fn new_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{percent:>3}% [{wide_bar}] {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
