// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a service manager hands down and wants to hear (sd_listen_fds(3), sd_notify(3)). Without one nothing happens.

use std::os::fd::RawFd;

use sd_notify::NotifyState;

use crate::failure::Failure;

/// The socket that was handed down, if one was.
///
/// # Errors
/// `Usage` if there are several: which of them frontends come to is not known.
pub fn socket() -> Result<Option<RawFd>, Failure> {
    let mut sockets = sd_notify::listen_fds()
        .map_err(|e| Failure::usage("the sockets of LISTEN_FDS cannot be used").caused_by(&e))?;
    let first = sockets.next();
    if sockets.next().is_some() {
        return Err(Failure::usage(
            "LISTEN_FDS hands down several sockets; give each backend one",
        ));
    }
    Ok(first)
}

/// The service works: its image is held, and frontends can connect.
pub fn ready() {
    tell(&[
        NotifyState::Ready,
        NotifyState::Status("waiting for a virtual machine"),
    ]);
}

/// The service ends.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// What the service does now, for people.
pub fn status(text: &str) {
    tell(&[NotifyState::Status(text)]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        // It would only know less.
        log::debug!("cannot tell the service manager: {e}");
    }
}
