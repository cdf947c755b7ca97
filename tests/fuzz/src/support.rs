// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What targets share: a directory in memory, an image to begin with, and right checksums for what a fuzzer makes up.
//!
//! A checksum keeps a fuzzer out of everything behind it. Whoever writes a hostile image or stream computes it; so do the targets,
//! unless the first byte of the input says that it is to be taken as it is.

use std::ops::Range;
use std::path::{Path, PathBuf};

use pcow_format::ops::{NewImage, create};
use pcow_format::{ClusterSize, Image, Stored, VirtualSize};

/// Bytes before the checksum in `image.json`.
const ROOT_PREFIX: &[u8] = b"{\n  \"pcow\": \"image\",\n  \"checksum\": \"";
const ROOT_DIGITS: Range<usize> = 36..44;

/// A directory in memory, where the machine has a place for that.
pub fn scratch() -> tempfile::TempDir {
    let made = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    made.expect("a directory to work in")
}

/// An image of 4 MiB with a snapshot `one` and something written since; its path.
pub fn image(dir: &Path) -> PathBuf {
    let path = dir.join("vm");
    let new = NewImage {
        size: Some(VirtualSize::new(4 << 20).expect("a size")),
        cluster: ClusterSize::new(16_384).expect("a cluster size"),
        allocation_unit: None,
        base: None,
    };
    create(&path, &new, &[]).expect("a new image");
    let mut image = Image::open(&path, &[]).expect("a fresh image opens");
    image.write(0, &[1; 20_000]).expect("a write");
    image.snapshot(Some("one")).expect("a snapshot");
    image.write(1 << 20, &[2; 5000]).expect("a write");
    image.write_zeros(0..16_384).expect("zeros");
    image.flush().expect("a flush");
    path
}

/// `text` with what every root starts with, and the right checksum.
pub fn sign_root(text: &[u8]) -> Vec<u8> {
    let mut signed = ROOT_PREFIX.to_vec();
    signed.extend(text.get(signed.len()..).unwrap_or_default());
    if let Some(digits) = signed.get_mut(ROOT_DIGITS) {
        digits.fill(b'0');
        let sum = format!("{:08x}", crc32c::crc32c(&signed));
        signed[ROOT_DIGITS].copy_from_slice(sum.as_bytes());
    }
    signed
}

/// The header of a map file with its magic, its version and the right checksum.
pub fn sign_map(map: &mut [u8]) {
    let Some(header) = map.get_mut(..1024) else {
        return;
    };
    header[..12].copy_from_slice(b"PCOWMAP\0\x01\0\0\0");
    header[12..16].fill(0);
    let sum = crc32c::crc32c(header);
    header[12..16].copy_from_slice(&sum.to_le_bytes());
}

/// Opens an image in all ways that there are, and looks at some of what it shows. What it says of itself may be anything.
pub fn look_at(path: &Path) {
    let Ok(stored) = Stored::open(path, &[]) else {
        return;
    };
    let _ = pcow_format::check::check(&stored);
    let tops = stored.root().snapshots.iter().map(|s| s.layer);
    for top in tops.chain([stored.root().active]).take(4) {
        look_at_layer(&stored, top);
    }
    for layer in stored.root().layers.iter().take(4) {
        let _ = (stored.usage(layer), stored.origin(layer));
    }
    if let Ok(image) = Image::open(path, &[]) {
        let end = image.virtual_size().bytes();
        let mut buf = [0; 5000];
        for offset in [0, end / 2, end - 5000] {
            let _ = image.read(offset, &mut buf);
        }
        let _ = image.write(end / 2 + 100, &[7; 5000]);
        let _ = image.flush();
    }
}

fn look_at_layer(stored: &Stored, top: uuid::Uuid) {
    let Ok(view) = stored.view(top) else {
        return;
    };
    let mut buf = [0; 5000];
    for offset in [0, view.size() / 2, view.size().saturating_sub(5000)] {
        let _ = view.read(offset, &mut buf);
    }
    let mut walk = view.walk();
    let mut at = 0;
    for _ in 0..200 {
        match walk.piece(at) {
            Ok(piece) if at < view.size() => {
                assert!(piece.bytes.end > at, "a walk goes on");
                at = piece.bytes.end;
            }
            _ => break,
        }
    }
}
