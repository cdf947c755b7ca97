// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The images, and what they hold.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use pcow_format::check::check;
use pcow_format::{ClusterRange, Image, Stored};
use pcow_tests::pattern;
use pcow_tests::scratch::{Scratch, store};

use crate::CLUSTER;
use crate::content::{BASE, Content, OWN, expect_same};

/// Bytes written in one step where neighbours are.
const STEP: u64 = 2 << 20;

/// What was stored: pieces of clusters, by where they are.
pub type Sectors = HashMap<u64, Vec<u8>>;

/// An image in a folder of its own, removed at the end.
#[derive(Debug)]
pub struct TestImage {
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// What it shows.
    pub content: Content,
    scratch: Scratch,
}

impl TestImage {
    /// An image of `bytes` bytes that shows the base's pattern everywhere, and is to be a base.
    pub fn full(bytes: u64) -> Self {
        let image = Self::empty(bytes);
        write(&image.path, bytes, STEP, |_| Some(BASE));
        Self {
            content: Content::Base,
            ..image
        }
    }

    /// An image of `bytes` bytes without any data.
    pub fn empty(bytes: u64) -> Self {
        let scratch = Scratch::new();
        Self {
            path: scratch.image("image", bytes, CLUSTER),
            bytes,
            content: Content::Empty,
            scratch,
        }
    }

    /// A clone of what `base` shows.
    pub fn clone_of(base: &Self) -> Self {
        let scratch = Scratch::new();
        Self {
            path: scratch.clone_of("image", &base.path, CLUSTER),
            bytes: base.bytes,
            content: base.content,
            scratch,
        }
    }

    /// An image of `bytes` bytes that shows [`Content::Mixed`], on a base.
    pub fn mixed(bytes: u64) -> Self {
        let only =
            |wanted| move |offset| Content::Mixed.seed(offset).filter(|seed| *seed == wanted);
        let scratch = Scratch::new();
        let base = scratch.image("base", bytes, CLUSTER);
        write(&base, bytes, CLUSTER, only(BASE));
        let path = scratch.clone_of("image", &base, CLUSTER);
        write(&path, bytes, CLUSTER, only(OWN));
        Self {
            path,
            bytes,
            content: Content::Mixed,
            scratch,
        }
    }

    /// Compares every byte, on disk, with the image's content and what was stored over it.
    pub fn expect_on_disk(&self, stored: &Sectors) {
        let mut pieces: HashMap<u64, Vec<_>> = HashMap::new();
        for (offset, bytes) in stored {
            let of_cluster = pieces.entry(offset / CLUSTER).or_default();
            of_cluster.push((usize::try_from(offset % CLUSTER).unwrap(), bytes));
        }
        let image = Image::open(&self.path, &[]).unwrap();
        let mut found = vec![0; usize::try_from(CLUSTER).unwrap()];
        let mut wanted = found.clone();
        for cluster in 0..self.bytes / CLUSTER {
            let start = cluster * CLUSTER;
            image.read(start, &mut found).unwrap();
            self.content.fill(start, &mut wanted);
            for (at, bytes) in pieces.remove(&cluster).unwrap_or_default() {
                wanted[at..at + bytes.len()].copy_from_slice(bytes);
            }
            expect_same(start, &found, &wanted);
        }
    }

    /// The base of a mixed image.
    pub fn base(&self) -> PathBuf {
        self.scratch.path("base")
    }
}

/// Writes patterns into an image, `step` bytes at a time, where `seed` has one.
fn write(path: &Path, bytes: u64, step: u64, seed: impl Fn(u64) -> Option<u64>) {
    let image = Image::open(path, &[]).unwrap();
    let mut content = vec![0; usize::try_from(step).unwrap()];
    for offset in (0..bytes).step_by(content.len()) {
        if let Some(seed) = seed(offset) {
            pattern::fill(seed, offset, &mut content);
            store(&image, offset, &content);
        }
    }
}

/// What an image holds after its backend has ended.
#[derive(Debug, Clone, Copy)]
pub struct Holdings {
    /// Data clusters of the active layer.
    pub data_clusters: u64,
    /// Storage that the active layer's files take, in bytes.
    pub stored_bytes: u64,
}

impl Holdings {
    /// Looks at an image, which has to be without fault.
    pub fn of(image: &TestImage) -> Self {
        let stored = Stored::open(&image.path, &[]).unwrap();
        let report = check(&stored).unwrap();
        let faults = [report.corruptions, report.unchecked, report.leaks].concat();
        assert!(faults.is_empty(), "{faults:#?}");
        let active = stored.root().active_layer().unwrap();
        let stored_bytes = stored.usage(active).unwrap().total();
        let image = Image::open(&image.path, &[]).unwrap();
        let size = image.virtual_size().bytes();
        let all = ClusterRange::new(0, image.cluster_size().clusters_in(size));
        let states = image.active().states(all).unwrap();
        let data = states.into_iter().filter(|state| state.is_data());
        Self {
            data_clusters: u64::try_from(data.count()).unwrap(),
            stored_bytes,
        }
    }

    /// They are under one in a hundred of what `image` shows.
    pub fn expect_next_to_nothing(self, image: &TestImage) {
        println!("  {self:?} of {} clusters", image.bytes / CLUSTER);
        assert!(self.data_clusters * CLUSTER * 100 < image.bytes, "{self:?}");
        assert!(self.stored_bytes * 100 < image.bytes, "{self:?}");
    }
}
