// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A frontend that goes through the handshake step by step.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use pcow_protocol::codec::Connection;
use pcow_protocol::message::{FrontendReply, FrontendRequest};
use pcow_protocol::wire::{
    FEATURE_PROTOCOL_FEATURES, FEATURE_RESET, FaultFd, NEEDED_FEATURES, Region,
};

/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// How far it has come.
#[derive(Debug)]
pub struct Steps {
    /// The main channel.
    pub main: Connection<FrontendReply>,
    /// The backend channel.
    pub channel: Option<UnixStream>,
    /// What GET_REGION was answered with.
    pub offer: Option<(Region, Vec<OwnedFd>)>,
}

impl Steps {
    /// Connects to the backend that listens at `socket`.
    pub fn new(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            main: Connection::new(stream),
            channel: None,
            offer: None,
        }
    }

    /// Sends a request and waits for its answer.
    pub fn ask(&mut self, request: &FrontendRequest, fds: &[BorrowedFd<'_>]) -> FrontendReply {
        self.main.send(&request.encode(true), fds).unwrap();
        let received = self.main.recv().unwrap();
        if let FrontendReply::Region(region) = received.message {
            self.offer = Some((region, received.fds.into_iter().collect()));
        }
        received.message
    }

    /// Takes the first `steps` of the six steps that come before SET_FAULT_FD.
    pub fn take(&mut self, steps: usize) {
        let requests = [
            FrontendRequest::GetFeatures,
            FrontendRequest::SetFeatures(FEATURE_PROTOCOL_FEATURES),
            FrontendRequest::GetProtocolFeatures,
            FrontendRequest::SetProtocolFeatures(NEEDED_FEATURES | FEATURE_RESET),
            FrontendRequest::GetRegion,
        ];
        for request in &requests[..steps.min(5)] {
            self.ask(request, &[]);
        }
        if steps > 5 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            self.ask(&FrontendRequest::SetBackendReqFd, &[theirs.as_fd()]);
            self.channel = Some(ours);
        }
    }

    /// SET_FAULT_FD for a region of `size` bytes at `base`.
    pub fn fault_fd(base: u64, size: u64) -> FrontendRequest {
        FrontendRequest::SetFaultFd(FaultFd {
            base,
            size,
            mapping_limit: 1000,
            reserved: 0,
        })
    }
}
