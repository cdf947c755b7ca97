// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The session machines of both ends: every state with every message.
#![allow(missing_docs, clippy::unwrap_used)]

mod backend;
mod frontend;
mod mappings;

use pcow_protocol::message::{FrontendReply, FrontendRequest, Status};
use pcow_protocol::session::{BackendAction, BackendSession};
use pcow_protocol::wire::{
    FEATURE_PROTOCOL_FEATURES, FaultFd, FrontendCode, Held, KNOWN_FEATURES, NEEDED_FEATURES,
    Quiesced, REGION_ALIGNMENT,
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
