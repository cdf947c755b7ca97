// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every message, byte by byte.
#![allow(clippy::unwrap_used)]
#![cfg(target_endian = "little")] // the golden bytes below; the wire has the byte order of the host

use pcow_protocol::Violation;
use pcow_protocol::message::{
    BackendReply, BackendRequest, FrontendReply, FrontendRequest, Incoming, Map, RegionRange,
    Status,
};
use pcow_protocol::wire::{
    self, BackendCode, Code, FaultFd, FrontendCode, Header, Held, Quiesce, Quiesced, Region,
    Register, Resume,
};
use vm_memory::ByteValued;

/// Bytes from hexadecimal digits; blanks separate fields.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    let pairs = digits
        .chunks(2)
        .map(|pair| std::str::from_utf8(pair).unwrap());
    pairs
        .map(|pair| u8::from_str_radix(pair, 16).unwrap())
        .collect()
}

/// Decodes a whole message as a receiver does.
fn decode<M: Incoming>(bytes: &[u8]) -> Result<M, Violation> {
    let (header, payload) = bytes.split_at(size_of::<Header>());
    let mut parsed = Header::default();
    parsed.as_mut_slice().copy_from_slice(header);
    let (code, size) = M::check_header(&parsed)?;
    assert_eq!(payload.len(), size);
    M::decode(code, payload)
}

fn ranged(offset: u64, len: u64) -> RegionRange {
    RegionRange { offset, len }
}

/// A request, whether it asks for an answer, and its bytes.
type Case<R> = (R, bool, &'static str);

/// What came with re-attachment and snapshots.
fn later_frontend_requests() -> [Case<FrontendRequest>; 2] {
    let held = Held {
        image: *b"0123456789abcdef",
        layer: *b"ABCDEFGHIJKLMNOP",
        ..Held::default()
    };
    let quiesced = Quiesced {
        id: 0x0102,
        error: libc::ETIMEDOUT.unsigned_abs(),
        reserved: 0,
    };
    [
        (
            FrontendRequest::HandBack(held),
            true,
            "ea030000 09000000 28000000
             30313233343536373839616263646566 4142434445464748494a4b4c4d4e4f50 00000000 00000000",
        ),
        (
            FrontendRequest::Quiesced(quiesced),
            false,
            "ec030000 01000000 10000000 0201000000000000 6e000000 00000000",
        ),
    ]
}

#[test]
fn frontend_requests_have_these_bytes() {
    let fault_fd = FaultFd {
        base: 0x7f00_0020_0000,
        size: 0x40_0000,
        mapping_limit: 32000,
        reserved: 0,
    };
    let cases = [
        (
            FrontendRequest::GetFeatures,
            false,
            "01000000 01000000 00000000",
        ),
        (
            FrontendRequest::SetFeatures(1 << 30),
            false,
            "02000000 01000000 08000000 0000004000000000",
        ),
        (
            FrontendRequest::GetProtocolFeatures,
            false,
            "0f000000 01000000 00000000",
        ),
        (
            FrontendRequest::SetProtocolFeatures(wire::NEEDED_FEATURES),
            true,
            "10000000 09000000 08000000 2804000000000001",
        ),
        (
            FrontendRequest::SetBackendReqFd,
            false,
            "15000000 01000000 00000000",
        ),
        (
            FrontendRequest::GetRegion,
            false,
            "e8030000 01000000 00000000",
        ),
        (
            FrontendRequest::SetFaultFd(fault_fd),
            true,
            "e9030000 09000000 18000000 00002000007f0000 0000400000000000 007d0000 00000000",
        ),
        (FrontendRequest::Flush, true, "eb030000 09000000 00000000"),
    ];
    let cases = cases.into_iter().chain(later_frontend_requests());
    assert_eq!(cases.clone().count(), FrontendCode::ALL.len());
    for (request, reply_wanted, bytes) in cases {
        assert_eq!(
            request.encode(reply_wanted).as_bytes(),
            hex(bytes),
            "{request:?}"
        );
        assert_eq!(decode::<FrontendRequest>(&hex(bytes)).unwrap(), request);
    }
}

#[test]
fn frontend_replies_have_these_bytes() {
    let region = Region {
        size: 0x20_0000_0000,
        alignment: 0x20_0000,
        flags: wire::REGION_FLAGS,
        reserved: 0,
        image: *b"0123456789abcdef",
        layer: *b"ABCDEFGHIJKLMNOP",
    };
    let cases = [
        (
            FrontendReply::Features(FrontendCode::GetFeatures, 1 << 30),
            "01000000 05000000 08000000 0000004000000000",
        ),
        (
            FrontendReply::Features(FrontendCode::GetProtocolFeatures, wire::NEEDED_FEATURES),
            "0f000000 05000000 08000000 2804000000000001",
        ),
        (
            FrontendReply::Region(region),
            "e8030000 05000000 38000000 0000000020000000 0000200000000000 0f000000 00000000
             30313233343536373839616263646566 4142434445464748494a4b4c4d4e4f50",
        ),
        (
            FrontendReply::Status(FrontendCode::SetFaultFd, Status::from_errno(libc::EBUSY)),
            "e9030000 05000000 08000000 1000000000000000",
        ),
        (
            FrontendReply::Status(FrontendCode::Flush, Status::OK),
            "eb030000 05000000 08000000 0000000000000000",
        ),
    ];
    for (reply, bytes) in cases {
        assert_eq!(reply.encode().as_bytes(), hex(bytes), "{reply:?}");
        assert_eq!(decode::<FrontendReply>(&hex(bytes)).unwrap(), reply);
    }
}

/// What came with re-attachment and snapshots.
fn later_backend_requests() -> [Case<BackendRequest>; 5] {
    let quiesce = Quiesce {
        id: 7,
        deadline_ms: 500,
        reserved: 0,
    };
    let resume = Resume {
        id: 7,
        layer: *b"ABCDEFGHIJKLMNOP",
    };
    [
        (
            BackendRequest::Reset,
            true,
            "ef030000 09000000 08000000 0000000000000000",
        ),
        (
            BackendRequest::Quiesce(quiesce),
            true,
            "f0030000 09000000 10000000 0700000000000000 f4010000 00000000",
        ),
        (
            BackendRequest::Resume(resume),
            false,
            "f1030000 01000000 18000000 0700000000000000 4142434445464748494a4b4c4d4e4f50",
        ),
        (
            BackendRequest::Cancel(7),
            false,
            "f2030000 01000000 08000000 0700000000000000",
        ),
        (
            BackendRequest::Stop(wire::STOP_NO_SPACE),
            false,
            "f3030000 01000000 08000000 01000000 00000000",
        ),
    ]
}

#[test]
fn backend_requests_have_these_bytes() {
    let register = Register {
        slot: 2,
        flags: wire::REGISTER_FLAGS,
        length: 0x10_0000,
    };
    let map = Map {
        slot: 2,
        file_offset: 0x3000,
        range: ranged(0x5000, 0x1000),
        writable: true,
    };
    let cases = [
        (
            BackendRequest::RegisterFd(register),
            true,
            "e8030000 09000000 10000000 02000000 03000000 0000100000000000",
        ),
        (
            BackendRequest::ForgetFd(2),
            true,
            "e9030000 09000000 10000000 02000000 00000000 0000000000000000",
        ),
        (
            BackendRequest::Map(map),
            false,
            "ea030000 01000000 28000000 02 00000000000000
             0030000000000000 0050000000000000 0010000000000000 0100000000000000",
        ),
        (
            BackendRequest::Unmap(ranged(0x5000, 0x2000)),
            true,
            "eb030000 09000000 28000000 00 00000000000000
             0000000000000000 0050000000000000 0020000000000000 0000000000000000",
        ),
        (
            BackendRequest::Evict(ranged(0, 0x10000)),
            false,
            "ec030000 01000000 28000000 00 00000000000000
             0000000000000000 0000000000000000 0000010000000000 0000000000000000",
        ),
        (
            BackendRequest::Bounce(ranged(0x5000, 0x1000)),
            true,
            "ed030000 09000000 28000000 00 00000000000000
             0000000000000000 0050000000000000 0010000000000000 0000000000000000",
        ),
        (
            BackendRequest::BounceEnd(ranged(0x5000, 0x1000)),
            false,
            "ee030000 01000000 28000000 00 00000000000000
             0000000000000000 0050000000000000 0010000000000000 0000000000000000",
        ),
    ];
    let cases = cases.into_iter().chain(later_backend_requests());
    assert_eq!(cases.clone().count(), BackendCode::ALL.len());
    for (request, reply_wanted, bytes) in cases {
        assert_eq!(
            request.encode(reply_wanted).as_bytes(),
            hex(bytes),
            "{request:?}"
        );
        assert_eq!(decode::<BackendRequest>(&hex(bytes)).unwrap(), request);
    }
}

#[test]
fn backend_replies_have_these_bytes() {
    let reply = BackendReply {
        code: BackendCode::Map,
        status: Status::from_errno(libc::ENOMEM),
    };
    let bytes = hex("ea030000 05000000 08000000 0c00000000000000");
    assert_eq!(reply.encode().as_bytes(), bytes);
    assert_eq!(decode::<BackendReply>(&bytes).unwrap(), reply);
}

#[test]
fn a_status_that_is_no_errno_is_an_input_output_error() {
    let bytes = hex("ea030000 05000000 08000000 ffffffffffffffff");
    let reply = decode::<BackendReply>(&bytes).unwrap();
    assert_eq!(reply.status.errno(), Some(libc::EIO));
    assert_eq!(Status::from_errno(0).errno(), Some(libc::EIO));
    assert_eq!(Status::from_errno(-5).errno(), Some(libc::EIO));
}

#[test]
fn reserved_fields_that_are_not_zero_are_refused() {
    let set = |bytes: &str, index: usize| {
        let mut bytes = hex(bytes);
        bytes[index] |= 0x10;
        bytes
    };
    let zeros = |count: usize| "00".repeat(count);
    let fault_fd = format!("e9030000 09000000 18000000 {}", zeros(24));
    let refused = decode::<FrontendRequest>(&set(&fault_fd, 12 + 20));
    assert_eq!(refused, Err(Violation::Reserved("fault_fd.reserved")));

    let held = format!("ea030000 09000000 28000000 {}", zeros(40));
    for (index, field) in [(32, "held.flags"), (36, "held.reserved")] {
        let refused = decode::<FrontendRequest>(&set(&held, 12 + index));
        assert_eq!(refused, Err(Violation::Reserved(field)));
    }
    let quiesced = format!("ec030000 01000000 10000000 {}", zeros(16));
    let refused = decode::<FrontendRequest>(&set(&quiesced, 12 + 12));
    assert_eq!(refused, Err(Violation::Reserved("quiesced.reserved")));

    let region = format!("e8030000 05000000 38000000 {}", zeros(56));
    for (index, field) in [(16, "region.flags"), (20, "region.reserved")] {
        let refused = decode::<FrontendReply>(&set(&region, 12 + index));
        assert_eq!(refused, Err(Violation::Reserved(field)));
    }
    let requests = [
        ("e8", 16, 4, "register.flags"),
        ("e9", 16, 4, "register.flags"),
        ("e9", 16, 8, "register.length"),
        ("ea", 40, 7, "mmap.padding"),
        ("ea", 40, 32, "mmap.flags"),
        ("eb", 40, 0, "mmap.shmid"),
        ("eb", 40, 1, "mmap.padding"),
        ("eb", 40, 8, "mmap.fd_offset"),
        ("ec", 40, 39, "mmap.flags"),
        ("ed", 40, 0, "mmap.shmid"),
        ("ee", 40, 8, "mmap.fd_offset"),
        ("ef", 8, 0, "reset.reserved"),
        ("f0", 16, 12, "quiesce.reserved"),
        ("f3", 8, 4, "stop.reserved"),
    ];
    for (number, size, index, field) in requests {
        let bytes = format!("{number}030000 01000000 {size:02x}000000 {}", zeros(size));
        let refused = decode::<BackendRequest>(&set(&bytes, 12 + index));
        assert_eq!(refused, Err(Violation::Reserved(field)), "{number}");
    }
}

#[test]
fn headers_that_are_wrong_are_told_apart() {
    let check = |request, flags, size| {
        FrontendRequest::check_header(&Header {
            request,
            flags,
            size,
        })
        .unwrap_err()
    };
    assert_eq!(check(1, 0, 0), Violation::Version(0));
    assert_eq!(check(1, 2, 0), Violation::Version(2));
    assert_eq!(check(1, 0x11, 0), Violation::Flags(0x11));
    assert_eq!(check(3, 1, 0), Violation::UnknownRequest(3));
    assert_eq!(check(1005, 9, 0), Violation::UnknownRequest(1005));
    assert_eq!(check(1, 5, 8), Violation::UnexpectedReply(1));
    let size = Violation::Size {
        name: "GET_FEATURES",
        size: 4096,
        expected: 0,
    };
    assert_eq!(check(1, 1, 4096), size);
    let size = Violation::Size {
        name: "SET_FEATURES",
        size: u32::MAX,
        expected: 8,
    };
    assert_eq!(check(2, 1, u32::MAX), size);

    let check = |flags, size| {
        BackendReply::check_header(&Header {
            request: 1002,
            flags,
            size,
        })
        .unwrap_err()
    };
    assert_eq!(check(1, 8), Violation::NotAReply(1002));
    assert_eq!(check(0xd, 8), Violation::Flags(0xd));
    assert_eq!(
        check(5, 40),
        Violation::Size {
            name: "MAP",
            size: 40,
            expected: 8
        }
    );
}
