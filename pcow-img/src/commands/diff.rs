// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `diff`: the ranges in which two disks differ.

use std::io::{self, Write};
use std::ops::Range;

use clap::Args;
use serde::Serialize;

use crate::cli::Global;
use crate::console::{Console, Form};
use crate::difference::{Differences, Pair};
use crate::failure::Failure;
use crate::progress::Progress;

/// Show the ranges in which two snapshots or images differ
///
/// Bytes are compared, in blocks of 4096. What both have of the same layer is not read, so that snapshots of one image
/// are compared in the time that their changes take. Where one is larger, the other counts as zeros.
#[derive(Debug, Args)]
pub struct Diff {
    #[command(flatten)]
    disks: Pair,
}

/// A range that differs. The output is an array of these.
#[derive(Debug, Serialize)]
struct Piece {
    /// First byte.
    start: u64,
    /// How many bytes.
    length: u64,
}

/// Pages, which are what a guest changes.
const BLOCK_BYTES: u64 = 4096;

impl Diff {
    /// Prints the ranges as they are found.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let (first, second) = self.disks.open(global)?;
        let total = first.size().max(second.size());
        let mut progress = Progress::new(total, global.quiet);
        let mut differences = Differences::new(&first, &second, BLOCK_BYTES);
        let form = console.form();
        let mut any = false;
        while let Some(range) = differences.next(&mut progress)? {
            print(console.writer(), form, any, &range)?;
            any = true;
        }
        if form == Form::Json {
            let end = if any { "]" } else { "[]" };
            writeln!(console.writer(), "{end}")?;
        }
        console.finish()
    }
}

fn print(out: &mut dyn Write, form: Form, any: bool, range: &Range<u64>) -> io::Result<()> {
    let (start, length) = (range.start, range.end - range.start);
    match form {
        Form::Human => {
            if !any {
                writeln!(out, "{:<16}Length", "Offset")?;
            }
            writeln!(out, "{start:<#16x}{length:#x}")
        }
        Form::Json => {
            write!(out, "{}", if any { ",\n" } else { "[" })?;
            serde_json::to_writer(out, &Piece { start, length }).map_err(io::Error::from)
        }
    }
}
