// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting until there is something to do (poll(2)), whatever the kernel is short of.

use std::time::Duration;

use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;

/// A kernel that has no memory for it now may have some soon, and a guest waits for whoever gives up.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(100);

/// Waits for one of `fds`, no longer than `patience` if there is one, and the second that failures may take; returns early,
/// with none ready, if interrupted.
///
/// # Errors
/// That of the kernel, if it fails again and again for a second.
pub fn wait(fds: &mut [PollFd<'_>], patience: Option<Duration>) -> Result<(), Errno> {
    let timeout = patience.and_then(|p| Timespec::try_from(p).ok());
    let mut tries = 1;
    loop {
        match poll(fds, timeout.as_ref()) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {
                fds.iter_mut().for_each(PollFd::clear_revents);
                return Ok(());
            }
            Err(e) if tries == TRIES => return Err(e),
            Err(e) if tries == 1 => log::warn!("cannot wait, and tries again: {e}"),
            Err(_) => {}
        }
        std::thread::sleep(PAUSE);
        tries += 1;
    }
}
