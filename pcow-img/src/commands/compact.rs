// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `compact`: storage that shows nothing of its own goes back to the filesystem.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure};
use crate::open;
use crate::progress::Progress;
use crate::size::Bytes;

/// Give space back that the image does not need
///
/// That is, of the active layer: clusters that read zero, or what is below them, and storage that is not used. The layers
/// of snapshots are never written. The image must not be in use. A compaction that is cut off can be run again.
#[derive(Debug, Args)]
pub struct Compact {
    /// The image
    image: PathBuf,
}

/// What `compact` did.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    /// The image's directory.
    filename: PathBuf,
    /// Bytes that the filesystem got back.
    freed_size: u64,
    /// Clusters that are not data any more.
    dropped_clusters: u64,
}

const PURPOSE: &str = "cannot compact";

impl Compact {
    /// Compacts.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let image = open::for_writing(&self.image, &global.base_dirs, PURPOSE)?;
        let mut progress = Progress::new(image.virtual_size().bytes(), global.quiet);
        let compacted = image.compact(&mut |at| progress.reach(at)).doing(context)?;
        drop(progress);
        console.confirm(&Done {
            filename: self.image,
            freed_size: compacted.freed_bytes,
            dropped_clusters: compacted.dropped_clusters,
        })
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: gave {} back",
            self.filename.display(),
            Bytes(self.freed_size)
        )
    }
}
