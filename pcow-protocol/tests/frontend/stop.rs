// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! STOP: who runs the virtual machine hears it, and the memory is not touched by it.

use std::sync::mpsc::{TryRecvError, channel};

use pcow_protocol::frontend::{FrontendOptions, StopReason};
use pcow_protocol::message::{BackendRequest, Status};
use pcow_protocol::wire::STOP_NO_SPACE;

use crate::backend::{
    CLUSTER, PATIENCE, attach, attach_with, file, load, load_fault, map, region, spawn_load,
};

#[test]
fn a_stop_reaches_who_runs_the_machine_and_mapping_goes_on() {
    let (stop, stops) = channel();
    let options = FrontendOptions {
        stop: Some(stop),
        ..FrontendOptions::default()
    };
    let (frontend, mut backend) = attach_with(region(0), &[&file()], &options);
    let waiting = spawn_load(&frontend, 0);
    assert_eq!(backend.fault(), load_fault(0));
    for (number, reason) in [
        (STOP_NO_SPACE, StopReason::NoSpace),
        (u32::MAX, StopReason::Other(u32::MAX)),
    ] {
        assert_eq!(backend.ask(&BackendRequest::Stop(number), None), Status::OK);
        assert_eq!(stops.try_recv(), Ok(reason), "told before it is answered");
    }
    assert_eq!(stops.try_recv(), Err(TryRecvError::Empty));
    assert!(!waiting.is_finished(), "what waits is not answered by it");
    assert_eq!(backend.ask(&map(0, CLUSTER), None), Status::OK);
    assert_eq!(waiting.join().unwrap(), 0);
    // Nobody who hears it is no reason to end the session.
    drop(stops);
    assert_eq!(backend.ask(&BackendRequest::Stop(1), None), Status::OK);
    assert_eq!(backend.ask(&map(CLUSTER, CLUSTER), None), Status::OK);
    assert_eq!(load(frontend.region(), CLUSTER), 0);
}

#[test]
fn a_frontend_that_nobody_can_stop_does_not_offer_it_and_ends_the_session_at_one() {
    let (frontend, mut backend) = attach(region(0), &[]);
    let answer = backend.ask(&BackendRequest::Stop(STOP_NO_SPACE), None);
    assert_eq!(answer, Status::from_errno(libc::EINVAL));
    assert!(frontend.wait_detached(PATIENCE));
}
