// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writers whose files are read back in a snapshot, or after a loss of power: records one behind the other, and a line on
//! the console whenever some more of them have been made durable.
//!
//! A record is its piece of a pattern, so that each of its words tells writer and place: more than a checksum would find.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use pcow_tests::pattern;
use pcow_tests::records::{PERIOD, RECORD, place};

use crate::{Piece, open};

/// What is written before it is made durable and told: several pages, so that a snapshot may find some of them.
const STEP: u64 = 64 << 10;

/// Bytes that are stored and become durable in one piece.
const WORD: usize = 8;

/// Writers end when this is there.
const STOP: &str = "/tmp/stop";

/// Appends records by write(2), and syncs the file.
pub fn append(path: &str, seed: u64) {
    let mut file = open(path);
    write_on(path, STEP, |start| {
        let mut record = [0; RECORD];
        for offset in (start..start + STEP).step_by(RECORD) {
            pattern::fill(seed, place(offset), &mut record);
            file.write_all(&record).unwrap();
        }
        file.sync_data().unwrap();
    });
}

/// Appends records by write(2) one by one, and syncs the file, which may be a device, after each: most of them are on a page
/// that has been synced before.
pub fn append_each(path: &str, seed: u64) {
    let mut file = open(path);
    write_on(path, RECORD as u64, |start| {
        let mut record = [0; RECORD];
        pattern::fill(seed, place(start), &mut record);
        file.write_all(&record).unwrap();
        file.sync_all().unwrap();
    });
}

/// Stores records through a mapping. With `MAP_SYNC` nothing needs to be synced but the processor's cache, and that
/// belongs to what a snapshot shows.
pub fn store(path: &str, seed: u64) {
    write_on(path, STEP, |start| {
        let piece = Piece::map(path, start, STEP);
        pattern::fill(seed, place(start), piece.bytes);
    });
}

/// Has `disk`, which holds one period of the records, read into a mapping, and syncs the file: QEMU stores them.
pub fn load(path: &str, disk: &str) {
    let file = open(path);
    write_on(path, STEP, |start| {
        Piece::map(path, start, STEP).read_from(disk, place(start));
        file.sync_data().unwrap();
    });
}

/// Writes steps of so many bytes until it has to stop, and tells how many records there are.
fn write_on(path: &str, step: u64, mut write: impl FnMut(u64)) {
    let name = Path::new(path).file_name().unwrap().to_str().unwrap();
    let mut start = 0;
    while !fs::exists(STOP).unwrap() {
        write(start);
        start += step;
        println!("{name} {}", start / RECORD as u64);
        // Who reads the console knows then how far the writer is, and not how far it was.
        // SAFETY: only waits. What is no terminal is an error, and has nothing to wait for.
        let _ = unsafe { libc::tcdrain(libc::STDOUT_FILENO) };
    }
}

/// The number of records in front of the first that is none.
///
/// # Panics
/// If there are others behind that.
pub fn count(path: &str, seed: u64) -> u64 {
    let mut count = 0;
    let mut whole = true;
    for_each(path, |offset, record| {
        let good = is_record(seed, offset, record);
        assert!(whole || !good, "{path}: a record at {offset} behind a gap");
        whole &= good;
        count += u64::from(good);
    });
    count
}

/// The number of records in front of the first that is none, of a device that was all zeros.
///
/// # Panics
/// If there is a word behind that which is neither zero nor that of a record.
pub fn salvage(path: &str, seed: u64) -> u64 {
    let mut count = 0;
    let mut whole = true;
    for_each(path, |offset, record| {
        whole &= is_record(seed, offset, record);
        count += u64::from(whole);
        for (at, word) in (offset..).step_by(WORD).zip(record.chunks(WORD)) {
            let known =
                *word == [0; WORD] || pattern::first_difference(seed, place(at), word).is_none();
            assert!(known, "{path}: nobody has written the word at {at}");
        }
    });
    count
}

fn is_record(seed: u64, offset: u64, bytes: &[u8]) -> bool {
    bytes.len() == RECORD && pattern::first_difference(seed, place(offset), bytes).is_none()
}

/// Gives all of a file to `each`, by places of records.
fn for_each(path: &str, mut each: impl FnMut(u64, &[u8])) {
    let mut file = File::open(path).unwrap();
    // A device tells its size only so.
    let size = file.seek(SeekFrom::End(0)).unwrap();
    let mut bytes = vec![0; usize::try_from(PERIOD).unwrap()];
    for start in (0..size).step_by(bytes.len()) {
        let length = usize::try_from(PERIOD.min(size - start)).unwrap();
        file.read_exact_at(&mut bytes[..length], start).unwrap();
        for (offset, record) in (start..)
            .step_by(RECORD)
            .zip(bytes[..length].chunks(RECORD))
        {
            each(offset, record);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pcow_tests::pattern;
    use pcow_tests::records::RECORD;

    use super::{count, salvage};

    /// A file of eight records, of which those in `bad` are zeros.
    fn bytes_without(bad: &[usize]) -> [u8; 8 * RECORD] {
        let mut bytes = [0; 8 * RECORD];
        pattern::fill(5, 0, &mut bytes);
        for record in bad {
            bytes[record * RECORD..][..RECORD].fill(0);
        }
        bytes
    }

    /// What `how` finds in such a file.
    fn found(how: fn(&str, u64) -> u64, bytes: &[u8]) -> u64 {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        how(file.path().to_str().unwrap(), 5)
    }

    #[test]
    fn records_are_counted_up_to_the_first_that_is_none() {
        for how in [count, salvage] {
            assert_eq!(found(how, &bytes_without(&[])), 8);
            assert_eq!(found(how, &bytes_without(&[6, 7])), 6);
        }
    }

    #[test]
    #[should_panic(expected = "a record at 1536 behind a gap")]
    fn a_record_behind_a_gap_is_found() {
        found(count, &bytes_without(&[5]));
    }

    #[test]
    fn of_a_device_words_may_be_missing_anywhere() {
        let mut bytes = bytes_without(&[3]);
        bytes[5 * RECORD..][..16].fill(0);
        assert_eq!(found(salvage, &bytes), 3);
    }

    #[test]
    #[should_panic(expected = "nobody has written the word at 1544")]
    fn of_a_device_a_word_that_nobody_has_written_is_found() {
        let mut bytes = bytes_without(&[3]);
        bytes[6 * RECORD + 8] ^= 1;
        found(salvage, &bytes);
    }
}
