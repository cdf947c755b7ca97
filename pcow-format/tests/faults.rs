// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every single flipped bit of a root and of a sealed map is found.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;

use pcow_format::check::check;
use pcow_format::ops::{NewImage, create};
use pcow_format::{Cluster, ClusterSize, Image, Stored, VirtualSize, map_name};

/// An image with a snapshot that holds a cluster; returns the name of the sealed map.
fn image(path: &Path) -> String {
    let new = NewImage {
        size: Some(VirtualSize::new(2 << 20).unwrap()),
        cluster: ClusterSize::new(65536).unwrap(),
        allocation_unit: None,
        base: None,
    };
    create(path, &new, &[]).unwrap();
    let mut image = Image::open(path, &[]).unwrap();
    let sealed = image.root().active;
    let run = Cluster(3).only();
    image.make_writable(run, &mut Vec::new()).unwrap();
    image.snapshot(None).unwrap();
    map_name(sealed)
}

fn is_sound(path: &Path) -> bool {
    let report = Stored::open(path, &[]).and_then(|stored| check(&stored));
    report.is_ok_and(|r| r.corruptions.is_empty())
}

#[test]
fn every_flipped_bit_of_the_root_and_of_a_sealed_map_is_found() {
    let tmp = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let tmp = tmp.unwrap();
    let path = tmp.path().join("vm");
    let map = image(&path);
    assert!(is_sound(&path));
    for name in ["image.json", map.as_str()] {
        let file = path.join(name);
        let whole = std::fs::read(&file).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&file, flipped).unwrap();
            assert!(!is_sound(&path), "bit {bit} of {name}");
        }
        std::fs::write(&file, whole).unwrap();
    }
    assert!(is_sound(&path));
}
