// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long a live snapshot holds a guest, and what the guest notices in the seconds after it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pcow_protocol::control::Client;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::scratch::Scratch;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap, mmap_anonymous, mremap_fixed, munmap};
use serde_json::{Value, json};

use crate::Effort;
use crate::faults::active_data;
use crate::place::Place;
use crate::stats::median;

/// So small that the most clusters fit into the smallest image.
const CLUSTER: u64 = 32 << 10;
const SIZES: [(u64, &str); 2] = [(1 << 30, "1 GiB"), (1 << 40, "1 TiB")];
const MAPPED: [u64; 2] = [1_000, 30_000];
/// Each round leaves a layer with all clusters that were mapped.
const MOST_ROUNDS: usize = 5;
const PATIENCE: Duration = Duration::from_secs(60);
const TMPFS: &str = "tmpfs";

/// What a snapshot took, in microseconds.
struct Held {
    /// By step: quiesce, drain, reset, seal, resume.
    steps: [f64; 5],
    /// A bare mremap over the same mappings.
    mremap: f64,
    /// Of a new file, and of its directory.
    syncs: f64,
}

impl Held {
    fn faults(&self) -> f64 {
        self.steps[1..4].iter().sum()
    }

    fn io(&self) -> f64 {
        self.steps.iter().sum()
    }
}

/// Prints the head of the table.
pub fn head() {
    println!(
        "| medium, image, mapped clusters | quiesce | drain | reset | seal | resume | faults held | I/O held | bare mremap | \
         two syncs | held of the goal |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
}

/// Prints the rows of `place`.
pub fn report(place: &Place, effort: &Effort) {
    for (size, name) in SIZES {
        for mapped in MAPPED {
            let rounds = measure(place, size, mapped, effort);
            println!("{}", row(place, name, mapped, &rounds));
        }
    }
}

/// The goal: twice the bare mremap and a millisecond; where syncs cost something, two of them more. Nothing was dirtied
/// since the snapshot was prepared.
fn row(place: &Place, size: &str, mapped: u64, rounds: &[Held]) -> String {
    let of = |f: &dyn Fn(&Held) -> f64| median(rounds.iter().map(f).collect());
    let on_tmpfs = place.filesystem == TMPFS;
    let goal = |h: &Held| 2.0 * h.mremap + 1000.0 + if on_tmpfs { 0.0 } else { h.syncs };
    let mut text = format!("| {}, {size}, {mapped} |", place.filesystem);
    for step in 0..5 {
        text += &format!(" {:.0} |", of(&|h| h.steps[step]));
    }
    text += &format!(" {:.0} | {:.0} |", of(&Held::faults), of(&Held::io));
    text += &format!(" {:.0} | {:.0} |", of(&|h| h.mremap), of(&|h| h.syncs));
    text + &format!(" {:.2} |", of(&|h| h.io() / goal(h)))
}

/// A guest on a new image.
struct Setting {
    scratch: Scratch,
    image: PathBuf,
    frontend: Frontend,
    memory: Memory,
    _backend: Backend,
}

impl Setting {
    fn new(place: &Place, size: u64) -> Self {
        let scratch = Scratch::below(&place.dir);
        let image = scratch.image("image", size, CLUSTER);
        let backend = Backend::start(&image, &[]);
        let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
        Self {
            scratch,
            image,
            memory: Memory::new(frontend.region()),
            frontend,
            _backend: backend,
        }
    }

    fn execute(&self, command: &str) -> Value {
        let mut client = Client::connect(&self.image, None).unwrap().unwrap();
        client.execute(command, json!({}), PATIENCE).unwrap()
    }

    fn store(&self, mapped: u64) {
        places(mapped).for_each(|at| self.memory.store(at, at + 1));
    }
}

fn places(mapped: u64) -> impl Iterator<Item = u64> {
    (0..mapped).map(|n| n * CLUSTER)
}

fn measure(place: &Place, size: u64, mapped: u64, effort: &Effort) -> Vec<Held> {
    let setting = Setting::new(place, size);
    let round = |_| {
        setting.store(mapped);
        let data = File::open(active_data(&setting.image)).unwrap();
        let times = &setting.execute("snapshot-create")["times-us"];
        let steps = ["quiesce", "drain", "reset", "seal", "resume"];
        Held {
            steps: steps.map(|step| times[step].as_f64().unwrap()),
            mremap: bare_mremap(&data, size, mapped),
            syncs: two_syncs(&setting.scratch.path("")),
        }
    };
    (0..effort.rounds.min(MOST_ROUNDS)).map(round).collect()
}

/// The microseconds that the kernel takes to move an empty region over one with mappings of `data`.
fn bare_mremap(data: &File, size: u64, mapped: u64) -> f64 {
    let length = usize::try_from(size).unwrap();
    let cluster = usize::try_from(CLUSTER).unwrap();
    let both = ProtFlags::READ | ProtFlags::WRITE;
    let empty = || {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: new mappings at places that the kernel chooses disturb nothing.
        unsafe { mmap_anonymous(std::ptr::null_mut(), length, both, flags) }.unwrap()
    };
    let (region, trap) = (empty(), empty());
    for at in places(mapped) {
        let to = region.wrapping_byte_add(usize::try_from(at).unwrap());
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: within the region that was mapped above, to which nothing refers.
        unsafe { mmap(to, cluster, ProtFlags::READ, flags, data, at) }.unwrap();
        // SAFETY: just mapped, and the file is as long as the disk.
        unsafe { to.cast::<u8>().read_volatile() };
    }
    let start = Instant::now();
    // SAFETY: both are mappings of this length, to which nothing refers.
    unsafe { mremap_fixed(trap, length, length, MremapFlags::MAYMOVE, region) }.unwrap();
    let took = start.elapsed();
    // SAFETY: all that is left of the two.
    unsafe { munmap(region, length) }.unwrap();
    took.as_secs_f64() * 1e6
}

/// The microseconds that it takes to make a new file of a page and its name durable.
fn two_syncs(folder: &Path) -> f64 {
    let path = folder.join("synced");
    let directory = File::open(folder).unwrap();
    let mut file = File::create(&path).unwrap();
    file.write_all(&[1; 4096]).unwrap();
    let start = Instant::now();
    file.sync_data().unwrap();
    directory.sync_all().unwrap();
    let took = start.elapsed();
    std::fs::remove_file(path).unwrap();
    took.as_secs_f64() * 1e6
}

/// Prints what a guest that goes over all its memory notices after a snapshot.
pub fn report_after(place: &Place, window: Duration) {
    let (size, name) = SIZES[0];
    let mapped = MAPPED[1];
    for (verb, writes) in [("loads", false), ("stores", true)] {
        let setting = Setting::new(place, size);
        setting.store(mapped);
        let before = setting.pass_over(mapped, window, writes);
        setting.execute("snapshot-create");
        let after = setting.pass_over(mapped, window, writes);
        println!(
            "| {}, {name}, {mapped}, {verb} | {:.2} | {:.2} | {:.3} | {} | {:.0} |",
            place.filesystem,
            before.gib,
            after.gib,
            after.gib / before.gib,
            after.faults,
            after.last_fault.as_secs_f64() * 1e3,
        );
    }
}

/// Prints the head of that table.
pub fn head_after(window: Duration) {
    let seconds = window.as_secs();
    println!(
        "| medium, image, mapped clusters | GiB in {seconds} s before | after | ratio | faults | until the last one, ms |"
    );
    println!("|---|---|---|---|---|---|");
}

struct Pass {
    gib: f64,
    faults: u64,
    /// The end of the first pass over everything.
    last_fault: Duration,
}

impl Setting {
    fn faults(&self) -> u64 {
        let session = &self.execute("query-stats")["session"];
        let number = |name: &str| session[name].as_u64().unwrap();
        number("loads") + number("stores") + number("unknown")
    }

    fn pass_over(&self, mapped: u64, window: Duration, writes: bool) -> Pass {
        let before = self.faults();
        let mut block = vec![1u8; usize::try_from(CLUSTER).unwrap()];
        let region = self.frontend.region().as_ptr();
        let start = Instant::now();
        let mut bytes = 0.0;
        let mut last_fault = Duration::ZERO;
        while start.elapsed() < window {
            for at in places(mapped) {
                let there = region.wrapping_add(usize::try_from(at).unwrap());
                let (from, to) = if writes {
                    (block.as_ptr(), there)
                } else {
                    (there.cast_const(), block.as_mut_ptr())
                };
                // SAFETY: the cluster is part of the region, which this value keeps; nobody else uses it meanwhile, and the
                // block is this call's own.
                unsafe { from.copy_to_nonoverlapping(to, block.len()) };
                // Or the loads would be left out, as nobody looks at what they bring.
                std::hint::black_box(&mut block);
                bytes += block.len() as f64;
            }
            if last_fault.is_zero() {
                last_fault = start.elapsed();
            }
        }
        Pass {
            gib: bytes / f64::from(1 << 30) * window.as_secs_f64() / start.elapsed().as_secs_f64(),
            faults: self.faults() - before,
            last_fault,
        }
    }
}
