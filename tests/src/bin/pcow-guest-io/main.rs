// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs inside a test's guest: loads and stores through DAX mappings.
//!
//! Every mapping is made with `MAP_SYNC`, which the kernel refuses unless the file is really mapped without a page cache
//! in between (mmap(2)), so that a run that succeeds is a proof of DAX.
#![allow(clippy::unwrap_used)]

mod records;
mod zerocopy;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::ptr;

use pcow_tests::pattern;
use rustix::fs::{FileType, OFlags, fstat};
use rustix::mm::{MapFlags, ProtFlags, mmap};

const USAGE: &str = "\
pcow-guest-io store FILE OFFSET LENGTH SEED    store the pattern of SEED
pcow-guest-io verify FILE OFFSET LENGTH SEED   load, and fail unless it is the pattern of SEED
pcow-guest-io read FILE OFFSET LENGTH DISK     let the kernel read from the same place of DISK, directly (O_DIRECT)
pcow-guest-io send FILE OFFSET LENGTH PEER     send over TCP without a copy (MSG_ZEROCOPY) to ADDRESS:PORT
pcow-guest-io tick FILE OFFSET LENGTH          store and verify for ever, and say so
pcow-guest-io records append|store FILE SEED   append records by write(2), or store them, until it has to stop
pcow-guest-io records each FILE SEED           append records one by one; FILE may be a device
pcow-guest-io records load FILE DISK           the same, reading them from DISK directly
pcow-guest-io records count FILE SEED          say how many there are, and fail if they are not the first ones
pcow-guest-io records salvage DEVICE SEED      say how many there are at the start, and fail if a word was never written";

/// Stores and checks that make one line of `tick`.
const ROUNDS_PER_TICK: u64 = 100;

/// A piece of a file, mapped for the whole run of the program.
struct Piece {
    offset: u64,
    bytes: &'static mut [u8],
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["store", file, offset, length, seed] => {
            let piece = Piece::map(file, number(offset), number(length));
            pattern::fill(number(seed), piece.offset, piece.bytes);
            ExitCode::SUCCESS
        }
        ["verify", file, offset, length, seed] => {
            Piece::map(file, number(offset), number(length)).verify(number(seed))
        }
        ["read", file, offset, length, disk] => {
            let offset = number(offset);
            Piece::map(file, offset, number(length)).read_from(disk, offset);
            ExitCode::SUCCESS
        }
        ["send", file, offset, length, peer] => {
            zerocopy::send(peer, Piece::map(file, number(offset), number(length)).bytes);
            ExitCode::SUCCESS
        }
        ["tick", file, offset, length] => Piece::map(file, number(offset), number(length)).tick(),
        ["records", how, file, source] => records(how, file, source),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn records(how: &str, file: &str, source: &str) -> ExitCode {
    match how {
        "append" => records::append(file, number(source)),
        "each" => records::append_each(file, number(source)),
        "store" => records::store(file, number(source)),
        "load" => records::load(file, source),
        "count" => println!("{file}: {}", records::count(file, number(source))),
        "salvage" => println!("{file}: {}", records::salvage(file, number(source))),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// A number of bytes, with K or M for units of 1024 and its square.
fn number(text: &str) -> u64 {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 1 << 10),
        Some(b'M') => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    digits.parse::<u64>().unwrap() * unit
}

impl Piece {
    /// Maps `length` bytes at `offset` of `path`; a file that is not there or too short is made long enough.
    fn map(path: &str, offset: u64, length: u64) -> Self {
        let file = open(path);
        if FileType::from_raw_mode(fstat(&file).unwrap().st_mode) == FileType::RegularFile {
            let size = file.metadata().unwrap().len().max(offset + length);
            file.set_len(size).unwrap();
        }
        let length = usize::try_from(length).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED_VALIDATE | MapFlags::SYNC;
        // SAFETY: a new mapping at a place that the kernel chooses disturbs nothing.
        let mapping = unsafe { mmap(ptr::null_mut(), length, access, flags, &file, offset) };
        let start =
            mapping.unwrap_or_else(|e| panic!("{path} cannot be mapped with MAP_SYNC: {e}"));
        // SAFETY: the mapping has this length, is never unmapped, and no one else changes the file.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start.cast(), length) };
        Self { offset, bytes }
    }

    fn verify(&self, seed: u64) -> ExitCode {
        match pattern::first_difference(seed, self.offset, self.bytes) {
            None => ExitCode::SUCCESS,
            Some(place) => {
                eprintln!("the word at {place} is not of pattern {seed}");
                ExitCode::FAILURE
            }
        }
    }

    /// Has the kernel read from `offset` of `disk`.
    fn read_from(&mut self, disk: &str, offset: u64) {
        let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap();
        let disk = OpenOptions::new()
            .read(true)
            .custom_flags(direct)
            .open(disk)
            .unwrap();
        let got = rustix::io::pread(&disk, &mut *self.bytes, offset).unwrap();
        assert_eq!(got, self.bytes.len(), "bytes read");
    }

    fn tick(&mut self) -> ! {
        for round in 1.. {
            pattern::fill(round, self.offset, self.bytes);
            assert_eq!(self.verify(round), ExitCode::SUCCESS);
            if round % ROUNDS_PER_TICK == 0 {
                println!("tick {}", round / ROUNDS_PER_TICK);
            }
        }
        unreachable!("there is always a next number");
    }
}

fn open(path: &str) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}
