// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tables of `protocol.md` against the constants: numbers, names, sizes, offsets, feature bits, flags.
#![allow(clippy::unwrap_used)]

use pcow_protocol::wire::{
    self, BackendCode, Cancel, Code, FaultFd, FrontendCode, Header, Held, Layout, Quiesce,
    Quiesced, Region, Register, Reset, Resume, Stop,
};

/// The document, which the constants must agree with.
const DOCUMENT: &str = include_str!("../../protocol.md");

/// The cells of every table row under a heading, up to the next heading.
fn rows(heading: &str) -> Vec<Vec<String>> {
    let start = DOCUMENT
        .find(&format!("\n{heading}"))
        .unwrap_or_else(|| panic!("no {heading}"));
    let section = &DOCUMENT[start + 1..];
    let section = &section[..section.find("\n#").unwrap_or(section.len())];
    table_rows(section)
}

/// The cells of every table row from a text to the first empty line after its table.
fn rows_after(text: &str) -> Vec<Vec<String>> {
    let start = DOCUMENT.find(text).unwrap_or_else(|| panic!("no {text}"));
    let table = &DOCUMENT[start..];
    let table = &table[table.find("\n|").unwrap() + 1..];
    table_rows(&table[..table.find("\n\n").unwrap()])
}

fn table_rows(text: &str) -> Vec<Vec<String>> {
    let lines = text
        .lines()
        .filter(|line| line.starts_with('|') && !line.starts_with("|-"));
    let cells = |line: &str| {
        let inner = line.trim_matches('|');
        inner
            .split('|')
            .map(|cell| cell.trim().to_string())
            .collect::<Vec<_>>()
    };
    lines
        .map(cells)
        .filter(|cells| cells[0].starts_with(|c: char| c.is_ascii_digit()))
        .collect()
}

/// How the document calls a payload.
fn payload_name(layout: Layout) -> &'static str {
    match layout {
        Layout::None => "none",
        Layout::U64 => "u64",
        Layout::Region => "*region*",
        Layout::FaultFd => "*fault fd*",
        Layout::Register => "*register*",
        Layout::Mmap => "*mmap*",
        Layout::Held => "*held*",
        Layout::Quiesced => "*quiesced*",
        Layout::Reset => "*reset*",
        Layout::Quiesce => "*quiesce*",
        Layout::Resume => "*resume*",
        Layout::Cancel => "*cancel*",
        Layout::Stop => "*stop*",
    }
}

/// Every request of a channel stands in the document with its number, payload, descriptors and reply, and no other does.
fn compare_requests<C: Code>(heading: &str) {
    let rows: Vec<_> = rows(heading)
        .into_iter()
        .filter(|row| !is_layout_row(row))
        .collect();
    assert_eq!(rows.len(), C::ALL.len());
    for (row, code) in rows.iter().zip(C::ALL) {
        assert_eq!(row[0], code.number().to_string());
        assert_eq!(row[1], code.name());
        assert!(row[2].starts_with(payload_name(code.request())), "{row:?}");
        assert!(
            row[3].starts_with(&code.request_fds().to_string()),
            "{row:?}"
        );
        assert_eq!(
            row[4].contains("bit 3 MUST be set"),
            code.must_ask(),
            "{row:?}"
        );
        let reply = if row[4].starts_with("status") {
            "u64"
        } else {
            &row[4]
        };
        assert!(reply.starts_with(payload_name(code.reply())), "{row:?}");
    }
}

/// Rows of a payload's layout begin with an offset and a size; those of requests have a name second.
fn is_layout_row(row: &[String]) -> bool {
    row[1].parse::<u32>().is_ok()
}

#[test]
fn the_documents_requests_are_the_codes() {
    compare_requests::<FrontendCode>("### 5.1");
    compare_requests::<BackendCode>("### 5.2");
}

#[test]
fn the_documents_features_are_the_constants() {
    let features = [
        ("REPLY_ACK", wire::FEATURE_REPLY_ACK),
        ("BACKEND_REQ", wire::FEATURE_BACKEND_REQ),
        ("BACKEND_SEND_FD", wire::FEATURE_BACKEND_SEND_FD),
        ("PCOW", wire::FEATURE_PCOW),
        ("BOUNCE", wire::FEATURE_BOUNCE),
        ("RESET", wire::FEATURE_RESET),
        ("QUIESCE", wire::FEATURE_QUIESCE),
        ("STOP", wire::FEATURE_STOP),
    ];
    let rows: Vec<_> = rows("## 3.")
        .into_iter()
        .filter(|row| !row[1].is_empty())
        .collect();
    assert_eq!(rows.len(), features.len());
    for (row, (name, bit)) in rows.iter().zip(features) {
        assert_eq!(row[1], name);
        assert_eq!(1u64 << row[0].parse::<u32>().unwrap(), bit);
        assert_eq!(row[2] == "yes", wire::NEEDED_FEATURES & bit != 0);
    }
    assert!(DOCUMENT.contains("agree on bit 30 (`PROTOCOL_FEATURES`)"));
    assert_eq!(wire::FEATURE_PROTOCOL_FEATURES, 1 << 30);
}

/// A layout in the document: where it begins, its size, and offset, size and name of each field in the code.
type DocumentedLayout = (&'static str, u32, &'static [(usize, usize, &'static str)]);

/// The layouts that re-attachment and snapshots need.
fn later_layouts() -> [DocumentedLayout; 7] {
    use std::mem::offset_of;
    [
        (
            "**Held** (40 bytes)",
            Layout::Held.size(),
            &[
                (offset_of!(Held, image), 16, "image"),
                (offset_of!(Held, layer), 16, "layer"),
                (offset_of!(Held, flags), 4, "flags"),
                (offset_of!(Held, reserved), 4, "reserved"),
            ],
        ),
        (
            "**Quiesced** (16 bytes)",
            Layout::Quiesced.size(),
            &[
                (offset_of!(Quiesced, id), 8, "id"),
                (offset_of!(Quiesced, error), 4, "error"),
                (offset_of!(Quiesced, reserved), 4, "reserved"),
            ],
        ),
        (
            "**Reset** (8 bytes)",
            Layout::Reset.size(),
            &[(offset_of!(Reset, reserved), 8, "reserved")],
        ),
        (
            "**Quiesce** (16 bytes)",
            Layout::Quiesce.size(),
            &[
                (offset_of!(Quiesce, id), 8, "id"),
                (offset_of!(Quiesce, deadline_ms), 4, "deadline_ms"),
                (offset_of!(Quiesce, reserved), 4, "reserved"),
            ],
        ),
        (
            "**Resume** (24 bytes)",
            Layout::Resume.size(),
            &[
                (offset_of!(Resume, id), 8, "id"),
                (offset_of!(Resume, layer), 16, "layer"),
            ],
        ),
        (
            "**Cancel** (8 bytes)",
            Layout::Cancel.size(),
            &[(offset_of!(Cancel, id), 8, "id")],
        ),
        (
            "**Stop** (8 bytes)",
            Layout::Stop.size(),
            &[
                (offset_of!(Stop, reason), 4, "reason"),
                (offset_of!(Stop, reserved), 4, "reserved"),
            ],
        ),
    ]
}

fn layouts() -> [DocumentedLayout; 5] {
    use std::mem::offset_of;
    use wire::VhostUserMMap as Mmap;
    [
        (
            "A message is a header",
            12,
            &[
                (offset_of!(Header, request), 4, "request"),
                (offset_of!(Header, flags), 4, "flags"),
                (offset_of!(Header, size), 4, "size"),
            ],
        ),
        (
            "**Region** (56 bytes)",
            Layout::Region.size(),
            &[
                (offset_of!(Region, size), 8, "size"),
                (offset_of!(Region, alignment), 8, "alignment"),
                (offset_of!(Region, flags), 4, "flags"),
                (offset_of!(Region, reserved), 4, "reserved"),
                (offset_of!(Region, image), 16, "image"),
                (offset_of!(Region, layer), 16, "layer"),
            ],
        ),
        (
            "**Fault fd** (24 bytes)",
            Layout::FaultFd.size(),
            &[
                (offset_of!(FaultFd, base), 8, "base"),
                (offset_of!(FaultFd, size), 8, "size"),
                (offset_of!(FaultFd, mapping_limit), 4, "mapping_limit"),
                (offset_of!(FaultFd, reserved), 4, "reserved"),
            ],
        ),
        (
            "**Register** (16 bytes)",
            Layout::Register.size(),
            &[
                (offset_of!(Register, slot), 4, "slot"),
                (offset_of!(Register, flags), 4, "flags"),
                (offset_of!(Register, length), 8, "length"),
            ],
        ),
        (
            "**Mmap** (40 bytes",
            Layout::Mmap.size(),
            &[
                (offset_of!(Mmap, shmid), 1, "shmid"),
                (offset_of!(Mmap, padding), 7, "padding"),
                (offset_of!(Mmap, fd_offset), 8, "fd_offset"),
                (offset_of!(Mmap, shm_offset), 8, "shm_offset"),
                (offset_of!(Mmap, len), 8, "len"),
                (offset_of!(Mmap, flags), 8, "flags"),
            ],
        ),
    ]
}

#[test]
fn the_documents_layouts_are_the_structures() {
    for (text, size, fields) in layouts().into_iter().chain(later_layouts()) {
        let rows = rows_after(text);
        assert_eq!(rows.len(), fields.len(), "{text}");
        for (row, (offset, bytes, name)) in rows.iter().zip(fields) {
            assert_eq!(
                row[..3],
                [offset.to_string(), bytes.to_string(), name.to_string()],
                "{text}"
            );
        }
        assert_eq!(
            fields.iter().map(|field| field.1).sum::<usize>(),
            size as usize,
            "{text}"
        );
    }
}

#[test]
fn the_documents_flags_are_the_constants() {
    let flags = [
        ("READ_ONLY", wire::REGION_READ_ONLY),
        ("DAX", wire::REGION_DAX),
        ("LOCK", wire::REGION_LOCK),
        ("UFFD_DEVICE", wire::REGION_UFFD_DEVICE),
        ("WRITABLE", wire::REGISTER_WRITABLE),
        ("SYNC", wire::REGISTER_SYNC),
        ("RW", u32::try_from(wire::MMAP_RW).unwrap()),
    ];
    for (name, flag) in flags {
        let stated = format!("bit {} {name}:", flag.trailing_zeros());
        assert!(DOCUMENT.contains(&stated), "{stated}");
        assert!(flag.is_power_of_two());
    }
    assert!(DOCUMENT.contains("At most 8 are accepted with one message"));
    assert_eq!(wire::MAX_FDS, 8);
    assert!(DOCUMENT.contains("from 2 MiB to 8 TiB − 2 MiB"));
    assert_eq!(
        (wire::REGION_ALIGNMENT, wire::MAX_REGION_SIZE),
        (2 << 20, (8 << 40) - (2 << 20))
    );
    assert!(DOCUMENT.contains("at least 16"));
    assert_eq!(wire::MIN_MAPPING_LIMIT, 16);
    assert!(DOCUMENT.contains("1: there is no space left"));
    assert_eq!(wire::STOP_NO_SPACE, 1);
}
