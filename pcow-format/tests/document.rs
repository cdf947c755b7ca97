// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tables of `docs/image-format.md` against the constants of the code, and its fields against what is written.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use pcow_format::map::{self, Header, State, Tag, Word};
use pcow_format::root::{self, Kind, Layer, Root};
use pcow_format::{
    ClusterSize, DEFAULT_CLUSTER_BYTES, MAX_CLUSTER_BYTES, MAX_VIRTUAL_BYTES, MIN_CLUSTER_BYTES,
    SIZE_STEP_BYTES, VirtualSize,
};
use serde_json::Value;
use uuid::Uuid;

const DOCUMENT: &str = include_str!("../../docs/image-format.md");

/// The rows of all tables under a heading, up to the next one, without those that head a table.
fn rows(heading: &str) -> Vec<Vec<String>> {
    let (_, section) = DOCUMENT.split_once(&format!("\n{heading}\n")).unwrap();
    let lines: Vec<_> = section
        .lines()
        .take_while(|l| !l.starts_with('#'))
        .collect();
    let is_rule = |line: &str| line.starts_with("|---");
    let rows = lines.iter().enumerate().filter(|(i, line)| {
        let heads = lines.get(i + 1).is_some_and(|next| is_rule(next));
        line.starts_with('|') && !is_rule(line) && !heads
    });
    rows.map(|(_, line)| cells(line)).collect()
}

fn cells(line: &str) -> Vec<String> {
    let inner = line.trim_matches('|');
    inner.split('|').map(|c| c.trim().to_owned()).collect()
}

/// First and second column of a section's rows.
fn pairs(heading: &str) -> BTreeMap<String, String> {
    let rows = rows(heading).into_iter();
    rows.map(|row| (row[0].clone(), row[1].clone())).collect()
}

/// Offset and size of each named field of a layout table.
fn layout(heading: &str) -> BTreeMap<String, (u64, Option<u64>)> {
    let field = |row: Vec<String>| {
        let offset = row[0].parse().unwrap();
        (row[2].clone(), (offset, row[1].parse().ok()))
    };
    rows(heading).into_iter().map(field).collect()
}

fn header() -> Header {
    Header {
        layer: Uuid::from_u128(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10),
        parent: Some(Uuid::from_u128(2)),
        image: Uuid::from_u128(3),
        size: VirtualSize::new(64 << 20).unwrap(),
        cluster: ClusterSize::new(65536).unwrap(),
        clip: 2 << 20,
    }
}

#[test]
fn limits_are_those_of_the_document() {
    let limits: [(&str, u64); 10] = [
        ("version of image.json", root::VERSION.into()),
        ("smallest cluster", MIN_CLUSTER_BYTES),
        ("largest cluster", MAX_CLUSTER_BYTES),
        ("default cluster", DEFAULT_CLUSTER_BYTES),
        ("virtual sizes are multiples of", SIZE_STEP_BYTES),
        ("largest virtual size", MAX_VIRTUAL_BYTES),
        (
            "layers of an image",
            u64::try_from(root::MAX_LAYERS).unwrap(),
        ),
        ("layers of a chain", u64::try_from(root::MAX_DEPTH).unwrap()),
        ("bytes of image.json", root::MAX_BYTES),
        (
            "bytes of a snapshot's name",
            u64::try_from(root::MAX_NAME_BYTES).unwrap(),
        ),
    ];
    let limits = limits.map(|(name, value)| (name.to_owned(), value.to_string()));
    assert_eq!(pairs("### 3.1 Limits"), BTreeMap::from(limits));
}

#[test]
fn the_map_is_laid_out_as_in_the_document() {
    let found = layout("## 4. The map");
    let at = |offset: usize, size: u64| (u64::try_from(offset).unwrap(), Some(size));
    let header_fields = [
        ("magic", at(map::MAGIC_OFFSET, 8)),
        ("version", at(map::VERSION_OFFSET, 4)),
        ("checksum", at(map::CHECKSUM_OFFSET, 4)),
        ("layer", at(map::LAYER_OFFSET, 16)),
        ("parent", at(map::PARENT_OFFSET, 16)),
        ("image", at(map::IMAGE_OFFSET, 16)),
        ("virtual-size", at(map::SIZE_OFFSET, 8)),
        ("cluster-size", at(map::CLUSTER_SIZE_OFFSET, 8)),
        ("clip", at(map::CLIP_OFFSET, 8)),
        (
            "tag",
            (
                map::TAG_OFFSET,
                Some(u64::try_from(map::TAG_BYTES).unwrap()),
            ),
        ),
        ("words", (map::WORDS_OFFSET, None)),
    ];
    for (name, expected) in header_fields {
        assert_eq!(found[name], expected, "{name}");
    }
}

/// Not the constants, but the bytes: what `encode` writes stands where the document says.
#[test]
fn a_header_and_a_tag_have_their_fields_where_the_document_says() {
    let found = layout("## 4. The map");
    let raw = header().encode();
    let field = |name: &str| {
        let (offset, size) = found[name];
        let start = usize::try_from(offset).unwrap();
        raw[start..start + usize::try_from(size.unwrap()).unwrap()].to_vec()
    };
    assert_eq!(field("magic"), b"PCOWMAP\0");
    assert_eq!(field("version"), 1u32.to_le_bytes());
    assert_eq!(field("layer"), (1..=16).collect::<Vec<u8>>());
    assert_eq!(field("virtual-size"), (64u64 << 20).to_le_bytes());
    assert_eq!(field("cluster-size"), 65536u64.to_le_bytes());
    assert_eq!(field("clip"), (2u64 << 20).to_le_bytes());
    assert!(raw[88..].iter().all(|b| *b == 0));
    let tag = Tag {
        boot: Uuid::from_u128(7),
        inode: 8,
        birth_ns: 9,
    };
    let raw = tag.encode();
    let found = layout("### 4.2 Tag");
    let at = |name: &str| usize::try_from(found[name].0).unwrap();
    assert_eq!(raw[at("boot")..at("boot") + 16], *tag.boot.as_bytes());
    assert_eq!(raw[at("inode")..at("inode") + 8], 8u64.to_le_bytes());
    assert_eq!(raw[at("birth")..at("birth") + 8], 9u64.to_le_bytes());
    assert_eq!(
        raw[at("checksum")..at("checksum") + 4],
        crc32c::crc32c(&raw[..32]).to_le_bytes()
    );
}

#[test]
fn states_have_the_bits_of_the_document() {
    let states = [
        ("absent", State::Absent),
        ("data", State::Data),
        ("zero", State::Zero),
        ("live", State::Live),
    ];
    let rows = rows("### 4.3 Words");
    assert_eq!(rows.len(), states.len());
    for row in rows {
        let (_, state) = states.iter().find(|(name, _)| *name == row[1]).unwrap();
        let word = Word::default().with(1, *state);
        assert_eq!(format!("{:02b}", word.0 >> 2), row[0], "{}", row[1]);
    }
}

/// Names of fields in backticks in the first column.
fn fields(heading: &str) -> BTreeSet<String> {
    let rows = rows(heading).into_iter();
    let names = rows.map(|row| row[0].trim_matches('`').to_owned());
    names.filter(|n| !n.starts_with(['"', '{'])).collect()
}

fn keys(value: &Value) -> impl Iterator<Item = String> {
    value.as_object().unwrap().keys().cloned()
}

#[test]
fn every_field_that_is_written_is_in_the_document_and_none_else() {
    let raw = Layer {
        uuid: Uuid::from_u128(2),
        parent: None,
        virtual_size: 2 << 20,
        cluster_size: 2 << 20,
        clip: 0,
        sealed: true,
        map_checksum: None,
        proof: None,
        kind: Kind::Raw {
            path: "/raw".into(),
            device: 1,
            inode: 2,
            size: 3,
            mtime_ns: 4,
        },
    };
    let active = Layer {
        uuid: Uuid::from_u128(1),
        parent: Some(raw.uuid),
        cluster_size: 65536,
        clip: 2 << 20,
        sealed: false,
        kind: Kind::Own,
        ..raw.clone()
    };
    let layers = vec![active, raw.clone()];
    let mut image = Root::new(Uuid::from_u128(9), 65536, Uuid::from_u128(1), layers);
    image.add_snapshot("first", raw.uuid, 5).unwrap();
    let text = image.encode().unwrap();
    let value: Value = serde_json::from_slice(&text).unwrap();
    let mut written: BTreeSet<String> = keys(&value).collect();
    written.extend(keys(&value["snapshots"][0]));
    written.extend(keys(&value["layers"][1]));
    assert_eq!(fields("## 3. image.json"), written);
    let kind = &value["layers"][1]["kind"]["raw"];
    for name in keys(kind) {
        assert!(DOCUMENT.contains(&format!("\"{name}\": ")), "{name}");
    }
    let prefix = DOCUMENT.split("```\n").nth(1).unwrap().trim_end();
    assert!(text.starts_with(prefix.as_bytes()), "{prefix}");
}

#[test]
fn assumptions_and_invariants_are_numbered_without_gaps() {
    for number in 0..=8 {
        assert!(DOCUMENT.contains(&format!("- **I{number}** ")), "I{number}");
    }
    let assumptions = rows("## 12. Media assumptions");
    let numbers: Vec<_> = assumptions.iter().map(|row| row[0].clone()).collect();
    let expected: Vec<_> = (1..=18).map(|n| format!("M{n}")).collect();
    assert_eq!(numbers, expected);
}
