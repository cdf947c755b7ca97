// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Replacing a running backend: asks it to end, and ends it if it does not, for example because it is stopped.
//!
//! What makes this safe is not here: whoever opens the image afterwards needs the serving lock, which the kernel gives up
//! when the last thread of its holder is gone. Here it is only made sure that the right process is signalled.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pcow_format::{Holder, Process, Purpose, Record, Stored, holder};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::failure::Failure;
use crate::readiness;

/// How long the other backend may take to end by itself. What it has not flushed by then loses nothing: it is in the page
/// cache, where its successor finds it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the kernel may take to end it.
const KILL: Duration = Duration::from_secs(60);

/// Ends the backend that serves the image at `path`, if there is one.
///
/// # Errors
/// If it cannot be told for certain which process that is, it is no backend, or it may not be signalled or does not end.
/// Nothing was signalled then, or the last attempt has failed.
pub fn take_over(path: &Path, base_dirs: &[PathBuf]) -> Result<(), Failure> {
    let stored = Stored::open(path, base_dirs)?;
    let Some(record) = server_of(&stored)? else {
        log::info!("there is no backend to take over from");
        return Ok(());
    };
    let refuse = |why: &str| {
        let name = &record.name;
        Failure::new(format!(
            "cannot take over from {name}: {why}; stop it and start again without --takeover"
        ))
    };
    let Some(process) = open_process(&record, &stored).map_err(|why| refuse(&why))? else {
        return Ok(()); // it has just ended
    };
    // Again, since time has passed: a backend that has ended meanwhile may have a successor already.
    match server_of(&stored)? {
        Some(same) if same == record => {}
        Some(other) => return Err(refuse(&format!("{} serves it by now", other.name))),
        None => return Ok(()),
    }
    log::info!("taking over from {}", record.name);
    end(&process).map_err(|why| refuse(&why))
}

/// The backend that has the image now; `None` if there is none.
fn server_of(stored: &Stored) -> Result<Option<Record>, Failure> {
    Ok(match holder(stored.directory())? {
        Some(Holder::Writer(record)) => Some(record),
        Some(Holder::Frontend) | None => None,
    })
}

/// The process of the record; `None` if it has ended.
fn open_process(record: &Record, stored: &Stored) -> Result<Option<OwnedFd>, String> {
    let Some((recorded, purpose)) = record.process else {
        return Err("the image's lock does not say which process that is".to_owned());
    };
    if purpose != Purpose::Serve {
        return Err("that is a command which changes the image".to_owned());
    }
    let pid = i32::try_from(recorded.pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| "its number is none".to_owned())?;
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(Errno::SRCH) => return Ok(None),
        Err(e) => return Err(format!("it cannot be opened: {e}")),
    };
    // Only now: from here on the descriptor means one process, and if that number belongs to the process of the lock, it
    // has done so since before the descriptor was opened.
    match Process::running(recorded.pid, stored.environment().boot) {
        Ok(running) if running == recorded => Ok(Some(process)),
        Ok(_) => {
            Err("the lock names a process of another boot, namespace or start time".to_owned())
        }
        Err(e) => Err(format!("it cannot be looked at: {e}")),
    }
}

/// Asks, waits, and kills. The lock is free when this returns.
fn end(process: &OwnedFd) -> Result<(), String> {
    for (signal, patience) in [(Signal::TERM, PATIENCE), (Signal::KILL, KILL)] {
        match pidfd_send_signal(process, signal) {
            Ok(()) => {}
            Err(Errno::SRCH) => return Ok(()),
            Err(e) => return Err(format!("it cannot be signalled: {e}")),
        }
        if has_ended(process, patience)? {
            return Ok(());
        }
        log::warn!("it has not ended within {} s", patience.as_secs());
    }
    Err("it does not end even when killed".to_owned())
}

fn has_ended(process: &OwnedFd, patience: Duration) -> Result<bool, String> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
        readiness::wait(&mut fds, Some(left))
            .map_err(|e| format!("cannot wait for its end: {e}"))?;
        let has_ended = !fds[0].revents().is_empty();
        if has_ended || left.is_zero() {
            return Ok(has_ended);
        }
    }
}
