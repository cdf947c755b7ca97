// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `measure`: how much space a disk would take in another form.

use std::ffi::OsString;
use std::fmt;

use clap::Args;
use pcow_format::{ClusterSize, DEFAULT_CLUSTER_BYTES, SIZE_STEP_BYTES};
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::disk::{Disk, Format};
use crate::failure::{Doing, Failure};
use crate::size;

/// Say how much space a disk would take
///
/// As a new image, or as a raw file with -O raw: what `convert` would make of it.
#[derive(Debug, Args)]
pub struct Measure {
    /// The disk: IMAGE, IMAGE@SNAPSHOT, or a file of the format of -f
    #[arg(required_unless_present = "size", conflicts_with = "size")]
    source: Option<OsString>,

    /// Of an empty disk of this size
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    size: Option<u64>,

    /// Format of the disk; it is never guessed
    #[arg(
        short = 'f',
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "pcow"
    )]
    format: Format,

    /// Format of what would be made: pcow or raw
    #[arg(
        short = 'O',
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "pcow"
    )]
    target_format: Format,

    /// Cluster size of a new pcow image [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = size::cluster)]
    cluster_size: Option<ClusterSize>,
}

/// What `measure` found; the fields are those of `qemu-img`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Answer {
    /// Bytes that the disk would take now.
    required: u64,
    /// Bytes that it would take if all of it were written to.
    fully_allocated: u64,
}

const PURPOSE: &str = "cannot measure";
const PAGE_BYTES: u64 = 4096;
/// Clusters that one page of a map speaks of.
const CLUSTERS_PER_PAGE: u64 = PAGE_BYTES * 4;
/// `image.json`, `lock`, and the header page of the map.
const FIXED_BYTES: u64 = 3 * PAGE_BYTES;

impl Measure {
    /// Measures.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let default = || ClusterSize::new(DEFAULT_CLUSTER_BYTES);
        let cluster = self.cluster_size.map_or_else(default, Ok);
        let cluster = cluster.doing(|| PURPOSE.to_owned())?.bytes();
        let source = match &self.source {
            Some(name) => Some(Disk::open(name, self.format, &global.base_dirs, PURPOSE)?),
            None => None,
        };
        let size = source.as_ref().map_or(self.size.unwrap_or(0), Disk::size);
        let (data, pages) = match &source {
            Some(disk) => usage(disk, cluster).doing(|| PURPOSE.to_owned())?,
            None => (0, 0),
        };
        console.show(&match self.target_format {
            Format::Raw => Answer {
                required: data,
                fully_allocated: size,
            },
            Format::Pcow => {
                let size = size.max(1).next_multiple_of(SIZE_STEP_BYTES);
                let all = size.div_ceil(cluster).div_ceil(CLUSTERS_PER_PAGE);
                Answer {
                    required: data + pages * PAGE_BYTES + FIXED_BYTES,
                    fully_allocated: size + all * PAGE_BYTES + FIXED_BYTES,
                }
            }
            Format::Qcow2 | Format::Vmdk => {
                let what = "only pcow and raw can be measured; ask 'qemu-img measure' for others";
                return Err(Failure::usage(what));
            }
        })
    }
}

/// Bytes of data in whole pages, and how many pages of a map would speak of them.
fn usage(disk: &Disk, cluster: u64) -> pcow_format::Result<(u64, u64)> {
    let per_page = cluster * CLUSTERS_PER_PAGE;
    let (mut data, mut pages, mut next_page) = (0, 0, 0);
    let mut pieces = disk.pieces();
    let mut at = 0;
    while at < disk.size() {
        let piece = pieces.at(at)?;
        at = piece.bytes.end;
        if piece.is_data {
            let start = piece.bytes.start / PAGE_BYTES * PAGE_BYTES;
            data += at.next_multiple_of(PAGE_BYTES) - start;
            let first = next_page.max(piece.bytes.start / per_page);
            let end = at.div_ceil(per_page);
            pages += end.saturating_sub(first);
            next_page = next_page.max(end);
        }
    }
    Ok((data, pages))
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "required size: {}", self.required)?;
        writeln!(f, "fully allocated size: {}", self.fully_allocated)
    }
}
