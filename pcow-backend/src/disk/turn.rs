// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Something that is done by one at a time, and whose end others may wait for, but not for ever.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Who has it does the thing.
#[derive(Debug, Default)]
pub(super) struct Turn {
    is_taken: Mutex<bool>,
    given_back: Condvar,
}

/// Gives the turn back when dropped.
#[derive(Debug)]
pub(super) struct Taken<'a>(&'a Turn);

impl Turn {
    /// Waits for it, and takes it.
    pub(super) fn take(&self) -> Taken<'_> {
        let free = self.given_back.wait_while(self.lock(), |taken| *taken);
        *free.unwrap_or_else(PoisonError::into_inner) = true;
        Taken(self)
    }

    /// Waits until nobody has it, but not after `deadline`; returns whether nobody had it.
    pub(super) fn wait_until(&self, deadline: Instant) -> bool {
        let patience = deadline.saturating_duration_since(Instant::now());
        let waited = self
            .given_back
            .wait_timeout_while(self.lock(), patience, |taken| *taken);
        let (is_taken, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !*is_taken
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        // Nothing can panic while it is held.
        self.is_taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.0.lock() = false;
        self.0.given_back.notify_all();
    }
}
