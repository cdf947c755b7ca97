// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `list`: the snapshots of an image, and how they came from each other.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::Args;
use pcow_format::Stored;
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::Failure;
use crate::layers;
use crate::open;
use crate::snapshots::SnapshotInfo;

/// List the snapshots of an image as a tree, the active layer on top
#[derive(Debug, Args)]
pub struct List {
    /// The image
    pub image: PathBuf,
}

/// The answer of `list`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Listing {
    /// The image's directory.
    filename: PathBuf,
    /// Number of the snapshot that the active layer lies on; null if there is none.
    active_parent: Option<String>,
    /// All snapshots in the order of their numbers.
    snapshots: Vec<Entry>,
    #[serde(skip)]
    picture: Vec<String>,
}

/// A snapshot, and where it came from.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Entry {
    #[serde(flatten)]
    snapshot: SnapshotInfo,
    /// Number of the next snapshot below; null if there is none.
    parent: Option<String>,
    /// Size of the disk in bytes at that time.
    virtual_size: Option<u64>,
    /// Bytes that the layer's files take in the image's directory; null if they cannot be inspected.
    actual_size: Option<u64>,
}

impl List {
    /// Lists the snapshots.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let stored = open::for_reading(&self.image, &global.base_dirs, "cannot list")?;
        console.show(&Listing::new(&stored, &self.image))
    }
}

impl Listing {
    fn new(stored: &Stored, path: &Path) -> Self {
        let root = stored.root();
        let describe = |layer| layers::describe(stored, layer, path);
        let layers: Vec<_> = root.layers.iter().map(describe).collect();
        let below = |uuid| root.layer(uuid).and_then(|layer| layer.parent);
        let parent = |uuid| layers::nearest_snapshot(root, below(uuid));
        let entry = |snapshot: &pcow_format::root::Snapshot| {
            let layer = layers.iter().find(|l| l.uuid == snapshot.layer);
            Entry {
                snapshot: SnapshotInfo::from(snapshot),
                parent: parent(snapshot.layer).map(|s| s.number.to_string()),
                virtual_size: layer.map(|l| l.virtual_size),
                actual_size: layer.and_then(|l| l.actual_size),
            }
        };
        Self {
            filename: path.to_owned(),
            active_parent: parent(root.active).map(|s| s.number.to_string()),
            snapshots: root.snapshots.iter().map(entry).collect(),
            picture: layers::draw_snapshots(stored, &layers),
        }
    }
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.picture
            .iter()
            .try_for_each(|line| writeln!(f, "{line}"))
    }
}
