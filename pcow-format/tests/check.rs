// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a check finds out about a map: its checksum, and states of clusters that the disk does not have.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pcow_format::check::check;
use pcow_format::ops::{NewImage, create};
use pcow_format::{ClusterSize, Image, Stored, VirtualSize, map_name};

const PAGE: usize = 4096;
/// Bytes of a disk with clusters of 4 KiB that a page of words speaks of.
const DISK_OF_PAGE: u64 = 64 << 20;

fn image(dir: &Path, size: u64, cluster: u64) -> PathBuf {
    let path = dir.join("image");
    let new = NewImage {
        size: Some(VirtualSize::new(size).unwrap()),
        cluster: ClusterSize::new(cluster).unwrap(),
        allocation_unit: None,
        base: None,
    };
    create(&path, &new, &[]).unwrap();
    path
}

fn active_map(image: &Path) -> PathBuf {
    image.join(map_name(Stored::open(image, &[]).unwrap().root().active))
}

fn put(path: &Path, bytes: &[u8], at: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn corruptions(image: &Path) -> Vec<String> {
    let stored = Stored::open(image, &[]).unwrap();
    check(&stored).unwrap().corruptions
}

/// As section 4.4 of the document has it, without regard to holes.
fn checksum(map: &Path) -> String {
    let bytes = std::fs::read(map).unwrap();
    let pages = (0_u64..).zip(bytes.chunks(PAGE));
    let sum = pages
        .filter(|(_, page)| page.iter().any(|byte| *byte != 0))
        .fold(0, |sum, (number, page)| {
            let sum = crc32c::crc32c_append(sum, &number.to_le_bytes());
            crc32c::crc32c_append(sum, page)
        });
    format!("crc32c-{sum:08x}")
}

/// The map has more pages in a row than are read at once, pages of written zeros among them, holes, and pages after those.
#[test]
fn a_sealed_map_has_the_checksum_of_the_document_and_one_bit_more_is_found() {
    let scratch = tempfile::tempdir().unwrap();
    let path = image(scratch.path(), 64 * DISK_OF_PAGE, 4096);
    let map = active_map(&path);
    put(&map, &[0; PAGE], 21 * 4096);
    let mut opened = Image::open(&path, &[]).unwrap();
    for page in (0..20).chain([21, 40, 63]) {
        opened.write(page * DISK_OF_PAGE, b"data").unwrap();
    }
    opened.snapshot(Some("sealed")).unwrap();
    let sealed = opened.root().snapshot("sealed").unwrap().layer;
    let recorded = opened.root().layer(sealed).unwrap().map_checksum.clone();
    drop(opened);
    assert_eq!(recorded, Some(checksum(&map)));
    assert_eq!(corruptions(&path), Vec::<String>::new());
    // A cluster of the last page more.
    put(&map, &[1], 65 * 4096 - 1);
    let found = corruptions(&path);
    assert!(
        found.len() == 1 && found[0].contains("checksum"),
        "{found:?}"
    );
}

/// With clusters of 2 MiB the last word speaks of a part of its clusters only.
#[test]
fn a_state_is_past_the_end_from_the_first_cluster_on_that_the_disk_does_not_have() {
    let scratch = tempfile::tempdir().unwrap();
    let path = image(scratch.path(), 6 << 20, 2 << 20);
    let map = active_map(&path);
    let with = |bytes: &[u8]| {
        put(&map, &[0; 16], 4096);
        put(&map, bytes, 4096);
        corruptions(&path)
    };
    assert_eq!(with(&[0b01_01_01]), Vec::<String>::new());
    let past: [&[u8]; 4] = [
        &[0b01_00_00_00],
        &[0b10_00_00_00],
        &[0, 0, 0, 0, 0, 0, 0, 0b01_00_00_00],
        &[0, 0, 0, 0, 0, 0, 0, 0, 0b01],
    ];
    for bytes in past {
        let found = with(bytes);
        assert!(
            found.len() == 1 && found[0].contains("past its end"),
            "{bytes:?}: {found:?}"
        );
    }
}
