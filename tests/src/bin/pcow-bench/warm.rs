// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bandwidth of a region in which everything is mapped, beside the same file mapped directly.

use std::fs::File;
use std::time::Instant;

use memmap2::{MmapOptions, MmapRaw};
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::scratch::Scratch;

use crate::faults::active_data;
use crate::place::Place;
use crate::stats::median;
use crate::{CLUSTER, Effort};

const BYTES: usize = 1 << 30;
/// Small enough for a processor's cache, so that the region is what is measured.
const BLOCK: usize = 256 << 10;

/// Prints a table.
pub fn report(place: &Place, effort: &Effort) {
    let (rounds, events) = measure(place, effort);
    print(place, &rounds, events);
}

/// Prints the ratios alone.
pub fn ratios(place: &Place, effort: &Effort) {
    let (rounds, _) = measure(place, effort);
    println!("warm, read: {:.3}", ratio(&rounds, |r| r.read));
    println!("warm, write: {:.3}", ratio(&rounds, |r| r.write));
}

/// The median over rounds of the bandwidth in the region to that in the direct mapping.
fn ratio(rounds: &[Round], of: impl Fn(&Round) -> (f64, f64)) -> f64 {
    median(rounds.iter().map(|r| of(r).1 / of(r).0).collect())
}

/// The rounds, and the number of events while everything was mapped.
fn measure(place: &Place, effort: &Effort) -> (Vec<Round>, u64) {
    let scratch = Scratch::below(&place.dir);
    let image = scratch.image("image", 1 << 30, CLUSTER);
    let mut backend = Backend::start(&image, &[]);
    fill(&backend);
    backend.wait_for_log("frontend detached");
    let data = File::options()
        .read(true)
        .write(true)
        .open(active_data(&image));
    let direct = MmapOptions::new()
        .len(BYTES)
        .map_raw(&data.unwrap())
        .unwrap();
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let region = frontend.region().as_ptr();
    let mut bench = Bench::new(region, &direct);
    bench.warm_up();
    let maps = frontend.mapping_counts().maps;
    let rounds: Vec<Round> = (0..effort.rounds).map(|_| bench.round()).collect();
    drop(frontend);
    backend.terminate();
    // The warm-up's faults are those that were answered by a MAP.
    (rounds, backend.session_counts().faults.saturating_sub(maps))
}

/// Makes all of the image data.
fn fill(backend: &Backend) {
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let memory = Memory::new(frontend.region());
    (0..1 << 30)
        .step_by(4096)
        .for_each(|at| memory.store(at, 1));
}

fn print(place: &Place, rounds: &[Round], events: u64) {
    println!(
        "| warm GiB on {} | pcow GiB/s | mapped directly GiB/s | ratio | events while warm |",
        place.filesystem
    );
    println!("|---|---|---|---|---|");
    let row = |name: &str, of: &dyn Fn(&Round) -> (f64, f64)| {
        let pcow = median(rounds.iter().map(|r| 1.0 / of(r).0).collect());
        let direct = median(rounds.iter().map(|r| 1.0 / of(r).1).collect());
        let ratio = ratio(rounds, of);
        println!("| {name} | {pcow:.2} | {direct:.2} | {ratio:.3} | {events} |");
    };
    row("read", &|r| r.read);
    row("write", &|r| r.write);
}

/// Seconds for a GiB: in the region, and in the direct mapping.
struct Round {
    read: (f64, f64),
    write: (f64, f64),
}

struct Bench {
    region: *mut u8,
    direct: *mut u8,
    block: Vec<u8>,
}

impl Bench {
    fn new(region: *mut u8, direct: &MmapRaw) -> Self {
        Self {
            region,
            direct: direct.as_mut_ptr(),
            block: vec![1; BLOCK],
        }
    }

    fn warm_up(&mut self) {
        for memory in [self.region, self.direct] {
            self.write(memory);
            self.read(memory);
        }
    }

    fn round(&mut self) -> Round {
        Round {
            read: (self.read(self.region), self.read(self.direct)),
            write: (self.write(self.region), self.write(self.direct)),
        }
    }

    fn read(&mut self, memory: *mut u8) -> f64 {
        let start = Instant::now();
        for at in (0..BYTES).step_by(BLOCK) {
            let source = memory.wrapping_add(at);
            // SAFETY: both mappings have BYTES bytes and outlive this value; nobody writes to them meanwhile, and the
            // block is this value's own.
            unsafe { source.copy_to_nonoverlapping(self.block.as_mut_ptr(), BLOCK) };
        }
        start.elapsed().as_secs_f64()
    }

    fn write(&mut self, memory: *mut u8) -> f64 {
        let start = Instant::now();
        for at in (0..BYTES).step_by(BLOCK) {
            let target = memory.wrapping_add(at);
            // SAFETY: both mappings have BYTES bytes and outlive this value; nobody refers to them, and the block is
            // this value's own.
            unsafe { target.copy_from_nonoverlapping(self.block.as_ptr(), BLOCK) };
        }
        start.elapsed().as_secs_f64()
    }
}
