// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Makes the first inputs of all targets, `fuzz/corpus/*/`, out of real images, streams and messages:
//! `cargo run --package pcow-fuzz-targets --example seeds`. Only for a format that has changed.

use std::fs;
use std::path::{Path, PathBuf};

use pcow_format::ops::{Base, NewImage, create};
use pcow_format::stream::Sending;
use pcow_format::{ClusterSize, Image, Stored, map_name};
use pcow_protocol::message::{
    BackendRequest, Frame, FrontendReply, FrontendRequest, Map, RegionRange, Status,
};
use pcow_protocol::wire::{
    FEATURE_PROTOCOL_FEATURES, FaultFd, FrontendCode, KNOWN_FEATURES, Quiesce, Quiesced, Region,
    Register, Resume,
};

const REGION_BYTES: u64 = 64 << 20;

fn put(target: &str, name: &str, bytes: &[u8]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    fs::create_dir_all(&dir).expect("a directory");
    fs::write(dir.join(name), bytes).expect("a seed is written");
}

/// The map of the active layer, without the zeros at its end.
fn map(path: &Path) -> Vec<u8> {
    let active = Stored::open(path, &[]).expect("an image").root().active;
    let mut map = fs::read(path.join(map_name(active))).expect("its map");
    map.truncate(4096 + 16);
    map
}

fn directory(name: &str, path: &Path) {
    let root = fs::read(path.join("image.json")).expect("its root");
    let length = u16::try_from(root.len()).expect("a small root");
    let words = map(path).split_off(4096);
    let seed = [&[0], length.to_le_bytes().as_slice(), &root, &words].concat();
    put("image_directory", name, &seed);
}

fn images(dir: &Path) -> PathBuf {
    let vm = pcow_fuzz_targets::support::image(dir);
    directory("snapshots", &vm);
    put("map_file", "data", &[&[3], map(&vm).as_slice()].concat());
    let raw = dir.join("raw");
    fs::write(&raw, [7; 5000]).expect("a raw file");
    let clone = |name: &str, base| {
        let new = NewImage {
            size: None,
            cluster: ClusterSize::new(4096).expect("a cluster size"),
            allocation_unit: None,
            base: Some(base),
        };
        let path = dir.join(name);
        create(&path, &new, &[]).expect("a clone");
        directory(name, &path);
    };
    clone("raw-base", Base::Raw { path: raw });
    clone(
        "reference",
        Base::Image {
            path: vm.clone(),
            snapshot: Some("one".into()),
            reference: true,
        },
    );
    vm
}

fn streams(vm: &Path) {
    let mut image = Image::open(vm, &[]).expect("an image");
    image.rollback("one", true).expect("back");
    image.write(2 << 20, &[5; 100]).expect("a write");
    image.write_zeros(0..16_384).expect("zeros");
    image.snapshot(Some("two")).expect("a snapshot");
    drop(image);
    let stored = Stored::open(vm, &[]).expect("an image");
    for (flags, name, snapshot, from) in [
        (0, "full", "one", None),
        (2, "continued", "two", Some("one")),
    ] {
        let mut stream = vec![flags];
        let sending = Sending::of(&stored, snapshot, from).expect("a snapshot");
        sending
            .write(&mut stream, &mut |_| ())
            .expect("into memory");
        put("stream", name, &stream);
    }
}

fn control() {
    let requests = include_str!("../../../docs/control.md").lines();
    let requests = requests.filter_map(|l| l.strip_prefix("-> "));
    put(
        "control",
        "requests",
        format!("\0{}", requests.collect::<String>()).as_bytes(),
    );
    let answers = r#"{"QMP": {"version": {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "x"}, "capabilities": []}, "pcow": {"image-device": 1, "image-inode": 2, "process": 3}}
{"return": {}}
{"event": "SNAPSHOT_CREATED", "data": {"number": 1}, "timestamp": {"seconds": 1, "microseconds": 2}}
{"error": {"class": "GenericError", "desc": "no"}}
"#;
    put("control", "answers", format!("\x01{answers}").as_bytes());
}

/// Each frame as the target takes it: how many descriptors, how many bytes, the bytes.
fn frames(side: u8, name: &str, frames: &[(u8, Frame)]) {
    let mut seed = vec![side];
    for (fds, frame) in frames {
        let bytes = frame.as_bytes();
        seed.extend([*fds, u8::try_from(bytes.len()).expect("a short frame")]);
        seed.extend(bytes);
    }
    put("frames", name, &seed);
}

fn frontend_requests() {
    use FrontendRequest as F;
    let fault_fd = FaultFd {
        base: 1 << 32,
        size: REGION_BYTES,
        mapping_limit: 30_000,
        reserved: 0,
    };
    let quiesced = Quiesced {
        id: 1,
        ..Quiesced::default()
    };
    let requests = [
        (0, F::GetFeatures, false),
        (0, F::SetFeatures(FEATURE_PROTOCOL_FEATURES), false),
        (0, F::GetProtocolFeatures, false),
        (0, F::SetProtocolFeatures(KNOWN_FEATURES), false),
        (1, F::SetBackendReqFd, true),
        (0, F::GetRegion, false),
        (1, F::SetFaultFd(fault_fd), true),
        (0, F::Flush, true),
        (0, F::Quiesced(quiesced), false),
    ];
    frames(
        0,
        "frontend",
        &requests.map(|(fds, r, asks)| (fds, r.encode(asks))),
    );
}

fn backend_requests() {
    use BackendRequest as B;
    let range = RegionRange {
        offset: 0,
        len: 65536,
    };
    let register = Register {
        slot: 0,
        flags: 1,
        length: REGION_BYTES,
    };
    let piece = Map {
        slot: 0,
        file_offset: 0,
        range,
        writable: true,
    };
    let quiesce = Quiesce {
        id: 1,
        deadline_ms: 1000,
        ..Quiesce::default()
    };
    let requests = [
        (1, B::RegisterFd(register)),
        (0, B::Map(piece)),
        (0, B::Evict(range)),
        (0, B::Unmap(range)),
        (0, B::Quiesce(quiesce)),
        (0, B::Reset),
        (
            0,
            B::Resume(Resume {
                id: 1,
                layer: [3; 16],
            }),
        ),
        (0, B::Stop(1)),
    ];
    frames(
        1,
        "backend",
        &requests.map(|(fds, r)| (fds, r.encode(true))),
    );
}

fn replies() {
    use {FrontendCode as C, FrontendReply as A};
    let region = Region {
        size: REGION_BYTES,
        alignment: 2 << 20,
        ..Region::default()
    };
    let replies = [
        A::Features(C::GetFeatures, FEATURE_PROTOCOL_FEATURES),
        A::Features(C::GetProtocolFeatures, KNOWN_FEATURES),
        A::Region(region),
        A::Status(C::SetFaultFd, Status::OK),
        A::Status(C::Flush, Status::OK),
    ];
    frames(2, "replies", &replies.map(|r| (0, r.encode())));
}

fn main() {
    let dir = pcow_fuzz_targets::support::scratch();
    streams(&images(dir.path()));
    control();
    frontend_requests();
    backend_requests();
    replies();
    let program: Vec<u8> = (0..40_u8)
        .flat_map(|o| [o, 0, 0, o.wrapping_mul(7), 9, 1, 2, 0, 3])
        .collect();
    for (number, piece) in (1..).zip(program.chunks(90)) {
        put("operations", &format!("each-{number}"), piece);
    }
}
