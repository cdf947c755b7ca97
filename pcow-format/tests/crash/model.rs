// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an image must show: the naive oracle of the crash tests. Knows bytes and promises, no file and no medium.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Size of the clusters of the image under test: two pages, so that a copied cluster can be written back in part.
pub const CLUSTER_BYTES: u64 = 8 << 10;
/// Bytes of a store.
pub const WORD_BYTES: usize = 8;

/// The clusters that workloads touch, by what they are at first.
pub const TRACKED: [u64; 5] = [ABSENT, BASE, ZERO, QUIET, LEFTOVER];
/// In no layer; its word lies in another cache line than the others'.
pub const ABSENT: u64 = 300;
/// Data in both bases.
pub const BASE: u64 = 2;
/// Data in the lower base, zero in the active layer.
pub const ZERO: u64 = 3;
/// Data in the lower base; never stored to.
pub const QUIET: u64 = 5;

/// In no layer, but the active data file holds bytes of a copy that was cut off.
pub const LEFTOVER: u64 = 40;

/// The bytes of the tracked clusters, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents(pub Vec<Arc<Vec<u8>>>);

/// A word of a tracked cluster: index into [`TRACKED`] and byte offset in the cluster.
pub type Place = (usize, usize);

/// A disk as its guest knows it.
#[derive(Debug, Clone)]
pub struct Disk {
    now: Contents,
    /// What was promised to survive a power cut.
    promised: Contents,
    /// Values stored since the promise, for each word.
    later: BTreeMap<Place, Vec<u64>>,
}

impl Disk {
    pub fn new(contents: Contents) -> Self {
        Self {
            promised: contents.clone(),
            now: contents,
            later: BTreeMap::new(),
        }
    }

    pub fn now(&self) -> &Contents {
        &self.now
    }

    pub fn store(&mut self, place: Place, value: u64) {
        put(&mut self.now, place, value);
        self.later.entry(place).or_default().push(value);
    }

    /// The guest was told that the word at `place` is durable.
    pub fn promise(&mut self, place: Place) {
        if let Some(value) = self.later.remove(&place).and_then(|v| v.last().copied()) {
            put(&mut self.promised, place, value);
        }
    }

    /// The guest was told that everything is durable.
    pub fn promise_all(&mut self) {
        self.promised = self.now.clone();
        self.later.clear();
    }

    /// Whether a power cut may leave `found`: each word as promised, or as stored since.
    pub fn check_after_cut(&self, found: &Contents) -> Result<(), String> {
        for (index, (found, promised)) in found.0.iter().zip(&self.promised.0).enumerate() {
            for at in differing_words(found, promised) {
                let value = word(found, at);
                let later = self.later.get(&(index, at));
                if !later.is_some_and(|l| l.contains(&value)) {
                    let promised = word(promised, at);
                    return Err(format!(
                        "cluster {} byte {at}: found {value:#x}, promised {promised:#x}, stored since {later:x?}",
                        TRACKED[index]
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Compares byte for byte.
pub fn check_equal(what: &str, found: &Contents, expected: &Contents) -> Result<(), String> {
    for (index, (found, expected)) in found.0.iter().zip(&expected.0).enumerate() {
        if let Some(at) = differing_words(found, expected).next() {
            return Err(format!(
                "{what}: cluster {} byte {at}: found {:#x}, expected {:#x}",
                TRACKED[index],
                word(found, at),
                word(expected, at)
            ));
        }
    }
    Ok(())
}

/// The image under test, and what was cloned from it.
#[derive(Debug, Clone)]
pub struct Model {
    pub disk: Disk,
    pub snapshots: Vec<(u64, Contents)>,
    pub clones: Vec<(String, Contents)>,
    next_snapshot: u64,
}

impl Model {
    pub fn new(contents: Contents) -> Self {
        Self {
            disk: Disk::new(contents),
            snapshots: Vec::new(),
            clones: Vec::new(),
            next_snapshot: 1,
        }
    }

    /// A snapshot of what the disk shows; all of it is durable with it.
    #[must_use]
    pub fn with_snapshot(&self) -> Self {
        let mut after = self.clone();
        after
            .snapshots
            .push((self.next_snapshot, self.disk.now.clone()));
        after.next_snapshot += 1;
        after.disk.promise_all();
        after
    }

    /// That snapshot is gone; everything is durable with it.
    #[must_use]
    pub fn without_snapshot(&self, number: u64) -> Self {
        let mut after = self.clone();
        after.snapshots.retain(|(n, _)| *n != number);
        after
    }

    /// The disk shows `contents`, durably.
    #[must_use]
    pub fn with_disk(&self, contents: Contents) -> Self {
        Self {
            disk: Disk::new(contents),
            ..self.clone()
        }
    }

    /// There is a clone of what the disk shows.
    #[must_use]
    pub fn with_clone(&self, name: &str) -> Self {
        let mut after = self.clone();
        after.clones.push((name.to_owned(), self.disk.now.clone()));
        after
    }
}

fn differing_words<'a>(a: &'a [u8], b: &'a [u8]) -> Box<dyn Iterator<Item = usize> + 'a> {
    if a == b {
        return Box::new(std::iter::empty());
    }
    let words = (0..a.len()).step_by(WORD_BYTES);
    Box::new(words.filter(|at| word(a, *at) != word(b, *at)))
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; WORD_BYTES];
    raw.copy_from_slice(&bytes[at..at + WORD_BYTES]);
    u64::from_le_bytes(raw)
}

fn put(contents: &mut Contents, (index, at): Place, value: u64) {
    let cluster = Arc::make_mut(&mut contents.0[index]);
    cluster[at..at + WORD_BYTES].copy_from_slice(&value.to_le_bytes());
}
