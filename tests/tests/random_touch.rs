// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Eight threads touch random places of a 64 GiB image through the Rust frontend, against an oracle in plain memory:
//! no difference while it runs nor on disk afterwards, no mapping refused under the default `vm.max_map_count`, mappings
//! and read copies within their budgets although several times as much is touched.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pcow_format::check::check;
use pcow_format::{Image, Stored};
use pcow_protocol::frontend::{Frontend, FrontendOptions, GuestRegion};
use pcow_tests::backend::{Backend, SessionCounts};
use pcow_tests::memory::Memory;
use pcow_tests::proc;
use pcow_tests::random::Random;
use pcow_tests::scratch::{Scratch, store};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 << 30;
const PAGE: u64 = 4096;
const THREADS: usize = 8;
/// The kernel's own default (`DEFAULT_MAX_MAP_COUNT`).
const DEFAULT_MAX_MAP_COUNT: usize = 65_530;
/// What a backend is content with if nothing else is said: half of the kernel's default, and `--cache-size`'s default.
const DEFAULT_MAPPINGS: u64 = 32_765;
const DEFAULT_CACHE: u64 = 256 * MIB;

/// An image, the budgets of its backend, and how much is touched.
#[derive(Debug, Clone, Copy)]
struct Case {
    cluster: u64,
    /// Layers below the active one.
    depth: usize,
    /// `None`: the default.
    max_mappings: Option<u64>,
    /// `None`: the default.
    cache: Option<u64>,
    /// How many times each budget is touched.
    times: u64,
}

impl Case {
    fn seed(&self) -> u64 {
        self.cluster + u64::try_from(self.depth).unwrap()
    }

    fn arguments(&self) -> Vec<String> {
        let mappings = self.max_mappings.map(|n| format!("--max-mappings={n}"));
        let cache = self.cache.map(|n| format!("--cache-size={n}"));
        mappings.into_iter().chain(cache).collect()
    }

    fn mappings(&self) -> u64 {
        self.max_mappings.unwrap_or(DEFAULT_MAPPINGS)
    }

    fn cache(&self) -> u64 {
        self.cache.unwrap_or(DEFAULT_CACHE)
    }

    /// Bytes of a read copy.
    fn unit(&self) -> u64 {
        self.cluster.min(64 * KIB)
    }

    /// Clusters that are stored into: somewhat more than needed, since chance leaves out some.
    fn stored_clusters(&self) -> u64 {
        self.mappings() * self.times * 3 / 2
    }

    /// Clusters that are only loaded from.
    fn loaded_clusters(&self) -> u64 {
        self.cache() / self.unit() * self.times * 3 / 2
    }

    /// On the filesystem for temporary files; the large cases in memory, where nothing waits for a disk: a chain of a
    /// thousand layers is made of thousands of syncs, and default budgets take a hundred thousand faults to exceed.
    fn scratch(&self) -> Scratch {
        if self.depth < 1000 && self.max_mappings.is_some() {
            Scratch::new()
        } else {
            Scratch::below("/dev/shm".as_ref())
        }
    }
}

/// The first word of a base's page tells its layer and its place.
fn base_word(layer: usize, page: u64) -> u64 {
    (u64::try_from(layer).unwrap() << 48) ^ page ^ 0xabcd
}

/// An image on a chain of bases, and what the bases show.
#[derive(Debug)]
struct Bases {
    case: Case,
    base: PathBuf,
    image: PathBuf,
    /// The layer, counted from the lowest, whose data each cluster shows, if any has some.
    owners: HashMap<u64, usize>,
    /// The clusters to touch, in random order, each with whether it is stored into.
    clusters: Vec<(u64, bool)>,
}

impl Bases {
    /// A chain whose lowest layer is another image's. The two lowest layers, the middle one and the top one hold data in
    /// random sets of the clusters, which overlap; about half of all clusters are in none of them.
    fn build(scratch: &Scratch, case: Case) -> Self {
        let mut random = Random::new(case.seed());
        let clusters = distinct_clusters(&case, &mut random);
        let filled = [1, 2, case.depth / 2, case.depth].map(|d| d.clamp(1, case.depth));
        let filled = BTreeSet::from(filled);
        let share = 2 * u64::try_from(filled.len()).unwrap();
        let mut owners = HashMap::new();
        let mut fill = |image: &Image, layer: usize| {
            let mine = clusters.iter().filter(|_| random.below(share) == 0);
            let mine: Vec<u64> = mine.map(|(cluster, _)| *cluster).collect();
            fill_clusters(image, layer, &mine);
            owners.extend(mine.iter().map(|cluster| (*cluster, layer)));
        };
        let base = scratch.image("base", SIZE, case.cluster);
        fill(&Image::open(&base, &[]).unwrap(), 1);
        let path = scratch.clone_of("image", &base, case.cluster);
        let mut image = Image::open(&path, &[]).unwrap();
        for layer in 2..=case.depth {
            if filled.contains(&layer) {
                fill(&image, layer);
            }
            image.snapshot(None).unwrap();
        }
        assert_eq!(image.below().depth(), case.depth);
        Self {
            case,
            base,
            image: path,
            owners,
            clusters,
        }
    }

    /// The first word of a page as the bases show it.
    fn word(&self, page: u64) -> u64 {
        let owner = self.owners.get(&(page / self.case.cluster));
        owner.map_or(0, |layer| base_word(*layer, page))
    }
}

fn distinct_clusters(case: &Case, random: &mut Random) -> Vec<(u64, bool)> {
    let count = case.stored_clusters() + case.loaded_clusters();
    let mut known = BTreeSet::new();
    let mut clusters = Vec::new();
    while known.len() < usize::try_from(count).unwrap() {
        let cluster = random.below(SIZE / case.cluster);
        if known.insert(cluster) {
            clusters.push((cluster, random.below(count) < case.stored_clusters()));
        }
    }
    clusters
}

fn fill_clusters(image: &Image, layer: usize, clusters: &[u64]) {
    let bytes = image.cluster_size().bytes();
    let mut content = vec![0; usize::try_from(bytes).unwrap()];
    for cluster in clusters {
        let start = cluster * bytes;
        for (page, raw) in (start..).step_by(4096).zip(content.chunks_mut(4096)) {
            raw[..8].copy_from_slice(&base_word(layer, page).to_le_bytes());
        }
        store(image, start, &content);
    }
}

/// What each thread has stored: a word of its own in a page.
type Stored64 = HashMap<u64, u64>;

/// Place of a thread's own word in a page.
fn slot(page: u64, thread: usize) -> u64 {
    page + 64 + u64::try_from(thread).unwrap() * 8
}

/// One thread's work.
#[derive(Debug)]
struct Toucher {
    memory: Memory,
    bases: Arc<Bases>,
    thread: usize,
    random: Random,
    stored: Stored64,
    /// Taken for reading during each touch, so that nothing is touched while somebody holds it for writing.
    pause: Arc<RwLock<()>>,
}

impl Toucher {
    /// Touches each of this thread's part of the clusters once, and one of any thread's after each.
    fn work(mut self) -> Stored64 {
        let bases = Arc::clone(&self.bases);
        for own in bases.clusters.iter().skip(self.thread).step_by(THREADS) {
            self.touch(own, 7);
            let any = self
                .random
                .below(u64::try_from(bases.clusters.len()).unwrap());
            self.touch(&bases.clusters[usize::try_from(any).unwrap()], 2);
        }
        self.stored
    }

    /// Looks at a page of the cluster, and stores into it `eighths` times out of eight if it is one of those.
    fn touch(&mut self, (cluster, is_stored): &(u64, bool), eighths: u64) {
        let pause = Arc::clone(&self.pause);
        let _guard = pause.read().unwrap();
        let pages = (self.bases.case.cluster / PAGE).min(4);
        let page = cluster * self.bases.case.cluster + self.random.below(pages) * PAGE;
        let own = slot(page, self.thread);
        if *is_stored && self.random.below(8) < eighths {
            // As often as not the store is the first touch.
            if self.random.below(2) == 0 {
                self.look(page, own);
            }
            let value = self.random.next_word();
            self.memory.store(own, value);
            self.stored.insert(page, value);
        }
        self.look(page, own);
    }

    fn look(&self, page: u64, own: u64) {
        let wanted = self.stored.get(&page).copied().unwrap_or(0);
        self.expect(own, wanted);
        self.expect(page, self.bases.word(page));
    }

    fn expect(&self, offset: u64, wanted: u64) {
        let found = self.memory.load(offset);
        assert_eq!(
            found,
            wanted,
            "seed {}, thread {}: the word at {offset:#x} is {found:#x}, not {wanted:#x}",
            self.bases.case.seed(),
            self.thread
        );
    }
}

fn start_touchers(
    frontend: &Frontend,
    bases: &Arc<Bases>,
    pause: &Arc<RwLock<()>>,
) -> Vec<JoinHandle<Stored64>> {
    let start = |thread| {
        let toucher = Toucher {
            memory: Memory::new(frontend.region()),
            bases: Arc::clone(bases),
            thread,
            random: Random::new(bases.case.seed() + u64::try_from(thread).unwrap()),
            stored: HashMap::new(),
            pause: Arc::clone(pause),
        };
        std::thread::spawn(move || toucher.work())
    };
    (0..THREADS).map(start).collect()
}

/// The most that was seen of what is budgeted, at moments when nothing was being touched.
#[derive(Debug, Default)]
struct Peak {
    read_copies: u64,
    mappings: u64,
}

impl Peak {
    /// Returns how long it took.
    fn sample(&mut self, region: &GuestRegion, pause: &RwLock<()>) -> Duration {
        let _nobody_touches = pause.write().unwrap();
        let start = Instant::now();
        let mappings = proc::mappings(region);
        let copies = mappings.iter().map(|m| m.anonymous_bytes).sum();
        self.read_copies = self.read_copies.max(copies);
        self.mappings = self.mappings.max(u64::try_from(mappings.len()).unwrap());
        start.elapsed()
    }

    /// Everything is touched by far more than its budget, so each budget is used, and kept.
    fn check(&self, case: &Case) {
        let (mappings, cache) = (case.mappings(), case.cache());
        assert!(
            self.mappings <= mappings,
            "{self:?} with {mappings} mappings"
        );
        assert!(
            self.read_copies <= cache,
            "{self:?} with {cache} bytes of cache"
        );
        assert!(
            self.mappings > mappings / 2,
            "{self:?} of {mappings} mappings"
        );
        assert!(
            self.read_copies > cache / 2,
            "{self:?} of {cache} bytes of cache"
        );
    }
}

fn run(case: Case) {
    assert_eq!(
        proc::max_map_count(),
        DEFAULT_MAX_MAP_COUNT,
        "this test is about the kernel's default: set vm.max_map_count back to it"
    );
    proc::raise_descriptor_limit();
    let scratch = case.scratch();
    let start = Instant::now();
    let bases = Arc::new(Bases::build(&scratch, case));
    let built = start.elapsed();
    let arguments = case.arguments();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut backend = Backend::start(&bases.image, &arguments);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let pause = Arc::new(RwLock::new(()));
    let threads = start_touchers(&frontend, &bases, &pause);
    let mut peak = Peak::default();
    while threads.iter().any(|t| !t.is_finished()) {
        let sampled = peak.sample(frontend.region(), &pause);
        // Looking takes longer the more mappings there are, and nothing is touched meanwhile.
        std::thread::sleep(sampled * 10);
    }
    let stored: Vec<Stored64> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    let touched = start.elapsed() - built;
    peak.sample(frontend.region(), &pause);
    drop(frontend);
    backend.wait_for_log("frontend detached");
    assert!(backend.terminate().success(), "{:#?}", backend.log());
    let counts = backend.session_counts();
    println!("{case:?}: built in {built:.1?}, touched in {touched:.1?}: {peak:?}, {counts:?}");
    peak.check(&case);
    check_amount(&case, counts, &stored);
    check_disk(&bases, &stored);
}

/// As much was touched as the case says, so that mappings and read copies had to go.
fn check_amount(case: &Case, counts: SessionCounts, stored: &[Stored64]) {
    let pages = stored.iter().flat_map(HashMap::keys);
    let clusters: BTreeSet<u64> = pages.map(|page| page / case.cluster).collect();
    let clusters: Vec<u64> = clusters.into_iter().collect();
    let runs = clusters.chunk_by(|a, b| a + 1 == *b).count();
    let runs = u64::try_from(runs).unwrap();
    assert!(runs >= case.times * case.mappings(), "{runs} runs");
    let copied = counts.read_copies * case.unit();
    assert!(copied >= case.times * case.cache(), "{copied} bytes copied");
    assert!(counts.unmaps > 0 && counts.evictions > 0, "{counts:?}");
}

/// What is on disk is what the oracle has, and nothing else; the base is as it was.
fn check_disk(bases: &Bases, stored: &[Stored64]) {
    let image = Image::open(&bases.image, &[]).unwrap();
    assert_eq!(image.recovery().discarded_clusters, 0);
    let bytes = bases.case.cluster;
    let mut raw = vec![0; usize::try_from(bytes).unwrap()];
    let mut expected = raw.clone();
    for (cluster, _) in &bases.clusters {
        let start = cluster * bytes;
        image.read(start, &mut raw).unwrap();
        expect_cluster(bases, stored, start, &mut expected);
        assert!(
            raw == expected,
            "cluster {cluster} differs on disk, seed {}",
            bases.case.seed()
        );
    }
    drop(image);
    for path in [&bases.image, &bases.base] {
        let report = check(&Stored::open(path, &[]).unwrap()).unwrap();
        assert_eq!(
            (
                report.corruptions,
                report.unchecked,
                report.leaks,
                report.live_clusters
            ),
            Default::default()
        );
    }
    check_base(bases);
}

fn expect_cluster(bases: &Bases, stored: &[Stored64], start: u64, expected: &mut [u8]) {
    expected.fill(0);
    for (page, raw) in (start..).step_by(4096).zip(expected.chunks_mut(4096)) {
        raw[..8].copy_from_slice(&bases.word(page).to_le_bytes());
        for (thread, words) in stored.iter().enumerate() {
            let at = usize::try_from(slot(0, thread)).unwrap();
            let word = words.get(&page).copied().unwrap_or(0);
            raw[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// The image whose layer is the lowest of the chain still shows its own pages, and zeros beside them.
fn check_base(bases: &Bases) {
    let base = Image::open(&bases.base, &[]).unwrap();
    let mut raw = [0; 4096];
    for (cluster, _) in &bases.clusters {
        let page = cluster * bases.case.cluster;
        base.read(page, &mut raw).unwrap();
        let word = u64::from_le_bytes(raw[..8].try_into().unwrap());
        assert!(
            word == 0 || word == base_word(1, page),
            "cluster {cluster} of the base"
        );
        assert!(
            raw[8..].iter().all(|b| *b == 0),
            "cluster {cluster} of the base"
        );
    }
}

/// Budgets that a test exceeds three times within a few seconds.
fn small(cluster: u64, depth: usize) -> Case {
    Case {
        cluster,
        depth,
        max_mappings: Some(if cluster > MIB { 64 } else { 256 }),
        cache: Some(if cluster < 64 * KIB { MIB } else { 2 * MIB }),
        times: 3,
    }
}

#[test]
fn clusters_of_4_kib_on_one_layer_show_the_oracles_bytes() {
    run(small(4 * KIB, 1));
}

#[test]
fn clusters_of_4_kib_on_64_layers_show_the_oracles_bytes() {
    run(small(4 * KIB, 64));
}

#[test]
fn clusters_of_4_kib_on_1000_layers_show_the_oracles_bytes() {
    run(small(4 * KIB, 1000));
}

#[test]
fn clusters_of_64_kib_on_one_layer_show_the_oracles_bytes() {
    run(small(64 * KIB, 1));
}

#[test]
fn clusters_of_64_kib_on_64_layers_show_the_oracles_bytes() {
    run(small(64 * KIB, 64));
}

#[test]
fn clusters_of_64_kib_on_1000_layers_show_the_oracles_bytes() {
    run(small(64 * KIB, 1000));
}

#[test]
fn clusters_of_2_mib_on_one_layer_show_the_oracles_bytes() {
    run(small(2 * MIB, 1));
}

#[test]
fn clusters_of_2_mib_on_64_layers_show_the_oracles_bytes() {
    run(small(2 * MIB, 64));
}

#[test]
fn clusters_of_2_mib_on_1000_layers_show_the_oracles_bytes() {
    run(small(2 * MIB, 1000));
}

#[test]
fn the_default_budgets_are_kept() {
    run(Case {
        cluster: 16 * KIB,
        depth: 2,
        max_mappings: None,
        cache: None,
        times: 1,
    });
}
