// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writers whose files are read back in a snapshot: records one behind the other, and a line on the console whenever some
//! more of them have been made durable.
//!
//! A record is its piece of a pattern, so that each of its words tells writer and place: more than a checksum would find.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pcow_tests::pattern;
use pcow_tests::records::{PERIOD, RECORD, place};

use crate::{Piece, open};

/// What is written before it is made durable and told: several pages, so that a snapshot may find some of them.
const STEP: u64 = 64 << 10;

/// Writers end when this is there.
const STOP: &str = "/tmp/stop";

/// Appends records by write(2), and syncs the file.
pub fn append(path: &str, seed: u64) {
    let mut file = open(path);
    write_on(path, |start| {
        let mut record = [0; RECORD];
        for offset in (start..start + STEP).step_by(RECORD) {
            pattern::fill(seed, place(offset), &mut record);
            file.write_all(&record).unwrap();
        }
        file.sync_data().unwrap();
    });
}

/// Stores records through a mapping. With `MAP_SYNC` nothing needs to be synced but the processor's cache, and that
/// belongs to what a snapshot shows.
pub fn store(path: &str, seed: u64) {
    write_on(path, |start| {
        let piece = Piece::map(path, start, STEP);
        pattern::fill(seed, place(start), piece.bytes);
    });
}

/// Has `disk`, which holds one period of the records, read into a mapping, and syncs the file: QEMU stores them.
pub fn load(path: &str, disk: &str) {
    let file = open(path);
    write_on(path, |start| {
        Piece::map(path, start, STEP).read_from(disk, place(start));
        file.sync_data().unwrap();
    });
}

/// Writes step after step until it has to stop, and tells how many records there are.
fn write_on(path: &str, mut write: impl FnMut(u64)) {
    let name = Path::new(path).file_name().unwrap().to_str().unwrap();
    let mut start = 0;
    while !fs::exists(STOP).unwrap() {
        write(start);
        start += STEP;
        println!("{name} {}", start / RECORD as u64);
    }
}

/// The number of records in front of the first that is none.
///
/// # Panics
/// If there are others behind that.
pub fn count(path: &str, seed: u64) -> u64 {
    let file = File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    let mut count = 0;
    let mut whole = true;
    let mut bytes = vec![0; usize::try_from(PERIOD).unwrap()];
    for start in (0..size).step_by(bytes.len()) {
        let length = usize::try_from(PERIOD.min(size - start)).unwrap();
        file.read_exact_at(&mut bytes[..length], start).unwrap();
        for (at, record) in (0..).step_by(RECORD).zip(bytes[..length].chunks(RECORD)) {
            let good =
                record.len() == RECORD && pattern::first_difference(seed, at, record).is_none();
            let offset = start + at;
            assert!(whole || !good, "{path}: a record at {offset} behind a gap");
            whole &= good;
            count += u64::from(good);
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pcow_tests::pattern;
    use pcow_tests::records::RECORD;

    use super::count;

    /// Counts the records in a file of eight, of which those in `bad` are zeros.
    fn count_without(bad: &[usize]) -> u64 {
        let mut bytes = [0; 8 * RECORD];
        pattern::fill(5, 0, &mut bytes);
        for record in bad {
            bytes[record * RECORD..][..RECORD].fill(0);
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        count(file.path().to_str().unwrap(), 5)
    }

    #[test]
    fn records_are_counted_up_to_the_first_that_is_none() {
        assert_eq!(count_without(&[]), 8);
        assert_eq!(count_without(&[6, 7]), 6);
    }

    #[test]
    #[should_panic(expected = "a record at 1536 behind a gap")]
    fn a_record_behind_a_gap_is_found() {
        count_without(&[5]);
    }
}
