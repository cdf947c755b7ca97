// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Eight threads touch random places of a 64 GiB image through the Rust frontend, against an oracle in plain memory:
//! no difference, no mapping refused, read copies within their budget.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pcow_format::Image;
use pcow_protocol::frontend::{Frontend, FrontendOptions, GuestRegion};
use pcow_tests::backend::Backend;
use pcow_tests::random::Random;
use pcow_tests::scratch::{Scratch, store};

const GIB: u64 = 1 << 30;
const SIZE: u64 = 64 * GIB;
const THREADS: u64 = 8;
const PAGE: u64 = 4096;
/// Bases hold data in this many clusters each.
const BASE_CLUSTERS: u64 = 3000;

/// What the base of a case holds at `offset`: each layer's data is told by its number and place.
fn base_value(layer: u64, offset: u64) -> u64 {
    (layer << 56) ^ offset ^ 0xabcd
}

struct Case {
    cluster: u64,
    depth: u64,
    touches: u64,
    max_mappings: u32,
    cache: u64,
}

/// A chain of `depth` layers; random clusters of the lowest two and of some others hold data.
/// Returns what every page of those clusters must show: its first word.
fn build(scratch: &Scratch, case: &Case) -> (PathBuf, HashMap<u64, u64>) {
    let mut expected = HashMap::new();
    let mut random = Random::new(case.cluster + case.depth);
    let base = scratch.image("base", SIZE, case.cluster);
    fill(&base, 1, &mut random, case, &mut expected);
    let clone = scratch.clone_of("image", &base, case.cluster);
    fill(&clone, 2, &mut random, case, &mut expected);
    let mut image = Image::open(&clone, &[]).unwrap();
    while image.below().depth() < usize::try_from(case.depth).unwrap() {
        image.snapshot(None).unwrap();
    }
    (clone, expected)
}

fn fill(
    path: &Path,
    layer: u64,
    random: &mut Random,
    case: &Case,
    expected: &mut HashMap<u64, u64>,
) {
    let image = Image::open(path, &[]).unwrap();
    let clusters = BASE_CLUSTERS.min((256 << 20) / case.cluster);
    for _ in 0..clusters {
        let start = random.below(SIZE / case.cluster) * case.cluster;
        let mut content = vec![0; usize::try_from(case.cluster).unwrap()];
        for (i, page) in (start..).step_by(4096).zip(content.chunks_mut(4096)) {
            page[..8].copy_from_slice(&base_value(layer, i).to_le_bytes());
            expected.insert(i, base_value(layer, i));
        }
        store(&image, start, &content);
    }
}

/// One thread's work: its own 8-byte slot in each page, behind the base's word.
struct Toucher {
    region: Arc<GuestRegion>,
    id: u64,
    random: Random,
    pages: Arc<Vec<u64>>,
    expected: Arc<HashMap<u64, u64>>,
    stored: HashMap<u64, u64>,
}

impl Toucher {
    fn touch(&mut self) {
        let page = self.pages[usize::try_from(self.random.next()).unwrap() % self.pages.len()];
        let base = self.load(page);
        let wanted = self.expected.get(&page).copied().unwrap_or(0);
        assert_eq!(base, wanted, "base word of the page at {page:#x}");
        let own = page + 64 + self.id * 8;
        let wanted = self.stored.get(&page).copied().unwrap_or(0);
        assert_eq!(
            self.load(own),
            wanted,
            "thread {}'s word of the page at {page:#x}",
            self.id
        );
        if self.random.below(3) == 0 {
            let value = self.random.next();
            self.word(own).store(value, Ordering::Relaxed);
            self.stored.insert(page, value);
        }
    }

    fn load(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        let offset = usize::try_from(offset).unwrap();
        assert!(offset + 8 <= self.region.len() && offset.is_multiple_of(8));
        // SAFETY: inside the region, which the Arc keeps alive; aligned; only ever accessed as atomics here.
        let address = unsafe { self.region.as_ptr().add(offset) };
        // SAFETY: as above; the reference lives no longer than self.
        unsafe { AtomicU64::from_ptr(address.cast()) }
    }
}

/// Pages to touch: of data clusters and of others, in equal parts.
fn pages(case: &Case, expected: &HashMap<u64, u64>) -> Vec<u64> {
    let mut random = Random::new(7);
    let mut known: Vec<_> = expected.keys().copied().collect();
    known.sort_unstable();
    let mut pages: Vec<u64> = (0..case.touches / 2)
        .map(|_| random.below(SIZE / PAGE) * PAGE)
        .collect();
    for _ in 0..case.touches / 2 {
        pages.push(known[usize::try_from(random.next()).unwrap() % known.len()]);
    }
    pages
}

fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

fn mapping_count() -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count()
}

fn run(case: &Case) {
    let scratch = Scratch::new();
    let (image, expected) = build(&scratch, case);
    let (mappings, cache) = (case.max_mappings.to_string(), case.cache.to_string());
    let arguments = ["--max-mappings", &mappings, "--cache-size", &cache];
    let mut backend = Backend::start(&image, &arguments);
    let options = FrontendOptions::default();
    let frontend = Frontend::connect(backend.socket(), &options).unwrap();
    let pages = Arc::new(pages(case, &expected));
    let expected = Arc::new(expected);
    let (anonymous, mapped) = (anonymous_bytes(), mapping_count());
    let threads: Vec<_> = (0..THREADS)
        .map(|id| {
            let mut toucher = Toucher {
                region: Arc::clone(frontend.region()),
                id,
                random: Random::new(id),
                pages: Arc::clone(&pages),
                expected: Arc::clone(&expected),
                stored: HashMap::new(),
            };
            let touches = case.touches;
            std::thread::spawn(move || {
                (0..touches).for_each(|_| toucher.touch());
                toucher.stored
            })
        })
        .collect();
    let stored: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    let counts = frontend.mapping_counts();
    println!("cluster {} depth {}: {counts:?}", case.cluster, case.depth);
    // The oracle's own maps are anonymous memory, too: what it may have taken is allowed for.
    let own: usize = stored.iter().map(|s| s.capacity() * 32).sum();
    let grown = anonymous_bytes().saturating_sub(anonymous);
    assert!(
        grown <= case.cache + u64::try_from(own).unwrap() + (32 << 20),
        "{grown} bytes of anonymous memory with a cache of {}",
        case.cache
    );
    assert!(mapping_count() <= mapped + usize::try_from(case.max_mappings).unwrap() + 64);
    assert!(
        counts.maps >= 3 * u64::from(case.max_mappings) / 2,
        "the budget was exceeded three times"
    );
    frontend.flush().unwrap();
    drop(frontend);
    backend.wait_for_log("frontend detached");
    assert!(backend.terminate().success());
    verify(&image, &expected, &stored);
}

/// What is on disk is what the oracle has.
fn verify(path: &Path, expected: &HashMap<u64, u64>, stored: &[HashMap<u64, u64>]) {
    let image = Image::open(path, &[]).unwrap();
    assert_eq!(image.recovery().discarded_clusters, 0);
    let word = |offset: u64| {
        let mut raw = [0; 8];
        image.read(offset, &mut raw).unwrap();
        u64::from_le_bytes(raw)
    };
    for (id, map) in (0..).zip(stored) {
        for (page, value) in map {
            assert_eq!(word(page + 64 + id * 8), *value, "page {page:#x}");
            assert_eq!(
                word(*page),
                expected.get(page).copied().unwrap_or(0),
                "page {page:#x}"
            );
        }
    }
}

#[test]
fn clusters_of_64_kib_in_a_two_level_chain_show_the_oracles_bytes() {
    run(&Case {
        cluster: 64 << 10,
        depth: 2,
        touches: 24_000,
        max_mappings: 2000,
        cache: 8 << 20,
    });
}
