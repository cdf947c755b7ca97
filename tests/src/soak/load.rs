// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Eight threads that touch random places, and what each of them knows to be there.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pcow_format::check::check;
use pcow_format::{Image, Stored};
use pcow_protocol::frontend::Frontend;

use crate::memory::Memory;
use crate::random::Random;
use crate::scratch::{Scratch, store};

const THREADS: usize = 8;
const CLUSTER: u64 = 64 << 10;
const PAGE: u64 = 4096;
const SIZE: u64 = 1 << 30;
/// Every second cluster is touched, so that no two make a run that one fault would map.
const PLACES: u64 = SIZE / CLUSTER / 2;

/// What the base shows in the first word of a page.
fn base_word(page: u64) -> u64 {
    if has_base(page / CLUSTER / 2) {
        page ^ 0x7063_6f77_0000_0001
    } else {
        0
    }
}

fn has_base(place: u64) -> bool {
    place.is_multiple_of(16)
}

/// A quarter of the places is only loaded from, which leaves read copies.
fn is_stored_to(place: u64) -> bool {
    place % 8 < 6
}

/// An image whose base has data in some of the places.
pub fn build(scratch: &Scratch, seed: u64) -> PathBuf {
    let base = scratch.image(&format!("base-{seed}"), SIZE, CLUSTER);
    let image = Image::open(&base, &[]).unwrap();
    let mut content = vec![0; usize::try_from(CLUSTER).unwrap()];
    for place in (0..PLACES).filter(|place| has_base(*place)) {
        let start = place * 2 * CLUSTER;
        for (page, raw) in (start..).step_by(4096).zip(content.chunks_mut(4096)) {
            raw[..8].copy_from_slice(&base_word(page).to_le_bytes());
        }
        store(&image, start, &content);
    }
    drop(image);
    scratch.clone_of(&format!("image-{seed}"), &base, CLUSTER)
}

/// What was not as it must be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Difference {
    /// Words with another value, other than zero.
    pub wrong: u64,
    /// Words that read zero and are not.
    pub zeros: u64,
    /// Words on disk that are not what was stored last.
    pub lost: u64,
    /// Faults that a check of the image has found.
    pub corruptions: usize,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} wrong words, {} reads of zeros, {} lost stores, {} faults in the image",
            self.wrong, self.zeros, self.lost, self.corruptions
        )
    }
}

/// A touch of a thread: its number, and how many it had begun and ended before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    thread: usize,
    sequence: u64,
}

/// What a thread tells of itself while it works.
#[derive(Debug, Default)]
struct Gauge {
    /// Odd while it is in a touch.
    sequence: AtomicU64,
    longest_us: AtomicU64,
    wrong: AtomicU64,
    zeros: AtomicU64,
}

#[derive(Debug, Default)]
struct Shared {
    gauges: [Gauge; THREADS],
    stopped: AtomicBool,
}

/// What each page's own word of a thread holds.
type Words = HashMap<u64, u64>;

/// The threads at work.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Words>>,
    /// What earlier threads have met.
    wrong: u64,
    zeros: u64,
}

impl Load {
    /// Starts them on the region of `frontend`.
    pub fn start(frontend: &Frontend, seed: u64) -> Self {
        Self::go_on(frontend, seed, Done::default())
    }

    /// Starts threads that know what those of `before` have stored.
    pub fn go_on(frontend: &Frontend, seed: u64, mut before: Done) -> Self {
        before.words.resize_with(THREADS, HashMap::new);
        let shared = Arc::<Shared>::default();
        let start = |(thread, words)| {
            let toucher = Toucher {
                memory: Memory::new(frontend.region()),
                thread,
                random: Random::new(seed * 64 + u64::try_from(thread).unwrap()),
                words,
                shared: Arc::clone(&shared),
            };
            std::thread::spawn(move || toucher.work())
        };
        let threads = before.words.into_iter().enumerate().map(start);
        let threads = threads.collect();
        Self {
            wrong: before.wrong,
            zeros: before.zeros,
            shared,
            threads,
        }
    }

    /// The threads that are in a touch now. Most touches are faults or take nanoseconds.
    pub fn waiting(&self) -> Vec<Place> {
        let place = |(thread, gauge): (usize, &Gauge)| Place {
            thread,
            sequence: gauge.sequence.load(Ordering::SeqCst),
        };
        let places = self.shared.gauges.iter().enumerate().map(place);
        places.filter(|place| place.sequence % 2 == 1).collect()
    }

    /// Those of `before` that are in the same touch still.
    pub fn still_in(&self, before: &[Place]) -> Vec<Place> {
        let now = self.waiting();
        let mut same = before.to_vec();
        same.retain(|place| now.contains(place));
        same
    }

    /// The longest touch since the last call.
    pub fn take_longest(&self) -> Duration {
        let take = |gauge: &Gauge| gauge.longest_us.swap(0, Ordering::SeqCst);
        let longest = self.shared.gauges.iter().map(take).max();
        Duration::from_micros(longest.unwrap_or(0))
    }

    /// Touches so far.
    pub fn touches(&self) -> u64 {
        let count = |gauge: &Gauge| gauge.sequence.load(Ordering::SeqCst) / 2;
        self.shared.gauges.iter().map(count).sum()
    }

    /// Tells the threads to end.
    pub fn stop(&self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
    }

    /// Whether they were told to end.
    pub fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::SeqCst)
    }

    /// Ends the threads.
    pub fn finish(self) -> Done {
        self.stop();
        let touches = self.touches();
        let words = self.threads.into_iter().map(|t| t.join().unwrap());
        let words = words.collect();
        let sum = |of: fn(&Gauge) -> &AtomicU64| {
            let gauges = self.shared.gauges.iter();
            gauges
                .map(|gauge| of(gauge).load(Ordering::SeqCst))
                .sum::<u64>()
        };
        Done {
            touches,
            words,
            wrong: self.wrong + sum(|gauge| &gauge.wrong),
            zeros: self.zeros + sum(|gauge| &gauge.zeros),
        }
    }
}

/// What was done.
#[derive(Debug, Default)]
pub struct Done {
    /// Touches of all threads.
    pub touches: u64,
    words: Vec<Words>,
    wrong: u64,
    zeros: u64,
}

impl Done {
    /// Compares what was seen, and what is on disk now, with what was stored.
    pub fn compare_with_disk(&self, path: &Path) -> Difference {
        let image = Image::open(path, &[]).unwrap();
        let discarded = image.recovery().discarded_clusters;
        let mut difference = Difference {
            wrong: self.wrong,
            zeros: self.zeros,
            lost: discarded,
            corruptions: 0,
        };
        let word = |offset| {
            let mut raw = [0; 8];
            image.read(offset, &mut raw).unwrap();
            u64::from_le_bytes(raw)
        };
        for (thread, words) in self.words.iter().enumerate() {
            for (page, value) in words {
                let found = [word(*page), word(own(*page, thread))];
                difference.lost += u64::from(found != [base_word(*page), *value]);
            }
        }
        drop(image);
        let report = check(&Stored::open(path, &[]).unwrap()).unwrap();
        difference.corruptions = report.corruptions.len() + report.unchecked.len();
        difference
    }
}

/// A thread's own word in a page.
fn own(page: u64, thread: usize) -> u64 {
    page + 64 + u64::try_from(thread).unwrap() * 8
}

struct Toucher {
    memory: Memory,
    thread: usize,
    random: Random,
    words: Words,
    shared: Arc<Shared>,
}

impl Toucher {
    fn work(mut self) -> Words {
        while !self.shared.stopped.load(Ordering::Relaxed) {
            let place = self.random.below(PLACES);
            let page = place * 2 * CLUSTER + self.random.below(CLUSTER / PAGE) * PAGE;
            if is_stored_to(place) && self.random.below(2) == 0 {
                // As often as not the store is the first touch.
                if self.random.below(2) == 0 {
                    self.look(page);
                }
                let value = self.random.next_word() | 1;
                self.touch(|memory, thread| memory.store(own(page, thread), value));
                self.words.insert(page, value);
            }
            self.look(page);
        }
        self.words
    }

    fn look(&self, page: u64) {
        let wanted = self.words.get(&page).copied().unwrap_or(0);
        self.expect(own(page, self.thread), wanted);
        self.expect(page, base_word(page));
    }

    fn expect(&self, offset: u64, wanted: u64) {
        let found = self.touch(|memory, _| memory.load(offset));
        if found == wanted {
            return;
        }
        let gauge = self.gauge();
        let counter = if found == 0 {
            &gauge.zeros
        } else {
            &gauge.wrong
        };
        if counter.fetch_add(1, Ordering::SeqCst) == 0 {
            eprintln!("the word at {offset:#x} is {found:#x}, not {wanted:#x}");
        }
    }

    fn touch<R>(&self, touch: impl FnOnce(&Memory, usize) -> R) -> R {
        let gauge = self.gauge();
        gauge.sequence.fetch_add(1, Ordering::SeqCst);
        let begin = Instant::now();
        let result = touch(&self.memory, self.thread);
        let took = u64::try_from(begin.elapsed().as_micros()).unwrap();
        gauge.longest_us.fetch_max(took, Ordering::SeqCst);
        gauge.sequence.fetch_add(1, Ordering::SeqCst);
        result
    }

    fn gauge(&self) -> &Gauge {
        &self.shared.gauges[self.thread]
    }
}
