// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The backend's machine: every state with every request.

use crate::{EBUSY, PAGE, QUIESCED, SIZE, STATES, backend_in, expected, fault_fd, request};
use pcow_protocol::Violation;
use pcow_protocol::message::{FrontendRequest, Status};
use pcow_protocol::session::{BackendAction, BackendSession};
use pcow_protocol::wire::{
    Code, FEATURE_BOUNCE, FEATURE_PCOW, FEATURE_QUIESCE, FaultFd, FrontendCode, NEEDED_FEATURES,
    Quiesced, REGION_ALIGNMENT,
};

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
