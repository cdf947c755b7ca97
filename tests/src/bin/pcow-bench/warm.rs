// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bandwidth of a region in which everything is mapped, beside the same file mapped directly: as programs map files, and,
//! where the file is in persistent memory, with `MAP_SYNC`, as the region's files are, too.

use std::fs::File;
use std::ptr::null_mut;
use std::time::Instant;

use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::scratch::Scratch;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::faults::active_data;
use crate::place::Place;
use crate::stats::median;
use crate::{CLUSTER, Effort};

const BYTES: usize = 1 << 30;
/// Rounds where ratios alone are wanted: an emulated processor takes up to twice as long for one pass as for the next.
const ROUNDS_FOR_RATIOS: usize = 9;
/// Small enough for a processor's cache, so that the region is what is measured.
const BLOCK: usize = 256 << 10;

/// Prints a table.
pub fn report(place: &Place, effort: &Effort) {
    let (measured, events) = measure(place, effort.rounds);
    print(place, &measured, events);
}

/// Prints the ratios alone.
pub fn ratios(place: &Place) {
    let (measured, _) = measure(place, ROUNDS_FOR_RATIOS);
    for (n, direct) in measured.direct.iter().enumerate() {
        for (what, seconds) in [("read", &measured.read), ("write", &measured.write)] {
            println!("warm, {what}{direct}: {:.3}", ratio(seconds, n));
        }
    }
}

/// The median over rounds of the bandwidth in the region to that in the direct mapping number `n`.
fn ratio(seconds: &[Vec<f64>], n: usize) -> f64 {
    median(seconds.iter().map(|r| r[n + 1] / r[0]).collect())
}

/// What was measured, and the number of events while everything was mapped.
fn measure(place: &Place, rounds: usize) -> (Measured, u64) {
    let scratch = Scratch::below(&place.dir);
    let image = scratch.image("image", 1 << 30, CLUSTER);
    let mut backend = Backend::start(&image, &[]);
    fill(&backend);
    backend.wait_for_log("frontend detached");
    let data = File::options()
        .read(true)
        .write(true)
        .open(active_data(&image));
    let data = data.unwrap();
    let sync = MapFlags::SHARED_VALIDATE | MapFlags::SYNC;
    let direct: Vec<_> = [
        Direct::new("", &data, MapFlags::SHARED),
        Direct::new(", to one with MAP_SYNC", &data, sync),
    ]
    .into_iter()
    .flatten()
    .collect();
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let mut memory = vec![frontend.region().as_ptr()];
    memory.extend(direct.iter().map(|d| d.memory));
    let mut bench = Bench::new(memory);
    bench.warm_up();
    let maps = frontend.mapping_counts().maps;
    let mut measured = Measured {
        direct: direct.iter().map(|d| d.name).collect(),
        read: Vec::new(),
        write: Vec::new(),
    };
    for round in 0..rounds {
        measured.read.push(bench.read(round));
        measured.write.push(bench.write(round));
    }
    drop(frontend);
    backend.terminate();
    // The warm-up's faults are those that were answered by a MAP.
    (
        measured,
        backend.session_counts().faults.saturating_sub(maps),
    )
}

/// Makes all of the image data.
fn fill(backend: &Backend) {
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let memory = Memory::new(frontend.region());
    (0..1 << 30)
        .step_by(4096)
        .for_each(|at| memory.store(at, 1));
}

fn print(place: &Place, measured: &Measured, events: u64) {
    println!(
        "| warm GiB on {} | pcow GiB/s | mapped directly GiB/s | ratio | events while warm |",
        place.filesystem
    );
    println!("|---|---|---|---|---|");
    for (n, direct) in measured.direct.iter().enumerate() {
        for (what, seconds) in [("read", &measured.read), ("write", &measured.write)] {
            let speed = |of: usize| median(seconds.iter().map(|r| 1.0 / r[of]).collect());
            let (pcow, other) = (speed(0), speed(n + 1));
            let ratio = ratio(seconds, n);
            println!("| {what}{direct} | {pcow:.2} | {other:.2} | {ratio:.3} | {events} |");
        }
    }
}

/// Seconds for a GiB, a list for each round: first in the region, then in each of the direct mappings.
struct Measured {
    direct: Vec<&'static str>,
    read: Vec<Vec<f64>>,
    write: Vec<Vec<f64>>,
}

/// The file, mapped by itself.
struct Direct {
    name: &'static str,
    memory: *mut u8,
}

impl Direct {
    /// `None` if the file cannot be mapped so.
    fn new(name: &'static str, file: &File, flags: MapFlags) -> Option<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a mapping at an address that the kernel chooses takes nobody's place.
        let memory = unsafe { mmap(null_mut(), BYTES, access, flags, file, 0) }.ok()?;
        Some(Self {
            name,
            memory: memory.cast(),
        })
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        // SAFETY: `new` has made the mapping with this length; it is unmapped once, and nobody uses it any more.
        unsafe { munmap(self.memory.cast(), BYTES) }.unwrap();
    }
}

struct Bench {
    memory: Vec<*mut u8>,
    block: Vec<u8>,
}

impl Bench {
    fn new(memory: Vec<*mut u8>) -> Self {
        Self {
            memory,
            block: vec![1; BLOCK],
        }
    }

    fn warm_up(&mut self) {
        self.write(0);
        self.read(0);
    }

    /// The seconds that each mapping takes; another one comes first in each round.
    fn each(&self, round: usize, mut pass: impl FnMut(*mut u8)) -> Vec<f64> {
        let mut seconds = vec![0.0; self.memory.len()];
        for i in (0..self.memory.len()).map(|i| (i + round) % self.memory.len()) {
            let start = Instant::now();
            pass(self.memory[i]);
            seconds[i] = start.elapsed().as_secs_f64();
        }
        seconds
    }

    fn read(&mut self, round: usize) -> Vec<f64> {
        let block = self.block.as_mut_ptr();
        self.each(round, |memory| {
            for at in (0..BYTES).step_by(BLOCK) {
                let source = memory.wrapping_add(at);
                // SAFETY: all mappings have BYTES bytes and outlive this value; nobody writes to them meanwhile, and the
                // block is this value's own.
                unsafe { source.copy_to_nonoverlapping(block, BLOCK) };
            }
        })
    }

    fn write(&self, round: usize) -> Vec<f64> {
        let block = self.block.as_ptr();
        self.each(round, |memory| {
            for at in (0..BYTES).step_by(BLOCK) {
                let target = memory.wrapping_add(at);
                // SAFETY: all mappings have BYTES bytes and outlive this value; nobody refers to them, and the block is
                // this value's own.
                unsafe { target.copy_from_nonoverlapping(block, BLOCK) };
            }
        })
    }
}
