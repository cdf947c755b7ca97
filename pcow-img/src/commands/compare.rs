// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `compare`: whether two disks show the same bytes.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::difference::{Differences, Pair};
use crate::failure::{Failure, Status};
use crate::progress::Progress;

/// Compare two disks; the exit code says whether they are the same
///
/// Where one is larger, the rest must read zero, unless --strict is given. What neither of them holds is not read, nor
/// what both have of the same layer.
#[derive(Debug, Args)]
pub struct Compare {
    #[command(flatten)]
    disks: Pair,

    /// Disks of different sizes are different
    #[arg(short, long)]
    strict: bool,
}

/// What `compare` found.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Verdict {
    /// The first disk, as it was named.
    filename: PathBuf,
    /// The second disk.
    other: PathBuf,
    /// Whether they show the same.
    identical: bool,
    /// Offset of the first byte that differs, or null.
    first_difference: Option<u64>,
    /// Sizes of the two.
    sizes: [u64; 2],
}

impl Compare {
    /// Compares; what cannot be compared is told apart from what differs.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<Status, Failure> {
        let shown = self.verdict(global).and_then(|verdict| {
            console.confirm(&verdict)?;
            Ok(verdict.identical)
        });
        match shown.map_err(|f| f.ending_with(Status::Trouble))? {
            true => Ok(Status::Ok),
            false => Ok(Status::Different),
        }
    }

    fn verdict(&self, global: &Global) -> Result<Verdict, Failure> {
        let (first, second) = self.disks.open(global)?;
        let sizes = [first.size(), second.size()];
        let mut first_difference = None;
        if self.strict && sizes[0] != sizes[1] {
            first_difference = Some(sizes[0].min(sizes[1]));
        } else {
            let total = sizes[0].max(sizes[1]);
            let mut progress = Progress::new(total, global.quiet);
            let mut differences = Differences::new(&first, &second, 1);
            if let Some(range) = differences.next(&mut progress)? {
                first_difference = Some(range.start);
            }
        }
        Ok(Verdict {
            filename: PathBuf::from(&self.disks.first),
            other: PathBuf::from(&self.disks.second),
            identical: first_difference.is_none(),
            first_difference,
            sizes,
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first_difference {
            None => writeln!(f, "Images are identical."),
            Some(at) => writeln!(f, "Content mismatch at offset {at}!"),
        }
    }
}
