// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where two disks differ. Reads neither what is zeros in both nor what both have of one layer.

use std::ffi::OsString;
use std::ops::Range;

use clap::Args;

use crate::cli::Global;
use crate::disk::{Disk, Format, Piece, Pieces};
use crate::failure::{Doing, Failure};
use crate::progress::Progress;

const PURPOSE: &str = "cannot compare";

/// The two disks of a command.
#[derive(Debug, Args)]
pub struct Pair {
    /// The first disk: IMAGE, IMAGE@SNAPSHOT, or a file of the format of -f
    pub first: OsString,

    /// The second disk
    pub second: OsString,

    /// Format of the first disk; it is never guessed
    #[arg(
        short = 'f',
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "pcow"
    )]
    format: Format,

    /// Format of the second disk
    #[arg(
        short = 'F',
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "pcow"
    )]
    second_format: Format,
}

impl Pair {
    /// Opens both.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn open(&self, global: &Global) -> Result<(Disk, Disk), Failure> {
        let open = |name, format| Disk::open(name, format, &global.base_dirs, PURPOSE);
        let first = open(&self.first, self.format)?;
        Ok((first, open(&self.second, self.second_format)?))
    }
}

/// Bytes compared at a time.
const STEP_BYTES: u64 = 1 << 20;

/// Goes through two disks and finds the ranges in which they differ, in whole blocks.
#[derive(Debug)]
pub struct Differences<'a> {
    disks: [&'a Disk; 2],
    walks: [Pieces<'a>; 2],
    block: u64,
    at: u64,
    end: u64,
    buffers: [Vec<u8>; 2],
}

impl<'a> Differences<'a> {
    /// Of `first` and `second`; `block` is a power of two that divides a MiB. The shorter one goes on in zeros.
    pub fn new(first: &'a Disk, second: &'a Disk, block: u64) -> Self {
        Self {
            disks: [first, second],
            walks: [first.pieces(), second.pieces()],
            block,
            at: 0,
            end: first.size().max(second.size()),
            buffers: [Vec::new(), Vec::new()],
        }
    }

    /// The next range that differs, neighbours joined; with blocks of one byte it ends with the first byte.
    ///
    /// # Errors
    /// If one of the disks cannot be read.
    pub fn next(&mut self, progress: &mut Progress) -> Result<Option<Range<u64>>, Failure> {
        let mut found: Option<Range<u64>> = None;
        while self.at < self.end {
            let step = self.step().doing(|| PURPOSE.to_owned())?;
            progress.reach(self.at);
            match (step, &mut found) {
                (Some(range), Some(found)) if found.end == range.start => found.end = range.end,
                (Some(range), None) => found = Some(range),
                (Some(range), Some(_)) => {
                    // Looked at again when it is asked for.
                    self.at = range.start;
                    break;
                }
                (None, Some(_)) => break,
                (None, None) => {}
            }
            if self.block == 1 && found.is_some() {
                break;
            }
        }
        Ok(found)
    }

    /// Looks at some bytes and goes past them, or past the first range of them that differs.
    fn step(&mut self) -> pcow_format::Result<Option<Range<u64>>> {
        let first = self.walks[0].at(self.at)?;
        let second = self.walks[1].at(self.at)?;
        let end = first.bytes.end.min(second.bytes.end).min(self.end);
        if are_alike(&first, &second) {
            self.at = end;
            return Ok(None);
        }
        let step = self.at..end.min((self.at / STEP_BYTES + 1) * STEP_BYTES);
        for (side, piece) in [first, second].iter().enumerate() {
            self.load(side, piece, &step)?;
        }
        let [a, b] = &self.buffers;
        self.at = step.end;
        // As a whole first, which takes a fraction of the time of a look at each byte.
        if a == b {
            return Ok(None);
        }
        let Some(from) = a.iter().zip(b).position(|(a, b)| a != b) else {
            return Ok(None);
        };
        let start = (step.start + units(from)) / self.block * self.block;
        let next = self.end_of_difference(&step, start);
        self.at = next;
        Ok(Some(start.max(step.start)..next))
    }

    /// The end of the blocks that differ from `start` on, within `step`.
    fn end_of_difference(&self, step: &Range<u64>, start: u64) -> u64 {
        let [a, b] = &self.buffers;
        let mut at = start;
        while at < step.end {
            let next = (at + self.block).min(step.end);
            let from = at.max(step.start) - step.start;
            let place = index(from)..index(next - step.start);
            if a[place.clone()] == b[place] {
                break;
            }
            at = next;
        }
        at
    }

    fn load(&mut self, side: usize, piece: &Piece, step: &Range<u64>) -> pcow_format::Result<()> {
        let buf = &mut self.buffers[side];
        buf.resize(index(step.end - step.start), 0);
        if piece.is_data {
            self.disks[side].read(step.start, buf)
        } else {
            buf.fill(0);
            Ok(())
        }
    }
}

/// Whether two pieces show the same without a look: zeros both, or of one layer, whose content is one (I0).
fn are_alike(a: &Piece, b: &Piece) -> bool {
    match (a.is_data, b.is_data) {
        (false, false) => true,
        (true, true) => a.layer.is_some() && a.layer == b.layer,
        _ => false,
    }
}

/// A length of at most a step.
fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn units(index: usize) -> u64 {
    u64::try_from(index).unwrap_or(u64::MAX)
}
