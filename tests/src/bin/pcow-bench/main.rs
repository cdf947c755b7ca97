// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What pcow costs, as tables for the README. Everything is compared with something measured in the same run, turn and turn
//! about, so that the machine's mood falls on both sides.
#![allow(clippy::unwrap_used)]

mod faults;
mod fill;
mod floor;
mod hold;
mod img;
mod place;
mod start;
mod stats;
mod warm;

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use place::Place;

/// Clusters, and the steps of everything, in bytes.
const CLUSTER: u64 = 64 << 10;
const TMPFS: &str = "/dev/shm";

/// Measures what pcow costs, on tmpfs and on the filesystem of a folder of your choice.
#[derive(Debug, Parser)]
#[command(name = "pcow-bench")]
struct Arguments {
    /// Fewer rounds: about a minute in all.
    #[arg(long)]
    quick: bool,
    /// Only ratios, of very few rounds and in DIR alone, one on each line: NAME: NUMBER.
    #[arg(long, conflicts_with = "quick")]
    ratios: bool,
    /// Only how long live snapshots hold a guest.
    #[arg(long, conflicts_with = "ratios")]
    snapshots: bool,
    /// The speed of pcow-img instead, in DIR alone. Needs qemu-img to compare with, and 5 GiB there.
    #[arg(long, conflicts_with_all = ["ratios", "snapshots"])]
    img: bool,
    /// A folder on the other filesystem; the folder for temporary files if not given.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Rounds of everything that has rounds.
    pub rounds: usize,
    /// Touches in a round.
    pub touches: usize,
    /// Starts of a backend for each image.
    pub starts: usize,
    /// How long is looked at what happens before and after a snapshot.
    pub window: Duration,
    /// Rounds of what pcow-img takes long for.
    pub conversions: usize,
    /// Bytes of the disk that is converted.
    pub disk: u64,
}

const QUICK: Effort = Effort {
    rounds: 7,
    touches: 300,
    starts: 10,
    window: Duration::from_secs(10),
    conversions: 7,
    disk: 1 << 30,
};
const RATIOS: Effort = Effort {
    rounds: 3,
    touches: 100,
    starts: 0,
    window: Duration::ZERO,
    conversions: 0,
    disk: 0,
};
const LONG: Effort = Effort {
    rounds: 15,
    touches: 2000,
    starts: 30,
    window: Duration::from_secs(10),
    conversions: 9,
    disk: 4 << 30,
};

fn main() {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(floor::HANDLER) {
        floor::handle(&words.collect::<Vec<_>>());
        return;
    }
    let arguments = Arguments::parse();
    let effort = if arguments.quick { QUICK } else { LONG };
    let dir = arguments.dir.unwrap_or_else(std::env::temp_dir);
    if arguments.ratios {
        let place = Place::new(&dir);
        faults::ratios(&place, &RATIOS);
        warm::ratios(&place);
        return;
    }
    let places = [Place::new(TMPFS.as_ref()), Place::new(&dir)];
    measured_on(&places, &effort);
    if arguments.img {
        return img::report(&places[1], &effort);
    }
    if arguments.snapshots {
        return snapshots(&places, &effort);
    }
    faults(&places, &effort);
    println!("\nMappings that a fill leaves in the frontend:\n");
    fill::report(&places[1]);
    println!(
        "\nStart of a backend, median and spread of {} starts:\n",
        effort.starts
    );
    for place in &places {
        start::report(place, &effort);
        println!();
    }
    snapshots(&places, &effort);
    println!("A region in which everything is mapped (goal: ratio at least 0.98, no event):\n");
    for place in &places {
        warm::report(place, &effort);
        println!();
    }
}

fn faults(places: &[Place], effort: &Effort) {
    println!(
        "First store into a cluster of 64 KiB, medians of {} rounds of {} (goal: ratio at most 1.5; on ext4 an \
         unprepared one may add a fallocate):\n",
        effort.rounds, effort.touches
    );
    faults::head();
    for place in places {
        faults::report(place, effort);
    }
}

fn snapshots(places: &[Place], effort: &Effort) {
    println!(
        "How long a live snapshot holds faults and I/O, in microseconds, medians (goal: at most twice a bare mremap of the same \
         region and 1 ms; elsewhere than on tmpfs two syncs more):\n"
    );
    hold::head();
    for place in places {
        hold::report(place, effort);
    }
    println!(
        "\nA thread that goes over everything mapped again and again, before and after a snapshot:\n"
    );
    hold::head_after(effort.window);
    for place in places {
        hold::report_after(place, effort.window);
    }
    println!();
}

fn measured_on(places: &[Place; 2], effort: &Effort) {
    let system = rustix::system::uname();
    let cpus = std::thread::available_parallelism().unwrap();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap();
    println!(
        "Measured on Linux {} ({}), {cpus} processors, load {} at the start, {} and {}; {effort:?}.\n",
        system.release().to_string_lossy(),
        system.machine().to_string_lossy(),
        load.split(' ').next().unwrap(),
        places[0].filesystem,
        places[1].filesystem,
    );
}
