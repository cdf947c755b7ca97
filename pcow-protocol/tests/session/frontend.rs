// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The frontend's machine: every state with every reply; and both machines together.

use crate::{HELD, OPTIONAL, PAGE, SIZE, backend_in, fault_fd};
use pcow_protocol::Violation;
use pcow_protocol::message::{FrontendReply, FrontendRequest, Status};
use pcow_protocol::session::{BackendAction, BackendSession, FrontendSession, FrontendStep};
use pcow_protocol::wire::{
    Code, FEATURE_BOUNCE, FEATURE_PCOW, FEATURE_QUIESCE, FEATURE_RESET, FEATURE_STOP, FrontendCode,
    KNOWN_FEATURES, NEEDED_FEATURES, Quiesced, REGION_ALIGNMENT, Region,
};

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
