// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the frontend lets a backend do to its region.

use crate::{OPTIONAL, PAGE, SIZE};
use pcow_protocol::Violation;
use pcow_protocol::message::{BackendRequest, Map, RegionRange, Status};
use pcow_protocol::session::{MappingAction, Mappings, Refusal, Rules};
use pcow_protocol::wire::{
    BackendCode, Code, FEATURE_BOUNCE, FEATURE_QUIESCE, FEATURE_RESET, FEATURE_STOP, Quiesce,
    REGISTER_WRITABLE, Register, Resume,
};

fn writable(slot: u32) -> Register {
    Register {
        slot,
        flags: REGISTER_WRITABLE,
        length: SIZE,
    }
}

const RULES: Rules = Rules {
    region_size: SIZE,
    read_only: false,
    page_size: PAGE,
    features: OPTIONAL,
};

/// A file in slot 3 for loads and stores, one page in slot 4 for loads.
fn mappings() -> Mappings<&'static str> {
    let mut mappings = Mappings::new(RULES);
    mappings.insert(&writable(3), "stores");
    mappings.insert(
        &Register {
            slot: 4,
            flags: 0,
            length: PAGE,
        },
        "loads",
    );
    mappings
}

fn map(slot: u8, file_offset: u64, offset: u64, len: u64, writable: bool) -> BackendRequest {
    let range = RegionRange { offset, len };
    BackendRequest::Map(Map {
        slot,
        file_offset,
        range,
        writable,
    })
}

#[test]
fn requests_inside_the_bounds_are_carried_out() {
    let range = |offset, len| RegionRange { offset, len };
    let mut all = mappings();
    let whole = all.request(&map(3, 0, 0, SIZE, true), false);
    let expected = MappingAction::Map {
        file: &"stores",
        sync: false,
        file_offset: 0,
        range: range(0, SIZE),
        writable: true,
    };
    assert_eq!(whole, Ok(expected));
    let loads = all.request(&map(4, 0, SIZE - PAGE, PAGE, false), false);
    assert!(matches!(
        loads,
        Ok(MappingAction::Map {
            file: &"loads",
            writable: false,
            ..
        })
    ));
    let unmap = BackendRequest::Unmap(range(PAGE, PAGE));
    assert_eq!(
        all.request(&unmap, false),
        Ok(MappingAction::Unmap(range(PAGE, PAGE)))
    );
    let evict = BackendRequest::Evict(range(0, SIZE));
    assert_eq!(
        all.request(&evict, false),
        Ok(MappingAction::Evict(range(0, SIZE)))
    );
    let page = range(SIZE - PAGE, PAGE);
    assert_eq!(
        all.request(&BackendRequest::Bounce(page), true),
        Ok(MappingAction::Bounce(page))
    );
    assert_eq!(
        all.request(&BackendRequest::BounceEnd(page), false),
        Ok(MappingAction::BounceEnd(page))
    );
    let register = BackendRequest::RegisterFd(writable(255));
    assert_eq!(
        all.request(&register, true),
        Ok(MappingAction::Register(writable(255)))
    );
    let forget = BackendRequest::ForgetFd(4);
    assert_eq!(
        all.request(&forget, false),
        Ok(MappingAction::Forgotten("loads"))
    );
}

#[test]
fn requests_out_of_bounds_are_violations() {
    let range = |offset, len| RegionRange { offset, len };
    let last_page = u64::MAX - PAGE + 1;
    let bad = [
        (map(3, 0, SIZE, PAGE, true), "mmap range"),
        (map(3, 0, last_page, 2 * PAGE, true), "mmap range"),
        (map(3, 0, 0, 0, true), "mmap range"),
        (map(3, 0, 1, PAGE, true), "mmap range"),
        (map(3, 0, 0, PAGE - 1, true), "mmap range"),
        (map(3, SIZE, 0, PAGE, true), "mmap.fd_offset"),
        (map(3, last_page, 0, PAGE, true), "mmap.fd_offset"),
        (map(3, 1, 0, PAGE, true), "mmap.fd_offset"),
        (map(4, 0, 0, 2 * PAGE, false), "mmap.fd_offset"),
        (map(4, 0, 0, PAGE, true), "mmap.flags"),
        (map(0, 0, 0, PAGE, false), "mmap.shmid"),
        (
            BackendRequest::Unmap(range(SIZE - PAGE, 2 * PAGE)),
            "mmap range",
        ),
        (BackendRequest::Unmap(range(0, 0)), "mmap range"),
        (BackendRequest::Evict(range(0, SIZE + PAGE)), "mmap range"),
        (BackendRequest::Bounce(range(0, 2 * PAGE)), "mmap.len"),
        (BackendRequest::Bounce(range(SIZE, PAGE)), "mmap range"),
        (BackendRequest::BounceEnd(range(1, PAGE)), "mmap range"),
        (BackendRequest::RegisterFd(writable(256)), "register.slot"),
        (
            BackendRequest::RegisterFd(Register {
                length: 0,
                ..writable(5)
            }),
            "register.length",
        ),
        (
            BackendRequest::RegisterFd(Register {
                length: 1,
                ..writable(5)
            }),
            "register.length",
        ),
        (BackendRequest::ForgetFd(256), "register.slot"),
    ];
    for (request, field) in bad {
        let expected = Refusal::Violation(Violation::OutOfRange(field));
        assert_eq!(
            mappings().request(&request, true),
            Err(expected),
            "{request:?}"
        );
    }
}

#[test]
fn slots_are_refused_by_status_and_not_by_violation() {
    let mut all = mappings();
    let taken = all.request(&BackendRequest::RegisterFd(writable(3)), true);
    assert_eq!(
        taken,
        Err(Refusal::Status(Status::from_errno(libc::EEXIST)))
    );
    let empty = all.request(&BackendRequest::ForgetFd(5), true);
    assert_eq!(
        empty,
        Err(Refusal::Status(Status::from_errno(libc::ENOENT)))
    );
}

#[test]
fn a_read_only_region_has_no_writable_slot() {
    let mut all = Mappings::<()>::new(Rules {
        read_only: true,
        ..RULES
    });
    let refused = all.request(&BackendRequest::RegisterFd(writable(0)), true);
    let violation = Violation::OutOfRange("register.flags");
    assert_eq!(refused, Err(Refusal::Violation(violation)));
}

#[test]
fn a_registration_must_ask_for_its_status() {
    for code in BackendCode::ALL {
        let asks = [
            BackendCode::RegisterFd,
            BackendCode::Bounce,
            BackendCode::Reset,
            BackendCode::Quiesce,
        ];
        assert_eq!(code.must_ask(), asks.contains(code));
    }
    let refused = mappings();
    let mut refused = refused;
    let result = refused.request(&BackendRequest::RegisterFd(writable(9)), false);
    let violation = Violation::ReplyNotWanted("REGISTER_FD");
    assert_eq!(result, Err(Refusal::Violation(violation)));
}

fn quiesce(id: u64) -> BackendRequest {
    BackendRequest::Quiesce(Quiesce {
        id,
        deadline_ms: 100,
        reserved: 0,
    })
}

#[test]
fn requests_of_features_that_were_not_agreed_on_are_unknown_to_the_frontend() {
    let page = RegionRange {
        offset: 0,
        len: PAGE,
    };
    let requests = [
        (BackendRequest::Bounce(page), FEATURE_BOUNCE),
        (BackendRequest::BounceEnd(page), FEATURE_BOUNCE),
        (BackendRequest::Reset, FEATURE_RESET),
        (quiesce(1), FEATURE_QUIESCE),
        (BackendRequest::Resume(Resume::default()), FEATURE_QUIESCE),
        (BackendRequest::Cancel(1), FEATURE_QUIESCE),
        (BackendRequest::Stop(1), FEATURE_STOP),
    ];
    for (request, feature) in requests {
        let mut with = Mappings::<()>::new(RULES);
        assert!(with.request(&request, true).is_ok(), "{request:?}");
        let mut without = Mappings::<()>::new(Rules {
            features: OPTIONAL & !feature,
            ..RULES
        });
        let result = without.request(&request, true);
        let violation = Violation::UnknownRequest(request.code().number());
        assert_eq!(result, Err(Refusal::Violation(violation)), "{request:?}");
    }
}

#[test]
fn bounces_of_a_read_only_region_are_unknown_requests() {
    let page = RegionRange {
        offset: 0,
        len: PAGE,
    };
    for request in [
        BackendRequest::Bounce(page),
        BackendRequest::BounceEnd(page),
    ] {
        let mut mappings = Mappings::<()>::new(Rules {
            read_only: true,
            ..RULES
        });
        let result = mappings.request(&request, true);
        let violation = Violation::UnknownRequest(request.code().number());
        assert_eq!(result, Err(Refusal::Violation(violation)));
    }
}

#[test]
fn a_reset_that_was_carried_out_leaves_every_slot_free() {
    let mut all = mappings();
    assert_eq!(
        all.request(&BackendRequest::Reset, true),
        Ok(MappingAction::Reset)
    );
    // Until it was carried out the slots are there: a reset that fails has changed nothing.
    assert!(all.request(&map(3, 0, 0, PAGE, true), false).is_ok());
    all.forget_all();
    let register = BackendRequest::RegisterFd(writable(3));
    assert_eq!(
        all.request(&register, true),
        Ok(MappingAction::Register(writable(3)))
    );
    let refused = all.request(&map(4, 0, 0, PAGE, false), false);
    let violation = Violation::OutOfRange("mmap.shmid");
    assert_eq!(refused, Err(Refusal::Violation(violation)));
}

#[test]
fn ids_of_quiesces_grow() {
    let mut all = mappings();
    let violation = Refusal::Violation(Violation::OutOfRange("quiesce.id"));
    assert_eq!(all.request(&quiesce(0), true), Err(violation));
    assert!(all.request(&quiesce(5), true).is_ok());
    for old in [4, 5] {
        assert_eq!(all.request(&quiesce(old), true), Err(violation));
    }
    assert!(all.request(&quiesce(u64::MAX), true).is_ok());
    assert_eq!(
        all.request(&BackendRequest::Cancel(3), false),
        Ok(MappingAction::Cancel(3)),
        "an old id is the executor's to ignore"
    );
}
