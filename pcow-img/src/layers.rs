// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The layers of an image as they are printed, and the picture of how they lie on each other.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use pcow_format::root::{Kind, Layer, Proof, Root, Snapshot};
use pcow_format::{Stored, data_name};
use serde::Serialize;
use uuid::Uuid;

use crate::date;
use crate::size::Bytes;
use crate::tree::{self, Node};

/// Where a layer's files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerKind {
    /// In the image's directory.
    Own,
    /// In another image's directory.
    Reference,
    /// A raw file of the user's.
    Raw,
}

/// A layer.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LayerInfo {
    /// Identity of its content.
    pub uuid: Uuid,
    /// The layer below.
    pub parent: Option<Uuid>,
    /// Numbers of the snapshots that show it.
    pub snapshots: Vec<String>,
    /// Whether it is the one that a guest writes to.
    pub active: bool,
    /// Where its files are.
    pub kind: LayerKind,
    /// The file that holds its bytes, each at its own offset.
    pub filename: PathBuf,
    /// UUID of the image in which it was made; null if its files are elsewhere or cannot be read.
    pub image: Option<Uuid>,
    /// Size of the disk in bytes when it was active.
    pub virtual_size: u64,
    /// Size of its clusters in bytes.
    pub cluster_size: u64,
    /// Checksum of the map of a sealed layer; null for others, and while it has not been computed yet.
    pub map_checksum: Option<String>,
    /// How it was made sure that nobody could write to the layer when it was sealed: `lease`, or `none`; null for layers that this
    /// image did not seal.
    pub proof: Option<Proof>,
    /// Bytes that its files take in the image's directory; null if they cannot be inspected.
    pub actual_size: Option<u64>,
    /// Of these, bytes in files that no other image has.
    pub exclusive_size: Option<u64>,
    /// Of these, bytes in files that other images have, too.
    pub shared_size: Option<u64>,
}

/// Describes the layer `layer` of the image at `path`.
pub fn describe(stored: &Stored, layer: &Layer, path: &Path) -> LayerInfo {
    // A layer whose files are gone must not keep anybody from seeing the others.
    let usage = stored.usage(layer).ok();
    LayerInfo {
        uuid: layer.uuid,
        parent: layer.parent,
        snapshots: numbers(stored.root(), layer.uuid),
        active: layer.uuid == stored.root().active,
        kind: kind(layer),
        filename: data_file(layer, path),
        image: stored.origin(layer).ok().flatten(),
        virtual_size: layer.virtual_size,
        cluster_size: layer.cluster_size,
        map_checksum: layer.map_checksum.clone(),
        proof: layer.proof,
        actual_size: usage.map(pcow_format::info::Usage::total),
        exclusive_size: usage.map(|u| u.exclusive),
        shared_size: usage.map(|u| u.shared),
    }
}

fn kind(layer: &Layer) -> LayerKind {
    match layer.kind {
        Kind::Own => LayerKind::Own,
        Kind::Reference { .. } => LayerKind::Reference,
        Kind::Raw { .. } => LayerKind::Raw,
    }
}

/// The file that holds the bytes of `layer`, a layer of the image at `path`.
pub fn data_file(layer: &Layer, path: &Path) -> PathBuf {
    match &layer.kind {
        Kind::Own => path.join(data_name(layer.uuid)),
        Kind::Reference { directory } => directory.join(data_name(layer.uuid)),
        Kind::Raw { path, .. } => path.clone(),
    }
}

fn numbers(root: &Root, layer: Uuid) -> Vec<String> {
    snapshots_of(root, layer)
        .map(|s| s.number.to_string())
        .collect()
}

fn snapshots_of(root: &Root, layer: Uuid) -> impl Iterator<Item = &Snapshot> {
    root.snapshots.iter().filter(move |s| s.layer == layer)
}

/// Draws all layers, the active one on top.
pub fn draw_all(stored: &Stored, layers: &[LayerInfo]) -> Vec<String> {
    let root = stored.root();
    let places: HashMap<_, _> = layers.iter().zip(0..).map(|(l, i)| (l.uuid, i)).collect();
    let node = |layer: &LayerInfo| Node {
        parent: layer.parent.and_then(|p| places.get(&p).copied()),
        label: label(root, layer),
        details: details(root, layer),
    };
    let nodes: Vec<_> = layers.iter().map(node).collect();
    tree::draw(&nodes, places.get(&root.active).copied().unwrap_or(0))
}

/// Draws the active layer and those that are snapshots.
pub fn draw_snapshots(stored: &Stored, layers: &[LayerInfo]) -> Vec<String> {
    let named = |l: &&LayerInfo| l.active || !l.snapshots.is_empty();
    let mut shown: Vec<_> = layers.iter().filter(named).cloned().collect();
    for layer in &mut shown {
        layer.parent = nearest_snapshot(stored.root(), layer.parent).map(|s| s.layer);
    }
    draw_all(stored, &shown)
}

/// The first snapshot from `layer` downwards.
pub fn nearest_snapshot(root: &Root, layer: Option<Uuid>) -> Option<&Snapshot> {
    let down = |uuid: &Uuid| root.layer(*uuid)?.parent;
    std::iter::successors(layer, down)
        // The bound ends a loop of parents.
        .take(root.layers.len())
        .find_map(|uuid| snapshots_of(root, uuid).next())
}

fn label(root: &Root, layer: &LayerInfo) -> String {
    if layer.active {
        return "● active".to_owned();
    }
    let snapshots: Vec<_> = snapshots_of(root, layer.uuid)
        .map(|s| format!("{} {}", s.number, s.name))
        .collect();
    match (snapshots.is_empty(), layer.kind) {
        (false, _) => format!("○ {}", snapshots.join(", ")),
        (true, LayerKind::Raw) => "○ raw base".to_owned(),
        (true, _) => format!("○ layer {}", short(layer.uuid)),
    }
}

fn details(root: &Root, layer: &LayerInfo) -> String {
    let time = snapshots_of(root, layer.uuid).next().map(|s| s.time);
    let mut parts: Vec<_> = time.map(date::utc).into_iter().collect();
    parts.push(storage(layer));
    if layer.proof == Some(Proof::None) {
        parts.push("unproven".to_owned());
    }
    if layer.proof.is_some() && layer.map_checksum.is_none() {
        parts.push("checksum pending".to_owned());
    }
    parts.join("  ")
}

fn storage(layer: &LayerInfo) -> String {
    match (layer.kind, layer.actual_size) {
        (LayerKind::Own, None) => "its files are missing or cannot be read".to_owned(),
        (LayerKind::Own, Some(bytes)) if layer.shared_size > Some(0) => {
            format!("{}, shared", Bytes(bytes))
        }
        (LayerKind::Own, Some(bytes)) => Bytes(bytes).to_string(),
        (LayerKind::Reference | LayerKind::Raw, _) => layer.filename.display().to_string(),
    }
}

/// Enough of a UUID to tell layers apart by eye.
fn short(uuid: Uuid) -> String {
    uuid.simple().to_string()[..8].to_owned()
}
