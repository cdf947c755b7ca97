// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A stream from anywhere, into a new image and into one that has what it continues.

use std::path::PathBuf;
use std::sync::Mutex;

use crate::support::{image, look_at, scratch};
use pcow_format::Stored;
use pcow_format::ops::{give_up_receiving, receive};

/// The image that streams continue. One that was changed makes place for another.
static TARGET: Mutex<Option<(tempfile::TempDir, PathBuf)>> = Mutex::new(None);

const HEADER: usize = 512;
const RECORD: usize = 32;

fn sum(raw: &mut [u8], before: u32) -> u32 {
    let sum = crc32c::crc32c_append(before, &raw[..raw.len() - 4]);
    let end = raw.len();
    raw[end - 4..].copy_from_slice(&sum.to_le_bytes());
    sum
}

/// Gives each record the checksum that it must have.
fn sign(stream: &mut [u8], from: Option<uuid::Uuid>) {
    let Some((header, mut rest)) = stream.split_at_mut_checked(HEADER) else {
        return;
    };
    header[..16].copy_from_slice(b"PCOWSND\0\x01\0\0\0\0\0\0\0");
    header[48..64].copy_from_slice(&from.unwrap_or_default().into_bytes());
    let mut before = sum(header, 0);
    while let Some((record, behind)) = rest.split_at_mut_checked(RECORD) {
        rest = behind;
        let length: [u8; 8] = record[16..24].try_into().expect("eight bytes");
        let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
        if record[0] == 1 && length <= rest.len() {
            let (payload, behind) = rest.split_at_mut(length);
            record[4..8].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
            rest = behind;
        }
        before = sum(record, crc32c::crc32c(&before.to_le_bytes()));
    }
}

/// Tries an input; `false` if it is not one for this target.
#[must_use]
pub fn run(data: &[u8]) -> bool {
    let Some((first, stream)) = data.split_first() else {
        return false;
    };
    let mut stream = stream.to_vec();
    let mut target = TARGET.lock().expect("one at a time");
    let (dir, path) = target.get_or_insert_with(|| {
        let dir = scratch();
        let path = image(dir.path());
        let mut vm = pcow_format::Image::open(&path, &[]).expect("a fresh image opens");
        vm.rollback("one", true).expect("back to its snapshot");
        (dir, path)
    });
    let stored = Stored::open(path, &[]).expect("a sound image");
    let from = stored.root().snapshots[0].uuid;
    let before = std::fs::read(path.join("image.json")).expect("its root");
    // Bit 0: as it is. Bit 1: it continues the image's snapshot.
    if first & 1 == 0 {
        sign(&mut stream, (first & 2 != 0).then_some(from));
    }
    let new = dir.path().join("new");
    let place = if first & 2 == 0 { &new } else { &*path };
    let received = receive(place, &mut stream.as_slice(), None, &[], &mut |_, _| ());
    let after = std::fs::read(path.join("image.json")).expect("its root");
    let _ = give_up_receiving(place, &[]).expect("what was begun can be given up");
    match received {
        Ok(_) => {
            look_at(place);
            *target = None;
        }
        Err(_) => {
            assert_eq!(before, after, "a stream that is refused changes nothing");
            assert!(!new.exists(), "half of an image");
        }
    }
    true
}
