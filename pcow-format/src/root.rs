// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `image.json`, the root of an image: what it holds, its checks, and its text form. Touches no file.
//!
//! The text starts with a fixed prefix that carries a CRC-32C of the whole text (computed with the eight hex digits
//! set to `0`), so that nothing is decoded before it is known to be what was written.

mod validate;

use std::collections::HashMap;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{ClusterSize, VirtualSize};

/// Version of the root's format.
pub const VERSION: u32 = 1;
/// Most layers that an image may name.
pub const MAX_LAYERS: usize = 16_384;
/// Most layers from the active one down to the last base.
pub const MAX_DEPTH: usize = 8_192;
/// Longest text that is read.
pub const MAX_BYTES: u64 = 32 << 20;
/// Longest snapshot name, in bytes.
pub const MAX_NAME_BYTES: usize = 128;

const PREFIX: &str = "{\n  \"pcow\": \"image\",\n  \"checksum\": \"";
const DIGITS: usize = 8;

/// The root of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Root {
    pcow: String,
    checksum: String,
    /// Version of the format.
    pub version: u32,
    /// Features without which the image must not be opened.
    pub incompatible_features: Vec<String>,
    /// Identity of the image; a clone gets its own.
    pub uuid: Uuid,
    /// Bytes that an allocation covers at least, a power of two and not under the cluster size.
    pub allocation_unit: u64,
    /// The layer that the guest writes to.
    pub active: Uuid,
    /// Number that the next snapshot gets; numbers are never used again.
    pub next_snapshot: u64,
    /// Snapshots in the order of their numbers.
    pub snapshots: Vec<Snapshot>,
    /// All layers that the image uses.
    pub layers: Vec<Layer>,
}

/// A named point in time: a sealed layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Snapshot {
    /// Names what it shows for ever, in every image that has it (`docs/stream-format.md`).
    pub uuid: Uuid,
    /// Stable number, from 1.
    pub number: u64,
    /// Unique name.
    pub name: String,
    /// The sealed layer that it shows.
    pub layer: Uuid,
    /// When it was taken, in seconds since the epoch.
    pub time: u64,
}

/// One row of the layer table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Layer {
    /// Names one content for ever once sealed (I0).
    pub uuid: Uuid,
    /// Where to look for what this layer does not hold.
    pub parent: Option<Uuid>,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Size of its clusters in bytes.
    pub cluster_size: u64,
    /// How many bytes of the parent show.
    pub clip: u64,
    /// Whether its files are final.
    pub sealed: bool,
    /// Checksum of the map file of a sealed layer.
    pub map_checksum: Option<String>,
    /// How it was made sure that nobody writes to a sealed layer of the image's own any more.
    pub proof: Option<Proof>,
    /// What the layer is and where its files are.
    pub kind: Kind,
}

/// How it was made sure, when a layer was sealed, that nobody could write to its data any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proof {
    /// By a lease: the kernel knew of no writer.
    Lease,
    /// It was not: the locks of the image had to do.
    None,
}

/// What a layer is and where its files are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum Kind {
    /// A map and a data file in the image's own directory.
    Own,
    /// A map and a data file in another image's directory.
    Reference {
        /// That directory, absolute.
        directory: PathBuf,
    },
    /// A raw file that belongs to the user.
    Raw {
        /// The file, absolute.
        path: PathBuf,
        /// Device number when it was taken as a base.
        device: u64,
        /// Inode number then.
        inode: u64,
        /// Length in bytes then.
        size: u64,
        /// Time of its last change then, in nanoseconds since the epoch.
        mtime_ns: i64,
    },
}

impl Layer {
    /// The layer's cluster size; `validate` has checked it.
    ///
    /// # Errors
    /// `Corrupt` if it is out of range.
    pub fn cluster(&self) -> Result<ClusterSize> {
        ClusterSize::new(self.cluster_size)
            .map_err(|e| corrupt("a layer's cluster size").caused_by(e))
    }

    /// The layer's virtual size.
    ///
    /// # Errors
    /// `Corrupt` if it is out of range.
    pub fn size(&self) -> Result<VirtualSize> {
        VirtualSize::new(self.virtual_size)
            .map_err(|e| corrupt("a layer's virtual size").caused_by(e))
    }

    /// Whether it is a raw file.
    pub fn is_raw(&self) -> bool {
        matches!(self.kind, Kind::Raw { .. })
    }
}

impl Root {
    /// The root of a new image without snapshots.
    pub fn new(uuid: Uuid, allocation_unit: u64, active: Uuid, layers: Vec<Layer>) -> Self {
        Self {
            pcow: "image".into(),
            checksum: "0".repeat(DIGITS),
            version: VERSION,
            incompatible_features: Vec::new(),
            uuid,
            allocation_unit,
            active,
            next_snapshot: 1,
            snapshots: Vec::new(),
            layers,
        }
    }

    /// The layer with this UUID.
    pub fn layer(&self, uuid: Uuid) -> Option<&Layer> {
        self.layers.iter().find(|l| l.uuid == uuid)
    }

    /// The row of the layer with this UUID, to be changed.
    pub(crate) fn row_mut(&mut self, uuid: Uuid) -> Result<&mut Layer> {
        let row = self.layers.iter_mut().find(|l| l.uuid == uuid);
        row.ok_or_else(|| corrupt(&format!("layer {uuid} is not in the layer table")))
    }

    /// The active layer.
    ///
    /// # Errors
    /// `Corrupt` if the table lacks it; `decode` has checked that.
    pub fn active_layer(&self) -> Result<&Layer> {
        self.layer(self.active)
            .ok_or_else(|| corrupt("the active layer is not in the layer table"))
    }

    /// The layer that was active before the present one, if sealing it was the last change of the layer tree.
    pub fn sealed_last(&self) -> Option<&Layer> {
        let newest = self.snapshots.last()?;
        let parent = self.layer(self.layer(self.active)?.parent?)?;
        // Every change that seals a layer gives a number: if a later one did so, or the active layer lies elsewhere, the
        // tree has changed since.
        let is_last = newest.layer == parent.uuid && newest.number + 1 == self.next_snapshot;
        Some(parent).filter(|l| is_last && l.sealed && l.kind == Kind::Own)
    }

    /// The snapshot called `name_or_number`; a text of digits is always a number.
    ///
    /// # Errors
    /// `NotFound`, with the names that exist.
    pub fn snapshot(&self, name_or_number: &str) -> Result<&Snapshot> {
        let digits = name_or_number.bytes().all(|b| b.is_ascii_digit());
        let number = name_or_number.parse::<u64>().ok().filter(|_| digits);
        self.snapshots
            .iter()
            .find(|s| number.map_or(s.name == name_or_number, |n| s.number == n))
            .ok_or_else(|| {
                let known: Vec<_> = self.snapshots.iter().map(|s| s.name.as_str()).collect();
                let known = if known.is_empty() {
                    "it has none".to_owned()
                } else {
                    format!("it has {}", known.join(", "))
                };
                let what = format!("the image has no snapshot '{name_or_number}' ({known})");
                Error::new(ErrorKind::NotFound, what)
            })
    }

    /// The layers from `top` down to the last base.
    ///
    /// # Errors
    /// `Corrupt` for a layer that is not in the table, a loop or too deep a chain.
    pub fn chain(&self, top: Uuid) -> Result<Vec<&Layer>> {
        let by_uuid: HashMap<_, _> = self.layers.iter().map(|l| (l.uuid, l)).collect();
        let mut chain = Vec::new();
        let mut next = Some(top);
        while let Some(uuid) = next {
            let layer = by_uuid
                .get(&uuid)
                .ok_or_else(|| corrupt(&format!("layer {uuid} is not in the layer table")))?;
            // The bound also ends a loop of parents.
            if chain.len() == MAX_DEPTH {
                return Err(too_deep());
            }
            chain.push(*layer);
            next = layer.parent;
        }
        Ok(chain)
    }

    /// Adds a snapshot of `layer`, new to the world, under the next number.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is not allowed, `Exists` for one in use.
    pub fn add_snapshot(&mut self, name: &str, layer: Uuid, time: u64) -> Result<u64> {
        self.add_known_snapshot(Snapshot {
            uuid: Uuid::new_v4(),
            number: self.next_snapshot,
            name: name.to_owned(),
            layer,
            time,
        })
    }

    /// Adds a snapshot that another image has, too: under its own number if no number from that on was given out yet.
    /// Returns the number.
    ///
    /// # Errors
    /// As [`Root::add_snapshot`]; `InvalidArgument` for a snapshot that is there already.
    pub(crate) fn add_known_snapshot(&mut self, mut snapshot: Snapshot) -> Result<u64> {
        check_name(&snapshot.name)?;
        if let Some(same) = self.snapshots.iter().find(|s| s.uuid == snapshot.uuid) {
            let what = format!("the image has this snapshot already, as '{}'", same.name);
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        if self.snapshots.iter().any(|s| s.name == snapshot.name) {
            let what = format!("the image already has a snapshot '{}'", snapshot.name);
            return Err(Error::new(ErrorKind::Exists, what));
        }
        let number = self.next_snapshot.max(snapshot.number);
        self.next_snapshot = number.checked_add(1).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidArgument,
                "there are no snapshot numbers left",
            )
        })?;
        snapshot.number = number;
        self.snapshots.push(snapshot);
        Ok(number)
    }

    /// The text of `image.json`.
    ///
    /// # Errors
    /// `InvalidArgument` if the image has outgrown a limit.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.validate()?;
        let mut unsigned = self.clone();
        unsigned.checksum = "0".repeat(DIGITS);
        let mut text = serde_json::to_vec_pretty(&unsigned)
            .map_err(|e| corrupt("image.json cannot be written").caused_by(e))?;
        text.push(b'\n');
        debug_assert!(text.starts_with(PREFIX.as_bytes()));
        let checksum = format!("{:08x}", crc32c::crc32c(&text));
        text[PREFIX.len()..PREFIX.len() + DIGITS].copy_from_slice(checksum.as_bytes());
        Ok(text)
    }

    /// Reads the text of `image.json`. Order of the checks: magic, checksum, version and features, fields, cross-fields.
    ///
    /// # Errors
    /// `NotAnImage`, `Corrupt` or `Unsupported`.
    pub fn decode(text: &[u8]) -> Result<Self> {
        let digits = PREFIX.len()..PREFIX.len() + DIGITS;
        if !text.starts_with(PREFIX.as_bytes()) || text.len() < digits.end {
            let what = "image.json does not start like the root of a pcow image";
            return Err(Error::new(ErrorKind::NotAnImage, what));
        }
        let mut unsigned = text.to_vec();
        unsigned[digits.clone()].fill(b'0');
        if format!("{:08x}", crc32c::crc32c(&unsigned)).as_bytes() != &text[digits] {
            return Err(corrupt("image.json has a wrong checksum"));
        }
        check_version(text)?;
        let root: Root = serde_json::from_slice(text)
            .map_err(|e| corrupt("image.json cannot be read").caused_by(e))?;
        root.validate()?;
        Ok(root)
    }
}

/// The two fields that must be understood before the rest can be.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Preamble {
    version: u32,
    #[serde(default)]
    incompatible_features: Vec<String>,
}

fn check_version(text: &[u8]) -> Result<()> {
    let p: Preamble = serde_json::from_slice(text)
        .map_err(|e| corrupt("image.json cannot be read").caused_by(e))?;
    if p.version != VERSION {
        let what = format!(
            "the image has format version {}, this program knows {VERSION}",
            p.version
        );
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    if let Some(feature) = p.incompatible_features.first() {
        let what = format!(
            "the image needs the feature '{}', which this program does not know",
            feature.escape_debug()
        );
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    Ok(())
}

/// A snapshot's name: 1 to 128 bytes, no control characters or slash, not only digits, no dash in front.
///
/// # Errors
/// `InvalidArgument`, saying which rule is broken.
pub fn check_name(name: &str) -> Result<()> {
    let problem = if name.is_empty() || name.len() > MAX_NAME_BYTES {
        "must have 1 to 128 bytes"
    } else if name.chars().any(|c| c.is_control() || c == '/' || c == '@') {
        "must not contain control characters, '/' or '@'"
    } else if name.bytes().all(|b| b.is_ascii_digit()) {
        "must not consist of digits only: those are snapshot numbers"
    } else if name.starts_with('-') || name != name.trim() {
        "must not start with '-' nor have spaces around it"
    } else {
        return Ok(());
    };
    let what = format!("the snapshot name '{}' {problem}", name.escape_debug());
    Err(Error::new(ErrorKind::InvalidArgument, what))
}

fn too_deep() -> Error {
    corrupt(&format!(
        "more than {MAX_DEPTH} layers in a chain, or a loop"
    ))
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(uuid: u128, parent: Option<u128>) -> Layer {
        Layer {
            uuid: Uuid::from_u128(uuid),
            parent: parent.map(Uuid::from_u128),
            virtual_size: 4 << 20,
            cluster_size: 65536,
            clip: if parent.is_some() { 4 << 20 } else { 0 },
            sealed: parent.is_none(),
            map_checksum: None,
            proof: None,
            kind: Kind::Own,
        }
    }

    fn root() -> Root {
        let layers = vec![layer(1, Some(2)), layer(2, None)];
        let mut root = Root::new(Uuid::from_u128(9), 65536, Uuid::from_u128(1), layers);
        root.add_known_snapshot(Snapshot {
            uuid: Uuid::from_u128(7),
            number: 1,
            name: "first".into(),
            layer: Uuid::from_u128(2),
            time: 5,
        })
        .unwrap();
        root
    }

    fn decode_error(root: &Root) -> ErrorKind {
        // `encode` refuses an invalid root, so the text is signed here.
        let mut text = serde_json::to_vec_pretty(root).unwrap();
        text.push(b'\n');
        let sum = format!("{:08x}", crc32c::crc32c(&text));
        text[PREFIX.len()..PREFIX.len() + DIGITS].copy_from_slice(sum.as_bytes());
        Root::decode(&text).unwrap_err().kind()
    }

    #[test]
    fn a_root_reads_back_and_every_flipped_bit_is_noticed() {
        let text = root().encode().unwrap();
        let mut back = Root::decode(&text).unwrap();
        back.checksum = "0".repeat(DIGITS);
        assert_eq!(back, root());
        for bit in 0..text.len() * 8 {
            let mut flipped = text.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Root::decode(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_version_or_feature_of_the_future_is_unsupported_not_corrupt() {
        let mut newer = root();
        newer.version = 2;
        assert_eq!(decode_error(&newer), ErrorKind::Unsupported);
        let mut featured = root();
        featured.incompatible_features.push("encrypted".into());
        assert_eq!(decode_error(&featured), ErrorKind::Unsupported);
    }

    #[test]
    fn a_loop_of_parents_a_missing_parent_and_a_doubled_layer_are_corrupt() {
        let mut looped = root();
        looped.layers[1].parent = Some(looped.layers[1].uuid);
        assert_eq!(decode_error(&looped), ErrorKind::Corrupt);
        let mut orphaned = root();
        orphaned.layers[1].parent = Some(Uuid::from_u128(77));
        assert_eq!(decode_error(&orphaned), ErrorKind::Corrupt);
        let mut doubled = root();
        doubled.layers.push(doubled.layers[1].clone());
        assert_eq!(decode_error(&doubled), ErrorKind::Corrupt);
    }

    /// Only the active chain was walked once: a loop among the layers of a snapshot was found by whoever cloned it.
    #[test]
    fn a_loop_among_the_layers_of_a_snapshot_is_corrupt() {
        let mut looped = root();
        looped.layers.push(layer(3, Some(4)));
        looped.layers.push(layer(4, Some(3)));
        looped.layers[2].sealed = true;
        looped.layers[3].sealed = true;
        assert_eq!(decode_error(&looped), ErrorKind::Corrupt);
    }

    #[test]
    fn the_layer_sealed_last_is_known_until_the_tree_changes_again() {
        let sealed = |root: &Root| root.sealed_last().map(|l| l.uuid.as_u128());
        assert_eq!(sealed(&root()), Some(2));
        // Another branch was sealed since, as by a rollback; its snapshot may be deleted by now.
        let mut changed = root();
        changed.layers.push(layer(3, Some(2)));
        let number = changed.add_snapshot("second", Uuid::from_u128(3), 6);
        assert_eq!((number.unwrap(), sealed(&changed)), (2, None));
        changed.snapshots.pop();
        assert_eq!(sealed(&changed), None);
        // A clone's parent was never its active layer.
        let mut cloned = root();
        cloned.snapshots.clear();
        assert_eq!(sealed(&cloned), None);
    }

    #[test]
    fn digits_are_a_number_and_never_a_name() {
        assert!(check_name("2024").is_err());
        assert!(check_name("a/b").is_err());
        assert!(check_name("before-upgrade").is_ok());
        assert_eq!(root().snapshot("1").unwrap().name, "first");
        assert_eq!(root().snapshot("first").unwrap().number, 1);
        assert!(root().snapshot("7").is_err());
        // A sign makes a number for a parser, but a name for a person.
        assert!(root().snapshot("+1").is_err());
    }
}
