// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long the first store into a cluster waits, beside the floor in the same run.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pcow_format::{Image, Stored, data_name};
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::random::Random;
use pcow_tests::scratch::{Scratch, store};
use rustix::fs::{FallocateFlags, fallocate};

use crate::floor::Floor;
use crate::place::Place;
use crate::stats::{Latency, median};
use crate::{CLUSTER, Effort};

const IMAGE_BYTES: u64 = 8 << 30;

/// What a store meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Touch {
    /// Nothing: the cluster is absent everywhere.
    Allocation,
    /// A base's data.
    CopyOnWrite,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Random,
    Sequential,
}

/// Whether the data file has blocks there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Storage {
    Prepared,
    Unprepared,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    touch: Touch,
    order: Order,
    storage: Storage,
}

/// Prints one table row for each combination, on `place`.
pub fn report(place: &Place, effort: &Effort) {
    for row in rows() {
        let result = Setting::new(place, row, effort).measure(effort);
        println!("{}", result.text(place, row));
    }
}

/// Prints the ratio of the medians for each combination, on `place`.
pub fn ratios(place: &Place, effort: &Effort) {
    for row in rows() {
        let result = Setting::new(place, row, effort).measure(effort);
        println!(
            "first store, {:?}, {:?}, {:?}: {:.2}",
            row.touch,
            row.order,
            row.storage,
            result.ratio(0.0, |l| l.p50_us)
        );
    }
}

fn rows() -> impl Iterator<Item = Row> {
    let touches = [Touch::Allocation, Touch::CopyOnWrite].into_iter();
    touches.flat_map(|touch| {
        [Order::Sequential, Order::Random]
            .into_iter()
            .flat_map(move |order| {
                [Storage::Prepared, Storage::Unprepared].map(move |storage| Row {
                    touch,
                    order,
                    storage,
                })
            })
    })
}

/// Prints the head of the table.
pub fn head() {
    println!(
        "| filesystem | first store | order | storage | pcow p50 / p99 µs | floor p50 / p99 µs | ratio p50 | ratio p99 | with a fallocate in the floor |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
}

/// Files that pcow and the floor work on, alike.
struct Setting {
    scratch: Scratch,
    image: PathBuf,
    floor_target: PathBuf,
    floor_base: Option<PathBuf>,
    clusters: Vec<u64>,
}

impl Setting {
    fn new(place: &Place, row: Row, effort: &Effort) -> Self {
        let scratch = Scratch::below(&place.dir);
        let clusters = clusters(row.order, effort.rounds * effort.touches);
        let (image, floor_base) = match row.touch {
            Touch::Allocation => (scratch.image("image", IMAGE_BYTES, CLUSTER), None),
            Touch::CopyOnWrite => with_base(&scratch, &clusters),
        };
        let floor_target = scratch.path("floor");
        let target = File::create(&floor_target).unwrap();
        target.set_len(IMAGE_BYTES).unwrap();
        if row.storage == Storage::Prepared {
            prepare(&target, &clusters);
            let data = File::options().write(true).open(active_data(&image));
            prepare(&data.unwrap(), &clusters);
        }
        Self {
            scratch,
            image,
            floor_target,
            floor_base,
            clusters,
        }
    }

    fn measure(&self, effort: &Effort) -> Measured {
        let backend = Backend::start(&self.image, &[]);
        let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
        let memory = Memory::new(frontend.region());
        let floor = Floor::start(&self.floor_target, self.floor_base.as_deref(), IMAGE_BYTES);
        let mut measured = Measured::default();
        for clusters in self.clusters.chunks(effort.touches) {
            measured.floor.push(time(clusters, |at| floor.touch(at)));
            measured.pcow.push(time(clusters, |at| memory.store(at, 1)));
        }
        measured.fallocate = self.fallocate(effort);
        measured
    }

    /// What reserving one cluster costs on this filesystem.
    fn fallocate(&self, effort: &Effort) -> Latency {
        let file = File::create(self.scratch.path("reserved")).unwrap();
        file.set_len(IMAGE_BYTES).unwrap();
        let clusters = &self.clusters[..effort.touches];
        time(clusters, |at| reserve(&file, at))
    }
}

/// Cluster offsets in the order of their touch, all different.
fn clusters(order: Order, count: usize) -> Vec<u64> {
    let first = IMAGE_BYTES / 4 / CLUSTER;
    if order == Order::Sequential {
        return (first..).take(count).map(|n| n * CLUSTER).collect();
    }
    let mut random = Random::new(1);
    let mut known = BTreeSet::new();
    let mut next = || loop {
        let cluster = random.below(IMAGE_BYTES / CLUSTER);
        if known.insert(cluster) {
            return cluster * CLUSTER;
        }
    };
    (0..count).map(|_| next()).collect()
}

/// An image on a base that holds data in `clusters`, and a plain file that holds the same.
fn with_base(scratch: &Scratch, clusters: &[u64]) -> (PathBuf, Option<PathBuf>) {
    let base = scratch.image("base", IMAGE_BYTES, CLUSTER);
    let plain = scratch.path("floor-base");
    let file = File::create(&plain).unwrap();
    let content = vec![0x5a; usize::try_from(CLUSTER).unwrap()];
    let image = Image::open(&base, &[]).unwrap();
    for at in clusters {
        store(&image, *at, &content);
        std::os::unix::fs::FileExt::write_all_at(&file, &content, *at).unwrap();
    }
    drop(image);
    (scratch.clone_of("image", &base, CLUSTER), Some(plain))
}

/// The data file of an image's active layer.
pub fn active_data(image: &Path) -> PathBuf {
    let active = Stored::open(image, &[]).unwrap().root().active;
    image.join(data_name(active))
}

fn prepare(file: &File, clusters: &[u64]) {
    clusters.iter().for_each(|at| reserve(file, *at));
    // Nothing of this is left to be written while something is measured.
    file.sync_all().unwrap();
}

fn reserve(file: &File, at: u64) {
    fallocate(file, FallocateFlags::empty(), at, CLUSTER).unwrap();
}

fn time(clusters: &[u64], mut touch: impl FnMut(u64)) -> Latency {
    let one = |at: &u64| -> Duration {
        let start = Instant::now();
        touch(*at);
        start.elapsed()
    };
    let samples: Vec<Duration> = clusters.iter().map(one).collect();
    Latency::of(&samples)
}

/// Latencies by round, and of a fallocate.
#[derive(Debug)]
struct Measured {
    pcow: Vec<Latency>,
    floor: Vec<Latency>,
    fallocate: Latency,
}

impl Default for Measured {
    fn default() -> Self {
        Self {
            pcow: Vec::new(),
            floor: Vec::new(),
            fallocate: Latency::of(&[]),
        }
    }
}

impl Measured {
    /// The median over rounds of the ratio to the floor, with `more` in the floor.
    fn ratio(&self, more: f64, of: impl Fn(&Latency) -> f64) -> f64 {
        let rounds = self.pcow.iter().zip(&self.floor);
        median(rounds.map(|(p, f)| of(p) / (of(f) + more)).collect())
    }

    fn text(&self, place: &Place, row: Row) -> String {
        let (pcow, floor) = (Latency::median(&self.pcow), Latency::median(&self.floor));
        let with_fallocate = if row.storage == Storage::Unprepared {
            let more = self.fallocate.p50_us;
            format!("{:.2}", self.ratio(more, |l| l.p50_us))
        } else {
            String::new()
        };
        format!(
            "| {} | {:?} | {:?} | {:?} | {:.0} / {:.0} | {:.0} / {:.0} | {:.2} | {:.2} | {with_fallocate} |",
            place.filesystem,
            row.touch,
            row.order,
            row.storage,
            pcow.p50_us,
            pcow.p99_us,
            floor.p50_us,
            floor.p99_us,
            self.ratio(0.0, |l| l.p50_us),
            self.ratio(0.0, |l| l.p99_us),
        )
    }
}
