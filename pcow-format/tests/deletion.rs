// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Deletion of snapshots on a real filesystem, against an oracle of words.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pcow_format::check::check;
use pcow_format::ops::{Base, NewImage, create};
use pcow_format::{ClusterSize, ErrorKind, Image, Stored, VirtualSize};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;

/// The words of a disk that are not zero, by their places.
type Words = BTreeMap<u64, u64>;

struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
    image: Image,
    now: Words,
    snapshots: BTreeMap<u64, Words>,
}

impl Fixture {
    /// On a base whose clusters are smaller than the image's.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base"), dir.path().join("vm"));
        let new = |cluster, base: Option<Base>| NewImage {
            size: base.is_none().then(|| VirtualSize::new(SIZE).unwrap()),
            cluster: ClusterSize::new(cluster).unwrap(),
            allocation_unit: Some(cluster),
            base,
        };
        create(&base, &new(4096, None), &[]).unwrap();
        store(&Image::open(&base, &[]).unwrap(), 4096, 7);
        let on = Base::Image {
            path: base,
            snapshot: None,
            reference: false,
        };
        create(&path, &new(65536, Some(on)), &[]).unwrap();
        let image = Image::open(&path, &[]).unwrap();
        Self {
            _dir: dir,
            path,
            image,
            now: Words::from([(4096, 7)]),
            snapshots: BTreeMap::new(),
        }
    }

    fn store(&mut self, offset: u64, value: u64) {
        store(&self.image, offset, value);
        self.now.insert(offset, value);
    }

    fn snapshot(&mut self) -> u64 {
        let number = self.image.snapshot(None).unwrap();
        self.snapshots.insert(number, self.now.clone());
        number
    }

    fn delete(&mut self, number: u64) {
        let deleted = self.image.delete_snapshot(&number.to_string()).unwrap();
        assert_eq!(deleted.number, number);
        self.snapshots.remove(&number);
        self.check();
    }

    fn roll_back(&mut self, number: u64) {
        self.image.rollback(&number.to_string(), true).unwrap();
        self.now = self.snapshots[&number].clone();
    }

    fn check(&self) {
        let disk = words(&|at, buf| self.image.read(at, buf).unwrap());
        assert_eq!(disk, self.now);
        let stored = Stored::open(&self.path, &[]).unwrap();
        assert_eq!(stored.root().snapshots.len(), self.snapshots.len());
        for (number, expected) in &self.snapshots {
            let layer = stored.root().snapshot(&number.to_string()).unwrap().layer;
            let chain = stored.chain(layer).unwrap();
            let found = words(&|at, buf| chain.read(at, buf).unwrap());
            assert_eq!(found, *expected, "snapshot {number}");
        }
        let report = check(&stored).unwrap();
        assert_eq!((report.corruptions, report.leaks), (vec![], vec![]));
    }

    fn layers(&self) -> usize {
        self.image.root().layers.len()
    }
}

fn store(image: &Image, offset: u64, value: u64) {
    let cluster = image.cluster_size().cluster_at(offset).only();
    image.make_writable(cluster, &mut Vec::new()).unwrap();
    let file = image.active().data_file().as_real().unwrap();
    file.write_all_at(&value.to_le_bytes(), offset).unwrap();
}

fn words(read: &dyn Fn(u64, &mut [u8])) -> Words {
    let mut buf = vec![0; usize::try_from(SIZE).unwrap()];
    read(0, &mut buf);
    let words = (0..).step_by(8).zip(buf.as_chunks::<8>().0);
    words
        .map(|(at, raw)| (at, u64::from_le_bytes(*raw)))
        .filter(|(_, value)| *value != 0)
        .collect()
}

fn names(path: &Path) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

#[test]
fn every_snapshot_of_a_tree_can_be_deleted_in_any_order_and_the_others_keep_what_they_show() {
    // Each digit tells which of the snapshots that are left goes next.
    for order in [
        [0, 0, 0, 0],
        [3, 2, 1, 0],
        [1, 1, 1, 0],
        [2, 0, 1, 0],
        [0, 2, 0, 0],
    ] {
        let mut f = Fixture::new();
        f.store(0, 1);
        let first = f.snapshot();
        f.store(65536, 2);
        f.store(8, 3);
        f.snapshot();
        f.store(MIB, 4);
        f.snapshot();
        f.roll_back(first);
        f.store(65536, 5);
        f.snapshot();
        f.store(2 * MIB, 6);
        f.check();
        let mut left: Vec<u64> = f.snapshots.keys().copied().collect();
        for index in order {
            f.delete(left.remove(index));
        }
        assert_eq!(f.image.root().snapshots.len(), 0, "{order:?}");
        f.store(3 * MIB, 9);
        f.check();
    }
}

#[test]
fn a_snapshot_under_one_sealed_layer_is_merged_into_a_new_one() {
    let mut f = Fixture::new();
    f.store(0, 1);
    let first = f.snapshot();
    f.store(65536, 2);
    f.snapshot();
    let (layers, files) = (f.layers(), names(&f.path));
    let old: Vec<_> = f.image.root().layers.iter().map(|l| l.uuid).collect();
    f.delete(first);
    assert_eq!((f.layers(), names(&f.path)), (layers - 1, files - 2));
    let new = f
        .image
        .root()
        .layers
        .iter()
        .filter(|l| !old.contains(&l.uuid));
    assert_eq!(
        new.count(),
        1,
        "no layer changes its content under its name"
    );
}

#[test]
fn a_snapshot_under_two_layers_loses_only_its_name() {
    let mut f = Fixture::new();
    f.store(0, 1);
    let first = f.snapshot();
    f.store(65536, 2);
    f.snapshot();
    f.roll_back(first);
    let layers = f.layers();
    f.delete(first);
    assert_eq!(f.layers(), layers);
}

#[test]
fn beside_a_guest_a_snapshot_under_the_active_layer_alone_is_refused() {
    let mut f = Fixture::new();
    f.store(0, 1);
    let first = f.snapshot();
    let refused = f.image.prepare_deletion(&first.to_string(), false);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidArgument);
    f.check();
}
