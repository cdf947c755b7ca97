// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A check of a large map that is full of words, against a reader that does no more than checksum the same file.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use pcow_format::map::WORDS_OFFSET;
use pcow_tests::random::Random;
use pcow_tests::scratch::Scratch;

use super::{Turn, pcow_img, row, seconds, settle};
use crate::Effort;
use crate::faults::active_data;
use crate::place::Place;

/// The smallest clusters make the largest map: a 16384th of the disk.
const CLUSTER: u64 = 4 << 10;
const DISK_OF_MAP: u64 = 1 << 14;
/// How much of a map a disk that is converted pays for.
const MAP_OF_DISK: u64 = 16;
/// The low bit of each state in a word: absent without it, data with it.
const DATA_BITS: u64 = 0x5555_5555_5555_5555;
const BLOCK: usize = 1 << 20;

/// Prints a row for a map that is written to, and one for a sealed one, whose checksum is compared.
pub fn report(place: &Place, effort: &Effort) {
    let map_bytes = effort.disk / MAP_OF_DISK;
    let scratch = Scratch::below(&place.dir);
    let image = scratch.image("image", map_bytes * DISK_OF_MAP, CLUSTER);
    let map = active_data(&image).with_extension("map");
    fill(&map, map_bytes);
    let size = u32::try_from(map_bytes >> 20).unwrap();
    let per_gib = 1024.0 / f64::from(size);
    let report = |kind: &str| {
        settle(place);
        let turns = (0..effort.conversions).map(|_| turn(&image, &map, per_gib));
        row(
            &format!("check {kind} map of {size} MiB, s per GiB"),
            "reading and checksumming the file",
            &turns.collect::<Vec<_>>(),
        );
    };
    report("an active");
    seconds(pcow_img().arg("snapshot").arg(&image).arg("sealed"));
    report("a sealed");
}

/// Words in which about half of the clusters are data. All of them are holes of the data file, which is a disk that holds
/// zeros.
fn fill(map: &Path, bytes: u64) {
    let map = File::options().write(true).open(map).unwrap();
    let mut random = Random::new(4);
    for at in (0..bytes).step_by(BLOCK) {
        let words = (0..BLOCK / 8).map(|_| (random.next_word() & DATA_BITS).to_le_bytes());
        let block: Vec<u8> = words.flatten().collect();
        map.write_all_at(&block, WORDS_OFFSET + at).unwrap();
    }
}

fn turn(image: &Path, map: &Path, per_gib: f64) -> Turn {
    Turn {
        ours: seconds(pcow_img().arg("check").arg(image)) * per_gib,
        other: floor(map) * per_gib,
    }
}

fn floor(map: &Path) -> f64 {
    let begin = Instant::now();
    let mut file = File::open(map).unwrap();
    let mut buffer = vec![0; BLOCK];
    let mut sum = 0;
    loop {
        let got = file.read(&mut buffer).unwrap();
        if got == 0 {
            break;
        }
        sum = crc32c::crc32c_append(sum, &buffer[..got]);
    }
    std::hint::black_box(sum);
    begin.elapsed().as_secs_f64()
}
