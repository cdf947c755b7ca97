// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an image must show: the naive oracle of the crash tests. Knows bytes and promises, no file and no medium.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::digest::{Digest, of_bytes};

/// Size of the clusters of the image under test: two pages, so that a copied cluster can be written back in part.
pub const CLUSTER_BYTES: u64 = 8 << 10;
/// Bytes that are compared at once.
const BLOCK_BYTES: usize = 512;
/// Bytes of a store.
pub const WORD_BYTES: usize = 8;
/// More than the bytes of a cluster.
const PLACES_PER_CLUSTER: usize = 1 << 20;

/// What a tracked cluster is at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// In no layer.
    Absent,
    /// Data in both bases.
    Base,
    /// Data in the lower base, zero in the active layer.
    Zero,
    /// Data in the lower base, and not stored to by itself.
    Quiet,
    /// In no layer, but the active data file holds bytes of a copy that was cut off.
    Leftover,
    /// Data in the lower base; stored to while something else goes on.
    Late,
}

/// A disk, and those of its clusters that are looked at.
#[derive(Debug)]
pub struct Plan {
    /// Size of the disk.
    pub bytes: u64,
    /// The tracked clusters.
    pub clusters: &'static [(u64, Role)],
}

impl Plan {
    /// Index of the first tracked cluster with that role.
    pub fn first(&self, role: Role) -> usize {
        let place = self.clusters.iter().position(|(_, r)| *r == role);
        place.expect("every plan has every role")
    }

    /// Number of the tracked cluster with that index.
    pub fn cluster(&self, index: usize) -> u64 {
        self.clusters[index].0
    }

    /// Numbers of the clusters with that role.
    pub fn with(&self, role: Role) -> impl Iterator<Item = u64> {
        let of_role = self.clusters.iter().filter(move |(_, r)| *r == role);
        of_role.map(|(cluster, _)| *cluster)
    }
}

/// One page of map, three of its words, two of its cache lines.
pub static SMALL: Plan = Plan {
    bytes: 4 << 20,
    clusters: &[
        (300, Role::Absent),
        (2, Role::Base),
        (3, Role::Zero),
        (5, Role::Quiet),
        (40, Role::Leftover),
        (6, Role::Late),
    ],
};

/// Two pages of map, so that one of them can be written back without the other.
pub static WIDE: Plan = Plan {
    bytes: 256 << 20,
    clusters: &[
        (300, Role::Absent),
        (301, Role::Absent),
        (16385, Role::Absent),
        (20000, Role::Absent),
        (2, Role::Base),
        (4, Role::Base),
        (16390, Role::Base),
        (3, Role::Zero),
        (20002, Role::Zero),
        (8, Role::Quiet),
        (40, Role::Leftover),
        (20040, Role::Leftover),
        (6, Role::Late),
    ],
};

/// The bytes of the tracked clusters, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents(pub Vec<Arc<Vec<u8>>>);

impl Contents {
    fn digest(&self) -> u64 {
        let mut digest = Digest::default();
        self.0.iter().for_each(|c| digest.write_u64(of_bytes(c)));
        digest.finish()
    }
}

/// A word of a tracked cluster: index in the [`Plan`] and byte offset in the cluster.
pub type Place = (usize, usize);

/// A disk as its guest knows it.
#[derive(Debug, Clone)]
pub struct Disk {
    now: Contents,
    /// What was promised to survive a power cut.
    promised: Contents,
    /// Values stored since the promise, for each word.
    later: BTreeMap<Place, Vec<u64>>,
    /// A digest of how it came to all of this: equal ones are equal disks.
    history: Digest,
}

impl Disk {
    /// A disk that shows `contents`, durably.
    pub fn new(contents: Contents) -> Self {
        let mut history = Digest::default();
        history.write_u64(contents.digest());
        Self {
            history,
            promised: contents.clone(),
            now: contents,
            later: BTreeMap::new(),
        }
    }

    /// What it shows.
    pub fn now(&self) -> &Contents {
        &self.now
    }

    /// The guest stores a word.
    pub fn store(&mut self, place: Place, value: u64) {
        put(&mut self.now, place, value);
        ("store", place, value).hash(&mut self.history);
        self.later.entry(place).or_default().push(value);
    }

    /// The guest was told that the word at `place` is durable.
    pub fn promise(&mut self, place: Place) {
        if let Some(value) = self.later.remove(&place).and_then(|v| v.last().copied()) {
            put(&mut self.promised, place, value);
            ("promise", place).hash(&mut self.history);
        }
    }

    /// The guest was told that everything is durable.
    pub fn promise_all(&mut self) {
        self.promised = self.now.clone();
        if !self.later.is_empty() {
            "promise all".hash(&mut self.history);
        }
        self.later.clear();
    }

    /// Whether a power cut may leave `found`: each word as promised, or as stored since.
    pub fn check_after_cut(&self, found: &Contents) -> Result<(), String> {
        let mut clusters = found.0.iter().enumerate();
        clusters.try_for_each(|(index, found)| self.check_cluster_after_cut(index, found))
    }

    /// The same of one tracked cluster.
    pub fn check_cluster_after_cut(&self, index: usize, found: &[u8]) -> Result<(), String> {
        let promised = &self.promised.0[index];
        for at in differing_words(found, promised) {
            let value = word(found, at);
            let later = self.later.get(&(index, at));
            if !later.is_some_and(|l| l.contains(&value)) {
                let promised = word(promised, at);
                return Err(format!(
                    "tracked cluster {index} byte {at}: found {value:#x}, promised {promised:#x}, stored since {later:x?}"
                ));
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
                "{what}: tracked cluster {index} byte {at}: found {:#x}, expected {:#x}",
                word(found, at),
                word(expected, at)
            ));
        }
    }
    Ok(())
}

/// What a snapshot must show.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its number.
    pub number: u64,
    /// Its name, if somebody has given it another one.
    pub name: Option<String>,
    /// Its contents.
    pub contents: Contents,
    /// A digest of those.
    pub digest: u64,
}

/// A reception.
#[derive(Debug, Clone)]
pub struct Receiving {
    /// The image that it is to lead to.
    pub name: String,
    /// What that will show.
    pub contents: Contents,
    /// The whole stream.
    pub stream: Arc<Vec<u8>>,
    /// What must be there when it has come in.
    pub after: Arc<Model>,
}

/// The image under test, and what was cloned from it.
#[derive(Debug, Clone)]
pub struct Model {
    /// Its disk.
    pub disk: Disk,
    /// The snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// Name and contents of each clone.
    pub clones: Vec<(String, Contents)>,
    /// A flush has failed: nobody may open the image for writing (I7).
    pub failed: bool,
    /// What is being received: as much of it as is said to be there must be.
    pub receiving: Option<Receiving>,
    /// The death of a process may leave of the disk what a power cut may: somebody has given up, or is about to, what was
    /// not flushed.
    pub doubtful: bool,
    /// A sync has failed, and nobody who comes now knows of it: there is no mark yet. What is flushed then misses what that
    /// sync did not write.
    pub unknown: bool,
    /// Somebody was told that the mark of a failed flush is gone: no power cut may bring it back.
    pub mended: bool,
    next_snapshot: u64,
}

impl Model {
    /// An image without snapshots whose disk shows `contents`.
    pub fn new(contents: Contents) -> Self {
        Self {
            disk: Disk::new(contents),
            snapshots: Vec::new(),
            clones: Vec::new(),
            failed: false,
            receiving: None,
            doubtful: false,
            unknown: false,
            mended: false,
            next_snapshot: 1,
        }
    }

    /// All that is expected of an image.
    pub fn hash_expectation(&self, digest: &mut Digest) {
        self.disk.history.finish().hash(digest);
        for snapshot in &self.snapshots {
            (snapshot.number, &snapshot.name, snapshot.digest).hash(digest);
        }
        for (name, contents) in &self.clones {
            (name, contents.digest()).hash(digest);
        }
        if let Some(receiving) = &self.receiving {
            (&receiving.name, receiving.contents.digest()).hash(digest);
        }
        (self.receiving.is_some(), self.failed).hash(digest);
        (self.doubtful, self.unknown, self.mended).hash(digest);
    }

    /// A snapshot of what the disk shows; all of it is durable with it.
    #[must_use]
    pub fn with_snapshot(&self) -> Self {
        let mut after = self.clone();
        after.snapshots.push(Snapshot {
            number: self.next_snapshot,
            name: None,
            digest: self.disk.now.digest(),
            contents: self.disk.now.clone(),
        });
        after.next_snapshot += 1;
        after.disk.promise_all();
        after
    }

    /// That snapshot is gone; everything is durable with it.
    #[must_use]
    pub fn without_snapshot(&self, number: u64) -> Self {
        let mut after = self.clone();
        after.snapshots.retain(|s| s.number != number);
        after
    }

    /// That snapshot is called `name`.
    #[must_use]
    pub fn with_name(&self, number: u64, name: &str) -> Self {
        let mut after = self.clone();
        let mut all = after.snapshots.iter_mut();
        let named = all.find(|s| s.number == number);
        named
            .into_iter()
            .for_each(|s| s.name = Some(name.to_owned()));
        after
    }

    /// The disk shows `contents`, durably.
    #[must_use]
    pub fn with_disk(&self, contents: Contents) -> Self {
        Self {
            disk: Disk::new(contents),
            snapshots: self.snapshots.clone(),
            clones: self.clones.clone(),
            failed: false,
            receiving: self.receiving.clone(),
            doubtful: false,
            unknown: false,
            mended: self.mended,
            next_snapshot: self.next_snapshot,
        }
    }

    /// A sync has failed (M14).
    #[must_use]
    pub fn with_failed_sync(&self) -> Self {
        Self {
            unknown: true,
            mended: false,
            ..self.in_doubt()
        }
    }

    /// The same, and it was marked.
    #[must_use]
    pub fn with_failed_flush(&self) -> Self {
        Self {
            failed: true,
            unknown: false,
            mended: false,
            ..self.in_doubt()
        }
    }

    /// What was not flushed may be given up.
    #[must_use]
    pub fn in_doubt(&self) -> Self {
        Self {
            doubtful: true,
            ..self.clone()
        }
    }

    /// The mark of a failed flush is gone; what was not flushed may be.
    #[must_use]
    pub fn with_mark_removed(&self) -> Self {
        Self {
            failed: false,
            ..self.in_doubt()
        }
    }

    /// The same, and it does not come back.
    #[must_use]
    pub fn with_mark_removed_for_good(&self) -> Self {
        Self {
            mended: true,
            ..self.with_mark_removed()
        }
    }

    /// Whatever was in doubt, `found` is what there is.
    #[must_use]
    pub fn with_found(&self, found: Contents) -> Self {
        let mut after = self.clone();
        ("found", found.digest()).hash(&mut after.disk.history);
        after.disk.now = found;
        (after.doubtful, after.failed) = (false, false);
        after
    }

    /// There is a clone of what the disk shows.
    #[must_use]
    pub fn with_clone(&self, name: &str) -> Self {
        self.with_image(name, self.disk.now.clone())
    }

    /// There is another image, which shows `contents`.
    #[must_use]
    pub fn with_image(&self, name: &str, contents: Contents) -> Self {
        let mut after = self.clone();
        after.clones.push((name.to_owned(), contents));
        after
    }
}

/// What kind of value a word holds, whatever the value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Zero.
    Zero = 1,
    /// What was stored last.
    Newest,
    /// What was promised last.
    Promised,
    /// Something that was stored in between.
    Older,
}

impl Disk {
    /// The places where `found` is not as `first`, and what kind of value is there.
    pub fn hash_kinds(&self, found: &Contents, first: &Contents, digest: &mut impl Hasher) {
        for (index, (found, first)) in found.0.iter().zip(&first.0).enumerate() {
            for at in differing_words(found, first) {
                let value = word(found, at);
                let kind = if value == 0 {
                    Kind::Zero
                } else if value == word(&self.now.0[index], at) {
                    Kind::Newest
                } else if value == word(&self.promised.0[index], at) {
                    Kind::Promised
                } else {
                    Kind::Older
                };
                digest.write_usize((index * PLACES_PER_CLUSTER + at) * 8 + kind as usize);
            }
        }
        digest.write_usize(usize::MAX);
    }
}

/// Block by block first: most are alike.
fn differing_words<'a>(a: &'a [u8], b: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    let all = if a == b { 0 } else { a.len() };
    let blocks = (0..all).step_by(BLOCK_BYTES);
    let blocks = blocks.filter(|at| a[*at..*at + BLOCK_BYTES] != b[*at..*at + BLOCK_BYTES]);
    let words = blocks.flat_map(|at| (at..at + BLOCK_BYTES).step_by(WORD_BYTES));
    words.filter(|at| word(a, *at) != word(b, *at))
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
