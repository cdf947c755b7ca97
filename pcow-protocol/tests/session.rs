// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The session machines of both ends: every state with every message.
#![allow(clippy::unwrap_used)]

use pcow_protocol::Violation;
use pcow_protocol::message::{
    BackendRequest, FrontendReply, FrontendRequest, Map, RegionRange, Status,
};
use pcow_protocol::session::{
    BackendAction, BackendSession, FrontendSession, FrontendStep, MappingAction, Mappings, Refusal,
    Rules,
};
use pcow_protocol::wire::{
    BackendCode, Code, FEATURE_BOUNCE, FEATURE_PCOW, FEATURE_PROTOCOL_FEATURES, FEATURE_QUIESCE,
    FEATURE_RESET, FEATURE_STOP, FaultFd, FrontendCode, Held, KNOWN_FEATURES, NEEDED_FEATURES,
    Quiesce, Quiesced, REGION_ALIGNMENT, REGISTER_WRITABLE, Region, Register, Resume,
};

const SIZE: u64 = 2 * REGION_ALIGNMENT;
const PAGE: u64 = 4096;
const EBUSY: i32 = libc::EBUSY;
const OPTIONAL: u64 = KNOWN_FEATURES & !NEEDED_FEATURES;

const HELD: Held = Held {
    image: [1; 16],
    layer: [2; 16],
    flags: 0,
    reserved: 0,
};

const QUIESCED: Quiesced = Quiesced {
    id: 1,
    error: 0,
    reserved: 0,
};

fn fault_fd() -> FaultFd {
    FaultFd {
        base: 4 * REGION_ALIGNMENT,
        size: SIZE,
        mapping_limit: 16,
        reserved: 0,
    }
}

/// A valid request for every number.
fn request(code: FrontendCode) -> FrontendRequest {
    match code {
        FrontendCode::GetFeatures => FrontendRequest::GetFeatures,
        FrontendCode::SetFeatures => FrontendRequest::SetFeatures(FEATURE_PROTOCOL_FEATURES),
        FrontendCode::GetProtocolFeatures => FrontendRequest::GetProtocolFeatures,
        FrontendCode::SetProtocolFeatures => FrontendRequest::SetProtocolFeatures(KNOWN_FEATURES),
        FrontendCode::SetBackendReqFd => FrontendRequest::SetBackendReqFd,
        FrontendCode::GetRegion => FrontendRequest::GetRegion,
        FrontendCode::SetFaultFd => FrontendRequest::SetFaultFd(fault_fd()),
        FrontendCode::HandBack => FrontendRequest::HandBack(HELD),
        FrontendCode::Flush => FrontendRequest::Flush,
        FrontendCode::Quiesced => FrontendRequest::Quiesced(QUIESCED),
    }
}

/// The requests that lead to each state of section 4, and to an unanswered SET_FAULT_FD.
const STATES: [(&str, &[FrontendCode]); 6] = {
    use FrontendCode as C;
    [
        ("new", &[]),
        ("features", &[C::SetFeatures]),
        ("negotiated", &[C::SetFeatures, C::SetProtocolFeatures]),
        (
            "channel",
            &[C::SetFeatures, C::SetProtocolFeatures, C::SetBackendReqFd],
        ),
        (
            "channel, with SET_FAULT_FD unanswered",
            &[
                C::SetFeatures,
                C::SetProtocolFeatures,
                C::SetBackendReqFd,
                C::SetFaultFd,
            ],
        ),
        (
            "serving",
            &[
                C::SetFeatures,
                C::SetProtocolFeatures,
                C::SetBackendReqFd,
                C::SetFaultFd,
            ],
        ),
    ]
};

fn backend_in(state: &str) -> BackendSession {
    let mut session = BackendSession::new(SIZE);
    let path = STATES.iter().find(|(name, _)| *name == state).unwrap().1;
    for code in path {
        session.request(&request(*code), true).unwrap();
    }
    if state == "serving" {
        session.attached(Status::OK);
    }
    session
}

/// What the backend does in each state with each request; nothing where section 4 does not allow it.
fn expected(state: &str, code: FrontendCode) -> Option<BackendAction> {
    use FrontendCode as C;
    let features = |bits| Some(BackendAction::Reply(FrontendReply::Features(code, bits)));
    let done = FrontendReply::Status(code, Status::OK);
    match (state, code) {
        ("new", C::GetFeatures) => features(1 << 30),
        ("features", C::GetProtocolFeatures) => features(1 << 3 | 1 << 5 | 1 << 10 | 0x1f << 56),
        ("new", C::SetFeatures) | ("features", C::SetProtocolFeatures) => {
            Some(BackendAction::Reply(done))
        }
        ("negotiated" | "channel" | "serving", C::GetRegion) => Some(BackendAction::ReplyRegion),
        ("negotiated", C::SetBackendReqFd) => Some(BackendAction::TakeChannel(Some(done))),
        ("channel", C::SetFaultFd) => Some(BackendAction::Attach(fault_fd())),
        ("negotiated" | "channel", C::HandBack) => Some(BackendAction::TakeLock(HELD)),
        ("serving", C::Flush) => Some(BackendAction::Flush),
        ("serving", C::Quiesced) => Some(BackendAction::Quiesced(QUIESCED, Some(done))),
        _ => None,
    }
}

#[test]
fn every_state_of_the_backend_meets_every_request() {
    for (state, _) in STATES {
        for code in FrontendCode::ALL {
            let result = backend_in(state).request(&request(*code), true);
            let violation = Violation::State {
                name: code.name(),
                state,
            };
            let expected = expected(state, *code).ok_or(violation);
            assert_eq!(result, expected, "{state}, {code:?}");
        }
    }
}

#[test]
fn requests_that_want_no_answer_get_none() {
    let mut session = BackendSession::new(SIZE);
    for code in [FrontendCode::SetFeatures, FrontendCode::SetProtocolFeatures] {
        assert_eq!(
            session.request(&request(code), false),
            Ok(BackendAction::Nothing)
        );
    }
    let taken = session.request(&FrontendRequest::SetBackendReqFd, false);
    assert_eq!(taken, Ok(BackendAction::TakeChannel(None)));
}

#[test]
fn what_must_be_answered_must_ask_for_it() {
    for (state, code) in [
        ("channel", FrontendCode::SetFaultFd),
        ("negotiated", FrontendCode::HandBack),
        ("serving", FrontendCode::Flush),
    ] {
        let result = backend_in(state).request(&request(code), false);
        assert_eq!(result, Err(Violation::ReplyNotWanted(code.name())));
    }
}

#[test]
fn a_refused_fault_fd_may_be_offered_again() {
    let mut session = backend_in("channel, with SET_FAULT_FD unanswered");
    session.attached(Status::from_errno(EBUSY));
    let again = session.request(&request(FrontendCode::SetFaultFd), true);
    assert_eq!(again, Ok(BackendAction::Attach(fault_fd())));
}

#[test]
fn features_that_were_not_offered_or_miss_a_needed_one_are_refused() {
    for bits in [0, 1 << 30 | 1, u64::MAX] {
        let result = backend_in("new").request(&FrontendRequest::SetFeatures(bits), true);
        assert_eq!(result, Err(Violation::Features(bits)));
    }
    for bits in [
        0,
        NEEDED_FEATURES | 1,
        NEEDED_FEATURES & !FEATURE_PCOW,
        NEEDED_FEATURES | 1 << 61,
        NEEDED_FEATURES | FEATURE_QUIESCE,
        FEATURE_BOUNCE,
    ] {
        let request = FrontendRequest::SetProtocolFeatures(bits);
        let result = backend_in("features").request(&request, true);
        assert_eq!(result, Err(Violation::Features(bits)));
    }
}

#[test]
fn a_lock_is_handed_back_once_in_a_session() {
    let mut session = backend_in("negotiated");
    let hand_back = request(FrontendCode::HandBack);
    session.request(&hand_back, true).unwrap();
    session
        .request(&request(FrontendCode::SetBackendReqFd), true)
        .unwrap();
    let again = session.request(&hand_back, true);
    assert_eq!(again, Err(Violation::Repeated("HAND_BACK")));
}

#[test]
fn requests_of_features_that_were_not_agreed_on_are_unknown_to_the_backend() {
    let mut session = backend_in("features");
    let chosen = FrontendRequest::SetProtocolFeatures(NEEDED_FEATURES);
    session.request(&chosen, true).unwrap();
    let refused = session.request(&request(FrontendCode::HandBack), true);
    assert_eq!(refused, Err(Violation::UnknownRequest(1002)));
    for code in [FrontendCode::SetBackendReqFd, FrontendCode::SetFaultFd] {
        session.request(&request(code), true).unwrap();
    }
    session.attached(Status::OK);
    let refused = session.request(&request(FrontendCode::Quiesced), false);
    assert_eq!(refused, Err(Violation::UnknownRequest(1004)));
}

#[test]
fn nobody_quiesces_for_the_id_zero() {
    let quiesced = Quiesced { id: 0, ..QUIESCED };
    let refused = backend_in("serving").request(&FrontendRequest::Quiesced(quiesced), false);
    assert_eq!(refused, Err(Violation::OutOfRange("quiesced.id")));
    let quiet = backend_in("serving").request(&request(FrontendCode::Quiesced), false);
    assert_eq!(quiet, Ok(BackendAction::Quiesced(QUIESCED, None)));
}

#[test]
fn a_fault_fd_out_of_range_is_refused() {
    let top = u64::MAX - REGION_ALIGNMENT + 1;
    let bad = [
        (
            FaultFd {
                base: 0,
                ..fault_fd()
            },
            "fault_fd.base",
        ),
        (
            FaultFd {
                base: PAGE,
                ..fault_fd()
            },
            "fault_fd.base",
        ),
        (
            FaultFd {
                base: top,
                ..fault_fd()
            },
            "fault_fd.base",
        ),
        (
            FaultFd {
                size: SIZE - PAGE,
                ..fault_fd()
            },
            "fault_fd.size",
        ),
        (
            FaultFd {
                size: SIZE + REGION_ALIGNMENT,
                ..fault_fd()
            },
            "fault_fd.size",
        ),
        (
            FaultFd {
                mapping_limit: 15,
                ..fault_fd()
            },
            "fault_fd.mapping_limit",
        ),
    ];
    for (fault_fd, field) in bad {
        let result = backend_in("channel").request(&FrontendRequest::SetFaultFd(fault_fd), true);
        assert_eq!(result, Err(Violation::OutOfRange(field)));
    }
}

fn region() -> Region {
    Region {
        size: SIZE,
        alignment: REGION_ALIGNMENT,
        ..Region::default()
    }
}

/// A valid reply to every request.
fn reply(code: FrontendCode) -> FrontendReply {
    match code {
        FrontendCode::GetFeatures => FrontendReply::Features(code, 1 << 30 | 1 << 26),
        FrontendCode::GetProtocolFeatures => FrontendReply::Features(code, KNOWN_FEATURES | 1),
        FrontendCode::GetRegion => FrontendReply::Region(region()),
        _ => FrontendReply::Status(code, Status::OK),
    }
}

/// A frontend that waits for the reply to this request, if it ever asks for one.
fn frontend_awaiting(code: Option<FrontendCode>) -> FrontendSession {
    use FrontendCode as C;
    let (mut session, first) = FrontendSession::start(OPTIONAL);
    assert_eq!(first, FrontendRequest::GetFeatures);
    for answered in [C::GetFeatures, C::GetProtocolFeatures, C::GetRegion] {
        if code == Some(answered) {
            return session;
        }
        session.reply(&reply(answered)).unwrap();
    }
    if code == Some(C::HandBack) {
        session.hand_back(HELD);
        return session;
    }
    session.reserved(fault_fd());
    if code == Some(C::SetFaultFd) {
        return session;
    }
    session.reply(&reply(C::SetFaultFd)).unwrap();
    if code == Some(C::Flush) {
        session.flush();
    }
    session
}

/// What the frontend does with the reply that it waits for.
fn expected_step(code: FrontendCode) -> FrontendStep {
    use FrontendRequest as R;
    match code {
        FrontendCode::GetFeatures => {
            FrontendStep::Send([R::SetFeatures(1 << 30), R::GetProtocolFeatures])
        }
        FrontendCode::GetProtocolFeatures => {
            FrontendStep::Send([R::SetProtocolFeatures(KNOWN_FEATURES), R::GetRegion])
        }
        FrontendCode::GetRegion => FrontendStep::Reserve(region()),
        FrontendCode::HandBack => FrontendStep::HandedBack,
        FrontendCode::SetFaultFd => FrontendStep::Serving,
        FrontendCode::Flush => FrontendStep::Flushed(Status::OK),
        other => panic!("{other:?} is sent without a wish for a reply"),
    }
}

#[test]
fn every_state_of_the_frontend_meets_every_reply() {
    use FrontendCode as C;
    let awaited = [
        C::GetFeatures,
        C::GetProtocolFeatures,
        C::GetRegion,
        C::HandBack,
        C::SetFaultFd,
        C::Flush,
    ];
    for state in awaited.into_iter().map(Some).chain([None]) {
        for code in C::ALL {
            let result = frontend_awaiting(state).reply(&reply(*code));
            if state == Some(*code) {
                assert_eq!(result, Ok(expected_step(*code)));
            } else {
                assert_eq!(
                    result,
                    Err(Violation::UnexpectedReply(code.number())),
                    "{state:?}"
                );
            }
        }
    }
}

#[test]
fn the_two_ends_lead_each_other_through_the_whole_session() {
    let (mut frontend, first) = FrontendSession::start(OPTIONAL);
    let mut backend = BackendSession::new(SIZE);
    let mut outgoing = vec![first];
    let mut served = false;
    while let Some(request) = (!outgoing.is_empty()).then(|| outgoing.remove(0)) {
        let reply = match backend
            .request(&request, request.code().must_ask())
            .unwrap()
        {
            BackendAction::Reply(reply) => reply,
            BackendAction::ReplyRegion => FrontendReply::Region(region()),
            BackendAction::Nothing | BackendAction::TakeChannel(None) => continue,
            BackendAction::TakeLock(held) => {
                assert_eq!(held, HELD);
                FrontendReply::Status(request.code(), Status::OK)
            }
            BackendAction::Attach(_) => {
                backend.attached(Status::OK);
                FrontendReply::Status(request.code(), Status::OK)
            }
            action => panic!("{action:?}"),
        };
        match frontend.reply(&reply).unwrap() {
            FrontendStep::Send(requests) => outgoing.extend(requests),
            FrontendStep::Reserve(_) => outgoing.push(frontend.hand_back(HELD)),
            FrontendStep::HandedBack => outgoing.extend(frontend.reserved(fault_fd())),
            FrontendStep::Serving => served = true,
            step => panic!("{step:?}"),
        }
    }
    assert!(served);
    assert_eq!(frontend.features(), OPTIONAL);
    for feature in [FEATURE_BOUNCE, FEATURE_RESET, FEATURE_QUIESCE, FEATURE_STOP] {
        assert!(backend.has(feature));
    }
    let status = Status::from_errno(libc::ETIMEDOUT);
    let quiesced = FrontendSession::quiesced(9, status);
    let expected = Quiesced {
        id: 9,
        error: 110,
        reserved: 0,
    };
    let action = backend.request(&quiesced, false);
    assert_eq!(action, Ok(BackendAction::Quiesced(expected, None)));
}

#[test]
fn a_refused_lock_ends_the_attempt_of_the_frontend() {
    let mut session = frontend_awaiting(Some(FrontendCode::HandBack));
    let status = Status::from_errno(libc::ESTALE);
    let step = session.reply(&FrontendReply::Status(FrontendCode::HandBack, status));
    assert_eq!(step, Ok(FrontendStep::Refused(libc::ESTALE)));
}

#[test]
fn a_feature_is_agreed_on_only_if_both_ends_know_it_and_what_it_needs() {
    let offer = |bits| FrontendReply::Features(FrontendCode::GetProtocolFeatures, bits);
    for (wanted, offered) in [
        (OPTIONAL, NEEDED_FEATURES),
        (0, KNOWN_FEATURES),
        (OPTIONAL, NEEDED_FEATURES | FEATURE_QUIESCE),
    ] {
        let (mut frontend, _) = FrontendSession::start(wanted);
        frontend.reply(&reply(FrontendCode::GetFeatures)).unwrap();
        let step = frontend.reply(&offer(offered)).unwrap();
        let chosen = FrontendRequest::SetProtocolFeatures(NEEDED_FEATURES);
        assert_eq!(
            step,
            FrontendStep::Send([chosen, FrontendRequest::GetRegion])
        );
        assert_eq!(frontend.features(), 0);
        let mut backend = backend_in("features");
        backend.request(&chosen, false).unwrap();
        assert!(!backend.has(OPTIONAL));
    }
}

#[test]
fn a_peer_without_pcow_is_recognised_and_one_without_protocol_features_refused() {
    let offer = |code, bits| FrontendReply::Features(code, bits);
    let without = NEEDED_FEATURES & !FEATURE_PCOW;
    let mut session = frontend_awaiting(Some(FrontendCode::GetProtocolFeatures));
    let step = session.reply(&offer(FrontendCode::GetProtocolFeatures, without));
    assert_eq!(step, Ok(FrontendStep::NotPcow));

    let (mut session, _) = FrontendSession::start(OPTIONAL);
    let result = session.reply(&offer(FrontendCode::GetFeatures, 1));
    assert_eq!(result, Err(Violation::Features(1)));
}

#[test]
fn a_region_out_of_range_is_refused() {
    let bad = [
        (
            Region {
                size: 0,
                ..region()
            },
            "region.size",
        ),
        (
            Region {
                size: SIZE + PAGE,
                ..region()
            },
            "region.size",
        ),
        (
            Region {
                size: 8 << 40,
                ..region()
            },
            "region.size",
        ),
        (
            Region {
                alignment: 0,
                ..region()
            },
            "region.alignment",
        ),
        (
            Region {
                alignment: PAGE,
                ..region()
            },
            "region.alignment",
        ),
    ];
    for (region, field) in bad {
        let mut session = frontend_awaiting(Some(FrontendCode::GetRegion));
        let result = session.reply(&FrontendReply::Region(region));
        assert_eq!(result, Err(Violation::OutOfRange(field)));
    }
}

#[test]
fn a_failed_flush_is_reported_and_the_session_goes_on() {
    let mut session = frontend_awaiting(Some(FrontendCode::Flush));
    let status = Status::from_errno(libc::EIO);
    let step = session.reply(&FrontendReply::Status(FrontendCode::Flush, status));
    assert_eq!(step, Ok(FrontendStep::Flushed(status)));
    assert_eq!(session.flush(), FrontendRequest::Flush);
}

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
