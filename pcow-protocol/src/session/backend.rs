// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a backend does with each request of the main channel. Knows no socket and no image.

use crate::error::Violation;
use crate::message::{FrontendReply, FrontendRequest, Status};
use crate::wire::{
    Code, FEATURE_PROTOCOL_FEATURES, FEATURE_QUIESCE, FEATURE_RESET, FaultFd, FrontendCode, Held,
    KNOWN_FEATURES, MIN_MAPPING_LIMIT, NEEDED_FEATURES, Quiesced, REGION_ALIGNMENT,
};

/// Where a session is (section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Features,
    Negotiated,
    Channel,
    /// SET_FAULT_FD has come and is not answered yet.
    Attaching,
    Serving,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Features => "features",
            Self::Negotiated => "negotiated",
            Self::Channel => "channel",
            Self::Attaching => "channel, with SET_FAULT_FD unanswered",
            Self::Serving => "serving",
        }
    }

    fn allows(self, code: FrontendCode) -> bool {
        use FrontendCode as C;
        match self {
            Self::New => matches!(code, C::GetFeatures | C::SetFeatures),
            Self::Features => matches!(code, C::GetProtocolFeatures | C::SetProtocolFeatures),
            Self::Negotiated => {
                matches!(code, C::GetRegion | C::HandBack | C::SetBackendReqFd)
            }
            Self::Channel => matches!(code, C::GetRegion | C::HandBack | C::SetFaultFd),
            Self::Attaching => false,
            Self::Serving => matches!(code, C::GetRegion | C::Flush | C::Quiesced),
        }
    }
}

/// What the backend has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendAction {
    /// Send this reply.
    Reply(FrontendReply),
    /// Nothing: it was done, and no answer was asked for.
    Nothing,
    /// Answer with the region, and the file descriptors that its flags announce: the lock first, then the device.
    ReplyRegion,
    /// The request's file descriptor is the backend channel; then send the reply, if there is one.
    TakeChannel(Option<FrontendReply>),
    /// The request's file descriptor is the userfaultfd. Register what is needed, begin to serve, and answer; then tell
    /// [`BackendSession::attached`].
    Attach(FaultFd),
    /// The request's file descriptor is the lock that the frontend has kept: compare, and answer.
    TakeLock(Held),
    /// The frontend has drained its I/O, or could not; then send the reply, if there is one.
    Quiesced(Quiesced, Option<FrontendReply>),
    /// Make everything durable, and answer.
    Flush,
}

/// A backend's end of a main channel.
///
/// Requests are fed in the order in which they came; the next one only when the one before was answered.
#[derive(Debug)]
pub struct BackendSession {
    state: State,
    region_size: u64,
    protocol_features: u64,
    handed_back: bool,
}

impl BackendSession {
    /// A new connection to a backend that serves a region of `region_size` bytes.
    pub fn new(region_size: u64) -> Self {
        Self {
            state: State::New,
            region_size,
            protocol_features: 0,
            handed_back: false,
        }
    }

    /// Decides what to do with a request.
    ///
    /// # Errors
    /// The request is not allowed in this state or has a field out of range: the session ends.
    pub fn request(
        &mut self,
        request: &FrontendRequest,
        reply_wanted: bool,
    ) -> Result<BackendAction, Violation> {
        let code = request.code();
        self.check(code, reply_wanted)?;
        let status = reply_wanted.then_some(FrontendReply::Status(code, Status::OK));
        let done = status.map_or(BackendAction::Nothing, BackendAction::Reply);
        Ok(match request {
            FrontendRequest::GetFeatures => features(code, FEATURE_PROTOCOL_FEATURES),
            FrontendRequest::GetProtocolFeatures => features(code, KNOWN_FEATURES),
            FrontendRequest::SetFeatures(bits) => {
                // What is offered is needed, so there is exactly one right choice.
                choose(*bits, FEATURE_PROTOCOL_FEATURES, FEATURE_PROTOCOL_FEATURES)?;
                self.state = State::Features;
                done
            }
            FrontendRequest::SetProtocolFeatures(bits) => {
                choose(*bits, KNOWN_FEATURES, needed_with(*bits))?;
                self.protocol_features = *bits;
                self.state = State::Negotiated;
                done
            }
            FrontendRequest::SetBackendReqFd => {
                self.state = State::Channel;
                BackendAction::TakeChannel(status)
            }
            FrontendRequest::GetRegion => BackendAction::ReplyRegion,
            FrontendRequest::SetFaultFd(fault_fd) => self.attach(fault_fd)?,
            FrontendRequest::HandBack(held) => self.take_lock(held)?,
            FrontendRequest::Flush => BackendAction::Flush,
            FrontendRequest::Quiesced(quiesced) => {
                if quiesced.id == 0 {
                    return Err(Violation::OutOfRange("quiesced.id"));
                }
                BackendAction::Quiesced(*quiesced, status)
            }
        })
    }

    /// Whether this optional feature (`FEATURE_*` bit) was agreed on.
    pub fn has(&self, feature: u64) -> bool {
        self.protocol_features & feature != 0
    }

    /// SET_FAULT_FD was answered with this status.
    pub fn attached(&mut self, status: Status) {
        assert_eq!(self.state, State::Attaching, "only SET_FAULT_FD attaches");
        self.state = if status == Status::OK {
            State::Serving
        } else {
            State::Channel
        };
    }

    fn check(&self, code: FrontendCode, reply_wanted: bool) -> Result<(), Violation> {
        if !self.state.allows(code) {
            return Err(Violation::State {
                name: code.name(),
                state: self.state.name(),
            });
        }
        let feature = match code {
            FrontendCode::HandBack => Some(FEATURE_RESET),
            FrontendCode::Quiesced => Some(FEATURE_QUIESCE),
            _ => None,
        };
        if feature.is_some_and(|bit| !self.has(bit)) {
            return Err(Violation::UnknownRequest(code.number()));
        }
        if code.must_ask() && !reply_wanted {
            return Err(Violation::ReplyNotWanted(code.name()));
        }
        Ok(())
    }

    fn take_lock(&mut self, held: &Held) -> Result<BackendAction, Violation> {
        if self.handed_back {
            return Err(Violation::Repeated(FrontendCode::HandBack.name()));
        }
        self.handed_back = true;
        Ok(BackendAction::TakeLock(*held))
    }

    fn attach(&mut self, fault_fd: &FaultFd) -> Result<BackendAction, Violation> {
        check_fault_fd(fault_fd, self.region_size)?;
        self.state = State::Attaching;
        Ok(BackendAction::Attach(*fault_fd))
    }
}

/// What a choice of protocol features must have: what every session needs, and what the chosen bits need.
fn needed_with(bits: u64) -> u64 {
    let quiesce = bits & FEATURE_QUIESCE != 0;
    NEEDED_FEATURES | if quiesce { FEATURE_RESET } else { 0 }
}

/// The choice must be a part of what was offered, and have all that is needed.
fn choose(bits: u64, offered: u64, needed: u64) -> Result<(), Violation> {
    if bits & !offered != 0 || bits & needed != needed {
        return Err(Violation::Features(bits));
    }
    Ok(())
}

fn features(code: FrontendCode, bits: u64) -> BackendAction {
    BackendAction::Reply(FrontendReply::Features(code, bits))
}

fn check_fault_fd(fault_fd: &FaultFd, region_size: u64) -> Result<(), Violation> {
    let base_is_right = fault_fd.base != 0
        && fault_fd.base.is_multiple_of(REGION_ALIGNMENT)
        && fault_fd.base.checked_add(region_size).is_some();
    if !base_is_right {
        return Err(Violation::OutOfRange("fault_fd.base"));
    }
    if fault_fd.size != region_size {
        return Err(Violation::OutOfRange("fault_fd.size"));
    }
    if fault_fd.mapping_limit < MIN_MAPPING_LIMIT {
        return Err(Violation::OutOfRange("fault_fd.mapping_limit"));
    }
    Ok(())
}
