// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask soak`: what only shows after many times or a long time. The last line of the output is the figure.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Parser;
use pcow_tests::soak::{come_and_go, kill_again_and_again};

#[derive(Debug, Parser)]
struct Arguments {
    /// Kill the backend so often, under load, and start another.
    #[arg(long, default_value_t = 200)]
    kills: usize,
    /// Have frontends come and go for so long, in minutes, in place of kills.
    #[arg(long)]
    minutes: Option<u64>,
    /// Repeat a run: what was touched, and for how long each backend lived. Which fault a kill meets is chance.
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let good = match arguments.minutes {
        Some(minutes) => {
            let result = come_and_go(Duration::from_secs(minutes * 60));
            println!("{result}");
            result.is_flat()
        }
        None => {
            let seed = arguments.seed.unwrap_or_else(seed_of_now);
            println!("seed {seed}");
            let report = kill_again_and_again(arguments.kills, seed, |kills| {
                if kills.is_multiple_of(500) {
                    eprintln!("{kills} kills");
                }
            });
            println!("{report}");
            report.is_good()
        }
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn seed_of_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(1, |d| d.as_secs() % 1_000_000)
}
