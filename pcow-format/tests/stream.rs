// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Streams: what is sent is what is received, whatever happens on the way; what was not sent by anybody is refused. That a copy
//! follows whatever is done to an image is part of the model test.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use pcow_format::check::check;
use pcow_format::ops::{self, NewImage, Received};
use pcow_format::stream::{
    self, DATA, END, HEADER_BYTES, Header, MAX_DATA_BYTES, RECORD_BYTES, Reader, Sending,
    UNIT_BYTES, ZEROS,
};
use pcow_format::{ClusterSize, ErrorKind, Image, Stored, VirtualSize};

const DOCUMENT: &str = include_str!("../../docs/stream-format.md");
const MIB: u64 = 1 << 20;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        // In memory where there is a place for that: thousands of syncs, of which none is looked at.
        Self(tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn create(&self, name: &str, size: u64, cluster: u64) {
        let new = NewImage {
            size: Some(VirtualSize::new(size).unwrap()),
            cluster: ClusterSize::new(cluster).unwrap(),
            allocation_unit: None,
            base: None,
        };
        ops::create(&self.path(name), &new, &[]).unwrap();
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Image)) {
        change(&mut Image::open(&self.path(name), &[]).unwrap());
    }

    fn stored(&self, name: &str) -> Stored {
        Stored::open(&self.path(name), &[]).unwrap()
    }

    fn send(&self, name: &str, snapshot: &str, from: Option<&str>) -> Vec<u8> {
        let mut stream = Vec::new();
        let sending = Sending::of(&self.stored(name), snapshot, from).unwrap();
        sending.write(&mut stream, &mut |_| ()).unwrap();
        stream
    }

    fn receive(&self, name: &str, stream: &[u8]) -> pcow_format::Result<Received> {
        let mut input = stream;
        ops::receive(&self.path(name), &mut input, None, &[], &mut |_, _| ())
    }

    /// What a snapshot shows.
    fn show(&self, name: &str, snapshot: &str) -> Vec<u8> {
        let stored = self.stored(name);
        let view = stored
            .view(stored.root().snapshot(snapshot).unwrap().layer)
            .unwrap();
        let mut bytes = vec![0; usize::try_from(view.size()).unwrap()];
        view.read(0, &mut bytes).unwrap();
        bytes
    }

    fn check(&self, name: &str) {
        let report = check(&self.stored(name)).unwrap();
        assert!(report.corruptions.is_empty(), "{report:?}");
        assert!(report.unchecked.is_empty(), "{report:?}");
        assert!(report.leaks.is_empty(), "{report:?}");
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name();
        let mut names: Vec<_> = entries.map(|e| name(e).into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// An image with two snapshots that differ in data, zeros and size, and a copy of the first.
fn two_snapshots(place: &Place) {
    place.create("vm", 4 * MIB, 16_384);
    place.change("vm", |image| {
        image.write(0, &[1; 50_000]).unwrap();
        image.write(3 * MIB, &[2; 200_000]).unwrap();
        image.snapshot(Some("one")).unwrap();
        image.resize(VirtualSize::new(6 * MIB).unwrap()).unwrap();
        image.write(20_000, &[3; 3000]).unwrap();
        image.write_zeros(3 * MIB..3 * MIB + 100_000).unwrap();
        image.write(5 * MIB, &[4; 9000]).unwrap();
        image.snapshot(Some("two")).unwrap();
    });
    let full = place.send("vm", "one", None);
    place.receive("copy", &full).unwrap();
}

/// The ends of header and records.
fn borders(stream: &[u8]) -> Vec<usize> {
    let mut at = HEADER_BYTES;
    let mut borders = vec![at];
    while at < stream.len() {
        let number = |offset| u64::from_le_bytes(stream[at + offset..][..8].try_into().unwrap());
        let kind = u32::from_le_bytes(stream[at..][..4].try_into().unwrap());
        let payload = if kind == DATA { number(16) } else { 0 };
        at += RECORD_BYTES + usize::try_from(payload).unwrap();
        borders.push(at);
    }
    borders
}

fn drain(mut stream: &[u8]) -> pcow_format::Result<()> {
    let mut reader = Reader::new(&mut stream)?;
    while reader.next_record()?.is_some() {}
    Ok(())
}

#[test]
fn a_full_stream_and_one_that_continues_it_show_what_was_sent() {
    let place = Place::new();
    two_snapshots(&place);
    let received = place
        .receive("copy", &place.send("vm", "two", Some("one")))
        .unwrap();
    for snapshot in ["one", "two"] {
        assert!(
            place.show("vm", snapshot) == place.show("copy", snapshot),
            "{snapshot}"
        );
    }
    let (vm, copy) = (place.stored("vm"), place.stored("copy"));
    let identity = |s: &pcow_format::root::Snapshot| (s.uuid, s.number, s.name.clone(), s.time);
    let of = |stored: &Stored| {
        stored
            .root()
            .snapshots
            .iter()
            .map(identity)
            .collect::<Vec<_>>()
    };
    assert_eq!(of(&vm), of(&copy));
    assert_eq!(received.snapshot, copy.root().snapshots[1]);
    assert_ne!(vm.root().uuid, copy.root().uuid);
    assert_eq!(place.names(), ["copy", "vm"]);
    place.check("copy");
}

/// The disk that goes on from what was received shows the newest snapshot, and can be written to.
#[test]
fn a_received_image_is_one_like_others() {
    let place = Place::new();
    two_snapshots(&place);
    place
        .receive("copy", &place.send("vm", "two", Some("one")))
        .unwrap();
    place.change("copy", |image| {
        assert_eq!(image.virtual_size().bytes(), 6 * MIB);
        let mut buf = [0; 4];
        image.read(5 * MIB, &mut buf).unwrap();
        assert_eq!(buf, [4; 4]);
        image.write(0, &[9]).unwrap();
        image.delete_snapshot("one").unwrap();
    });
    place.check("copy");
    assert!(place.show("vm", "two") == place.show("copy", "two"));
}

#[test]
fn what_is_the_same_and_holes_are_not_sent() {
    let place = Place::new();
    two_snapshots(&place);
    let (one, two) = (
        place.send("vm", "one", None),
        place.send("vm", "two", Some("one")),
    );
    let data = |stream: &[u8]| {
        let mut input = stream;
        let mut reader = Reader::new(&mut input).unwrap();
        let (mut data, mut zeros) = (0, 0);
        while let Some(record) = reader.next_record().unwrap() {
            match record {
                stream::Record::Data(_, bytes) => data += bytes.len(),
                stream::Record::Zeros(range) => zeros += range.end - range.start,
            }
        }
        (data, zeros)
    };
    // Whole clusters of 16 KiB.
    assert_eq!(data(&one), (4 * 16_384 + 13 * 16_384, 0));
    let (changed, zeros) = data(&two);
    assert_eq!(changed, 16_384 + 16_384 + 16_384);
    assert_eq!(zeros, 6 * 16_384);
}

/// Deleting a snapshot gives others new layers. What they show, and their UUID, stays.
#[test]
fn an_older_snapshot_may_be_deleted_on_both_sides_between_two_streams() {
    let place = Place::new();
    two_snapshots(&place);
    place
        .receive("copy", &place.send("vm", "two", Some("one")))
        .unwrap();
    for name in ["vm", "copy"] {
        place.change(name, |image| drop(image.delete_snapshot("one").unwrap()));
    }
    place.change("vm", |image| {
        image.write(MIB, &[5; 5]).unwrap();
        image.snapshot(Some("three")).unwrap();
    });
    place
        .receive("copy", &place.send("vm", "three", Some("two")))
        .unwrap();
    assert!(place.show("vm", "three") == place.show("copy", "three"));
    place.check("copy");
}

#[test]
fn every_flipped_bit_of_a_stream_is_noticed() {
    let place = Place::new();
    place.create("vm", 2 * MIB, 4096);
    place.change("vm", |image| {
        image.write(8192, &[7; 100]).unwrap();
        image.write(MIB, &[7; 100]).unwrap();
        image.snapshot(Some("one")).unwrap();
        image.write_zeros(8192..12_288).unwrap();
        image.write(MIB, &[8; 10]).unwrap();
        image.snapshot(Some("two")).unwrap();
    });
    for from in [None, Some("one")] {
        let stream = place.send("vm", "two", from);
        drain(&stream).unwrap();
        for bit in 0..stream.len() * 8 {
            let mut flipped = stream.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(drain(&flipped).is_err(), "bit {bit}");
        }
    }
}

/// One bit in each field and each payload, with all that `receive` does.
#[test]
fn a_damaged_stream_changes_nothing_that_can_be_seen_and_can_be_sent_again() {
    let place = Place::new();
    two_snapshots(&place);
    let stream = place.send("vm", "two", Some("one"));
    let before = std::fs::read(place.path("copy/image.json")).unwrap();
    let in_records = borders(&stream).into_iter().filter(|b| *b < stream.len());
    let places = [0, 9, 17, 33, 49, 90, 100, 509].into_iter();
    let in_records = in_records.flat_map(|b| [b, b + 5, b + 9, b + 17, b + 30].into_iter());
    for at in places.chain(in_records).chain([stream.len() - 1]) {
        let mut damaged = stream.clone();
        damaged[at] ^= 4;
        let refused = place.receive("copy", &damaged).unwrap_err();
        let kind = refused.kind();
        let known = matches!(
            kind,
            ErrorKind::Stream | ErrorKind::Unsupported | ErrorKind::StreamCut
        );
        assert!(known, "byte {at}: {refused:?}");
        assert_eq!(
            std::fs::read(place.path("copy/image.json")).unwrap(),
            before
        );
    }
    place.receive("copy", &stream).unwrap();
    assert!(place.show("vm", "two") == place.show("copy", "two"));
    place.check("copy");
    assert_eq!(place.names(), ["copy", "vm"]);
}

/// At each record's end, and within header, record and payload.
fn cuts(stream: &[u8]) -> Vec<usize> {
    let borders = borders(stream);
    let around = |b: &usize| [*b, b.saturating_sub(1), b + 1, b + 31, b + 40].into_iter();
    let mut cuts: Vec<_> = borders.iter().flat_map(around).chain([0, 1, 100]).collect();
    cuts.retain(|cut| *cut < stream.len());
    cuts
}

#[test]
fn a_stream_that_is_cut_off_anywhere_goes_on_from_there() {
    let place = Place::new();
    two_snapshots(&place);
    for (snapshot, from) in [("two", None), ("two", Some("one"))] {
        let stream = place.send("vm", snapshot, from);
        for cut in cuts(&stream) {
            let name = from.map_or("new", |_| "copy");
            let refused = place.receive(name, &stream[..cut]).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::StreamCut, "cut at {cut}");
            let part = ops::unfinished(&place.path(name), &[]).unwrap();
            assert_eq!(part.is_some(), cut >= HEADER_BYTES, "cut at {cut}");
            let mut rest = Vec::new();
            let sending = match &part {
                Some(part) => Sending::rest(&place.stored("vm"), &part.token()).unwrap(),
                None => Sending::of(&place.stored("vm"), snapshot, from).unwrap(),
            };
            sending.write(&mut rest, &mut |_| ()).unwrap();
            place.receive(name, &rest).unwrap();
            assert!(
                place.show("vm", snapshot) == place.show(name, snapshot),
                "cut at {cut}"
            );
            assert_eq!(ops::unfinished(&place.path(name), &[]).unwrap(), None);
            place.check(name);
            // Again from the beginning.
            if from.is_none() {
                std::fs::remove_dir_all(place.path(name)).unwrap();
            } else {
                place.change(name, |image| {
                    image.rollback("one", true).unwrap();
                    image.delete_snapshot("two").unwrap();
                });
            }
        }
    }
    assert_eq!(place.names(), ["copy", "vm"]);
}

/// What was received before a cut need not be sent again, but may.
#[test]
fn the_rest_holds_only_what_is_missing_and_the_whole_serves_as_well() {
    let place = Place::new();
    two_snapshots(&place);
    let stream = place.send("vm", "two", None);
    let cut = borders(&stream)[1];
    place.receive("new", &stream[..cut]).unwrap_err();
    let part = ops::unfinished(&place.path("new"), &[]).unwrap().unwrap();
    let mut rest = Vec::new();
    let sending = Sending::rest(&place.stored("vm"), &part.token()).unwrap();
    sending.write(&mut rest, &mut |_| ()).unwrap();
    assert_eq!(rest.len(), stream.len() - (cut - HEADER_BYTES));
    // A rest of which the beginning is not here.
    let refused = place.receive("elsewhere", &rest).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    place.receive("new", &stream).unwrap();
    assert!(place.show("vm", "two") == place.show("new", "two"));
}

#[test]
fn what_was_begun_is_given_up_only_on_demand() {
    let place = Place::new();
    two_snapshots(&place);
    let (one, two) = (place.send("vm", "one", None), place.send("vm", "two", None));
    place.receive("new", &two[..two.len() - 1]).unwrap_err();
    let refused = place.receive("new", &one).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unfinished);
    let given_up = ops::give_up_receiving(&place.path("new"), &[]).unwrap();
    assert_eq!(given_up.unwrap().header.snapshot.name, "two");
    assert_eq!(
        ops::give_up_receiving(&place.path("new"), &[]).unwrap(),
        None
    );
    place.receive("new", &one).unwrap();
    assert_eq!(place.names(), ["copy", "new", "vm"]);
}

#[test]
fn an_image_that_is_not_what_the_stream_continues_is_refused_and_told_why() {
    let place = Place::new();
    two_snapshots(&place);
    let stream = place.send("vm", "two", Some("one"));
    let refusal = |name: &str| place.receive(name, &stream).unwrap_err().to_string();
    assert!(refusal("nothing").contains("'one', and there is no image"));
    place.create("empty", 4 * MIB, 4096);
    assert!(refusal("empty").contains("'one'") && refusal("empty").contains("it has none"));
    place.create("other", 4 * MIB, 4096);
    place.change("other", |image| _ = image.snapshot(Some("one")).unwrap());
    assert!(refusal("other").contains("does not have (its newest one is 'one')"));
    place.change("copy", |image| _ = image.snapshot(Some("mine")).unwrap());
    assert!(refusal("copy").contains("not the newest one here (its newest one is 'mine')"));
    place.change("copy", |image| {
        image.delete_snapshot("mine").unwrap();
        image.write(0, &[1]).unwrap();
    });
    assert!(refusal("copy").contains("was changed since snapshot 'one'"));
    place.change("copy", |image| drop(image.rollback("one", true).unwrap()));
    place.receive("copy", &stream).unwrap();
    assert!(refusal("copy").contains("has this snapshot already, as 'two'"));
    let full = place
        .receive("copy", &place.send("vm", "two", None))
        .unwrap_err();
    assert_eq!(full.kind(), ErrorKind::InvalidArgument);
    assert_eq!(place.names(), ["copy", "empty", "other", "vm"]);
}

/// A stream by the document alone: header, then records as they are given.
struct Forged {
    bytes: Vec<u8>,
    sum: u32,
}

impl Forged {
    fn new(header: &Header) -> Self {
        let bytes = header.encode().to_vec();
        let sum = crc32c::crc32c(&bytes[..508]);
        Self { bytes, sum }
    }

    fn record(mut self, kind: u32, offset: u64, length: u64, payload: &[u8]) -> Self {
        let mut raw = kind.to_le_bytes().to_vec();
        let sum = if payload.is_empty() {
            0
        } else {
            crc32c::crc32c(payload)
        };
        raw.extend(sum.to_le_bytes());
        raw.extend(offset.to_le_bytes());
        raw.extend(length.to_le_bytes());
        raw.extend([0; 4]);
        self.sum = crc32c::crc32c_append(crc32c::crc32c(&self.sum.to_le_bytes()), &raw);
        raw.extend(self.sum.to_le_bytes());
        self.bytes.extend(raw);
        self.bytes.extend(payload);
        self
    }
}

#[test]
fn records_that_nobody_may_send_are_refused_though_their_checksums_are_right() {
    let place = Place::new();
    two_snapshots(&place);
    let header = Sending::of(&place.stored("vm"), "two", None)
        .unwrap()
        .header()
        .clone();
    let size = header.size.bytes();
    let page = [1; 4096];
    let start = || Forged::new(&header).record(DATA, 8192, 4096, &page);
    let good = start().record(END, size, 1, &[]);
    drain(&good.bytes).unwrap();
    let cases = [
        (
            "the same place again",
            start().record(DATA, 8192, 4096, &page),
        ),
        ("before it", start().record(ZEROS, 0, 4096, &[])),
        (
            "across the end",
            start().record(ZEROS, size - 4096, 8192, &[]),
        ),
        (
            "past the largest number",
            start().record(ZEROS, u64::MAX - 4095, 8192, &[]),
        ),
        ("nothing", start().record(ZEROS, 16_384, 0, &[])),
        (
            "not a whole page",
            start().record(DATA, 16_384, 100, &[1; 100]),
        ),
        ("not at a page", start().record(ZEROS, 16_385, 4096, &[])),
        (
            "more than fits",
            start().record(DATA, 16_384, MAX_DATA_BYTES + UNIT_BYTES, &[]),
        ),
        (
            "everything",
            start().record(DATA, 16_384, size - 16_384, &[]),
        ),
        ("of no kind", start().record(9, 16_384, 4096, &[])),
        ("an end elsewhere", start().record(END, size - 4096, 1, &[])),
        ("an end of fewer", start().record(END, size, 0, &[])),
        (
            "more than the end",
            start().record(END, size, 1, &[]).record(END, size, 1, &[]),
        ),
    ];
    for (what, forged) in cases {
        let refused = drain(&forged.bytes).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Stream, "{what}: {refused}");
    }
}

#[test]
fn headers_that_nobody_may_send_are_refused_though_their_checksums_are_right() {
    let place = Place::new();
    two_snapshots(&place);
    let sending = Sending::of(&place.stored("vm"), "two", Some("one")).unwrap();
    let good = sending.header().encode();
    let cases: [(usize, &[u8]); 10] = [
        (12, &[1]),
        (32, &[0; 16]),
        (64, &[0; 8]),
        (72, &[9]),
        (88, &[1]),
        (96, &[1]),
        (104, &[1]),
        (112, &[200]),
        (116, b"/"),
        (400, &[1]),
    ];
    for (offset, bytes) in cases {
        let mut raw = good;
        raw[offset..offset + bytes.len()].copy_from_slice(bytes);
        let sum = crc32c::crc32c(&raw[..508]);
        raw[508..].copy_from_slice(&sum.to_le_bytes());
        assert!(Header::decode(&raw).is_err(), "offset {offset}");
    }
    assert_eq!(&Header::decode(&good).unwrap(), sending.header());
}

/// Offset and size of each named field of the tables under a heading.
fn layout(heading: &str) -> Vec<(usize, usize, String)> {
    let (_, section) = DOCUMENT.split_once(&format!("\n## {heading}\n")).unwrap();
    let lines = section.lines().take_while(|l| !l.starts_with('#'));
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|')
            .split('|')
            .map(|c| c.trim().to_owned())
            .collect()
    };
    let rows = lines.filter(|l| l.starts_with('|')).map(cells);
    let field =
        |row: Vec<String>| Some((row[0].parse().ok()?, row[1].parse().ok()?, row[2].clone()));
    rows.filter_map(field).collect()
}

#[test]
fn header_and_records_are_laid_out_as_in_the_document() {
    let constants = [
        ("magic", 0),
        ("version", stream::VERSION_OFFSET),
        ("features", stream::FEATURES_OFFSET),
        ("image", stream::IMAGE_OFFSET),
        ("snapshot", stream::SNAPSHOT_OFFSET),
        ("from", stream::FROM_OFFSET),
        ("number", stream::NUMBER_OFFSET),
        ("from-number", stream::FROM_NUMBER_OFFSET),
        ("time", stream::TIME_OFFSET),
        ("virtual-size", stream::SIZE_OFFSET),
        ("cluster-size", stream::CLUSTER_SIZE_OFFSET),
        ("start", stream::START_OFFSET),
        ("name", stream::NAME_OFFSET),
        ("from-name", stream::FROM_NAME_OFFSET),
        ("", stream::FROM_NAME_OFFSET + 132),
        ("checksum", stream::CHECKSUM_OFFSET),
    ];
    let found = layout("2. Header");
    let names: Vec<_> = found
        .iter()
        .map(|(at, _, name)| (name.as_str(), *at))
        .collect();
    assert_eq!(names, constants);
    for (heading, bytes) in [("2. Header", HEADER_BYTES), ("3. Records", RECORD_BYTES)] {
        let mut end = 0;
        for (at, size, name) in layout(heading) {
            assert_eq!(at, end, "{name}");
            end = at + size;
        }
        assert_eq!(end, bytes, "{heading}");
    }
    assert!(DOCUMENT.contains(&format!("at most {MAX_DATA_BYTES}.")));
    assert!(DOCUMENT.contains(&format!("multiples of {UNIT_BYTES},")));
    assert!(DOCUMENT.contains(&format!("{DATA} data, {ZEROS} zeros, {END} end")));
}

#[test]
fn a_link_to_an_image_and_a_relative_path_are_as_good_as_its_own() {
    let place = Place::new();
    two_snapshots(&place);
    let link = place.path("elsewhere");
    std::fs::create_dir(&link).unwrap();
    let link = link.join("link");
    std::os::unix::fs::symlink(place.path("copy"), &link).unwrap();
    let stream = place.send("vm", "two", Some("one"));
    let mut input = stream.as_slice();
    ops::receive(
        Path::new(&link),
        &mut input,
        Some("renamed"),
        &[],
        &mut |_, _| (),
    )
    .unwrap();
    assert!(place.show("vm", "two") == place.show("copy", "renamed"));
}
