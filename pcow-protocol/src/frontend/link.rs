// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether a session is alive: one place that ends both of its channels, and that others can ask and wait on.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whether a backend is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkStatus {
    /// A session is under way.
    Attached,
    /// The session is over, and another is tried for. What is mapped goes on working; other touches wait.
    Waiting {
        /// Why there is no backend: how the session ended, or why the last attempt failed.
        reason: String,
        /// Since when.
        since: Instant,
    },
    /// The session is over, for this reason, and there will be no other. What is mapped goes on working; other touches
    /// wait.
    Detached(String),
}

/// How a session ended.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub reason: String,
    pub at: Instant,
}

/// The two sockets of a session, and how it ended.
#[derive(Debug)]
pub(super) struct Link {
    main: UnixStream,
    channel: UnixStream,
    ended: Mutex<Option<Ended>>,
    changed: Condvar,
}

impl Link {
    pub(super) fn new(main: UnixStream, channel: UnixStream) -> Self {
        Self {
            main,
            channel,
            ended: Mutex::new(None),
            changed: Condvar::new(),
        }
    }

    /// Ends the session, if that has not happened yet; wakes whoever waits on a socket.
    pub(super) fn end(&self, reason: impl Into<String>) {
        let mut ended = self.lock();
        if ended.is_some() {
            return;
        }
        *ended = Some(Ended {
            reason: reason.into(),
            at: Instant::now(),
        });
        // A socket whose peer is gone cannot be shut down, and need not be.
        let _ = self.main.shutdown(Shutdown::Both);
        let _ = self.channel.shutdown(Shutdown::Both);
        self.changed.notify_all();
    }

    /// How it ended, if it has.
    pub(super) fn ended(&self) -> Option<Ended> {
        self.lock().clone()
    }

    /// Waits for the session's end.
    pub(super) fn wait_end(&self) -> Ended {
        let mut ended = self.lock();
        loop {
            if let Some(ended) = &*ended {
                return ended.clone();
            }
            let waited = self.changed.wait(ended);
            ended = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for the session's end; false if it still lasts after `timeout`.
    pub(super) fn wait_ended(&self, timeout: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), timeout, |ended| ended.is_none());
        let (ended, _) = waited.unwrap_or_else(PoisonError::into_inner);
        ended.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Ended>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
