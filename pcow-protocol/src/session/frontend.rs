// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a frontend asks on the main channel, in which order, and what it accepts as replies. Knows no socket and no memory.

use crate::error::Violation;
use crate::message::{FrontendReply, FrontendRequest, Status};
use crate::wire::{
    Code, FEATURE_PCOW, FEATURE_PROTOCOL_FEATURES, FEATURE_QUIESCE, FEATURE_RESET, FaultFd,
    FrontendCode, Held, MAX_REGION_SIZE, NEEDED_FEATURES, Quiesced, REGION_ALIGNMENT, Region,
};

/// What is awaited from the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Features,
    ProtocolFeatures,
    Region,
    /// The caller reserves the region.
    Reserving,
    HandingBack,
    Attaching,
    Serving,
    Flushing,
    Refused,
}

impl State {
    fn awaits(self) -> Option<FrontendCode> {
        match self {
            Self::Features => Some(FrontendCode::GetFeatures),
            Self::ProtocolFeatures => Some(FrontendCode::GetProtocolFeatures),
            Self::Region => Some(FrontendCode::GetRegion),
            Self::HandingBack => Some(FrontendCode::HandBack),
            Self::Attaching => Some(FrontendCode::SetFaultFd),
            Self::Flushing => Some(FrontendCode::Flush),
            Self::Reserving | Self::Serving | Self::Refused => None,
        }
    }
}

/// What the frontend has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontendStep {
    /// Send both: the first without, the second with a wish for a reply; then wait for that reply.
    Send([FrontendRequest; 2]),
    /// The peer offers vhost-user features, but not pcow's.
    NotPcow,
    /// Reserve the region, or make it trap again. With a lock of an earlier session, [`FrontendSession::hand_back`]; then
    /// call [`FrontendSession::reserved`].
    Reserve(Region),
    /// The backend has taken the lock: call [`FrontendSession::reserved`].
    HandedBack,
    /// The backend serves the region.
    Serving,
    /// The backend refused the userfaultfd, or the lock.
    Refused(i32),
    /// The flush that was asked for is done, or failed.
    Flushed(Status),
}

/// A frontend's end of a main channel.
///
/// It asks one thing at a time. Of the two requests of a step only the second asks for a reply, so that a vhost-user
/// peer, which answers no status before REPLY_ACK is agreed, is recognised and not waited for.
#[derive(Debug)]
pub struct FrontendSession {
    state: State,
    /// The optional features that are wanted, and since they were chosen, those that were agreed on.
    features: u64,
}

impl FrontendSession {
    /// A new connection, and the request to begin with. `wanted` are the optional features (`FEATURE_*` bits) that the
    /// frontend can carry out.
    pub fn start(wanted: u64) -> (Self, FrontendRequest) {
        let session = Self {
            state: State::Features,
            features: wanted,
        };
        (session, FrontendRequest::GetFeatures)
    }

    /// The optional features that were agreed on. Known when the region is.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Takes the reply that was waited for.
    ///
    /// # Errors
    /// Nobody asked for this reply, or it is out of range: the session ends.
    pub fn reply(&mut self, reply: &FrontendReply) -> Result<FrontendStep, Violation> {
        if self.state.awaits() != Some(reply.code()) {
            return Err(Violation::UnexpectedReply(reply.code().number()));
        }
        match reply {
            FrontendReply::Features(FrontendCode::GetFeatures, bits) => self.choose_features(*bits),
            FrontendReply::Features(_, bits) => Ok(self.protocol_features(*bits)),
            FrontendReply::Region(region) => self.region(*region),
            FrontendReply::Status(_, status) => Ok(self.status(*status)),
        }
    }

    /// Hands the lock of an earlier session back: the request that carries it. The feature RESET was agreed on.
    pub fn hand_back(&mut self, held: Held) -> FrontendRequest {
        assert_eq!(
            self.state,
            State::Reserving,
            "a lock is handed back once, when the region is known"
        );
        self.state = State::HandingBack;
        FrontendRequest::HandBack(held)
    }

    /// Answers a QUIESCE; asks for no reply, so it can be sent at any time while the region is served.
    pub fn quiesced(id: u64, outcome: Status) -> FrontendRequest {
        let error = outcome.errno().map_or(0, i32::unsigned_abs);
        FrontendRequest::Quiesced(Quiesced {
            id,
            error,
            reserved: 0,
        })
    }

    /// The region is reserved, and the backend channel is served: what to send now.
    ///
    /// The first request carries the channel, the second the userfaultfd.
    pub fn reserved(&mut self, fault_fd: FaultFd) -> [FrontendRequest; 2] {
        assert_eq!(
            self.state,
            State::Reserving,
            "a region is reserved once, when it is known"
        );
        self.state = State::Attaching;
        [
            FrontendRequest::SetBackendReqFd,
            FrontendRequest::SetFaultFd(fault_fd),
        ]
    }

    /// Begins a flush: the request to send.
    pub fn flush(&mut self) -> FrontendRequest {
        assert_eq!(
            self.state,
            State::Serving,
            "one flush at a time, of a region that is served"
        );
        self.state = State::Flushing;
        FrontendRequest::Flush
    }

    fn choose_features(&mut self, bits: u64) -> Result<FrontendStep, Violation> {
        if bits & FEATURE_PROTOCOL_FEATURES == 0 {
            return Err(Violation::Features(bits));
        }
        self.state = State::ProtocolFeatures;
        Ok(FrontendStep::Send([
            FrontendRequest::SetFeatures(FEATURE_PROTOCOL_FEATURES),
            FrontendRequest::GetProtocolFeatures,
        ]))
    }

    fn protocol_features(&mut self, bits: u64) -> FrontendStep {
        if bits & FEATURE_PCOW == 0 || bits & NEEDED_FEATURES != NEEDED_FEATURES {
            self.state = State::Refused;
            return FrontendStep::NotPcow;
        }
        self.state = State::Region;
        self.features &= bits;
        if self.features & FEATURE_RESET == 0 {
            self.features &= !FEATURE_QUIESCE;
        }
        FrontendStep::Send([
            FrontendRequest::SetProtocolFeatures(NEEDED_FEATURES | self.features),
            FrontendRequest::GetRegion,
        ])
    }

    fn region(&mut self, region: Region) -> Result<FrontendStep, Violation> {
        let size_is_right = region.size.is_multiple_of(REGION_ALIGNMENT)
            && (REGION_ALIGNMENT..=MAX_REGION_SIZE).contains(&region.size);
        if !size_is_right {
            return Err(Violation::OutOfRange("region.size"));
        }
        if region.alignment != REGION_ALIGNMENT {
            return Err(Violation::OutOfRange("region.alignment"));
        }
        self.state = State::Reserving;
        Ok(FrontendStep::Reserve(region))
    }

    fn status(&mut self, status: Status) -> FrontendStep {
        if self.state == State::Flushing {
            self.state = State::Serving;
            return FrontendStep::Flushed(status);
        }
        match status.errno() {
            None if self.state == State::HandingBack => {
                self.state = State::Reserving;
                FrontendStep::HandedBack
            }
            None => {
                self.state = State::Serving;
                FrontendStep::Serving
            }
            Some(errno) => {
                self.state = State::Refused;
                FrontendStep::Refused(errno)
            }
        }
    }
}
