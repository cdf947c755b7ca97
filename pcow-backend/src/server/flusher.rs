// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flushes at intervals, in a thread of its own: no frontend waits for the storage to be attached, or attached again.
//!
//! A guest stores into what was mapped into it whether it has a session or not. So flushes are due once a frontend has been
//! attached, while one has the image that has not come back yet, and at once if one was found so: nobody has flushed since its
//! backend ended.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::connection::Offer;
use crate::failure::Failure;

/// The thread. It ends when this is dropped, after a flush that is under way.
#[derive(Debug)]
pub(super) struct Flusher {
    end: Arc<End>,
    thread: Option<JoinHandle<()>>,
}

/// The wish that it ends.
#[derive(Debug, Default)]
struct End {
    wanted: Mutex<bool>,
    changed: Condvar,
}

impl Flusher {
    /// Flushes what `offer` serves.
    ///
    /// # Errors
    /// If there is no thread left.
    pub(super) fn start(offer: Arc<Offer>, interval: Duration) -> Result<Self, Failure> {
        let end = Arc::new(End::default());
        let until = Arc::clone(&end);
        let thread = std::thread::Builder::new()
            .name("flush".into())
            .spawn(move || work(&offer, interval, &until))
            .map_err(|e| Failure::new("cannot start a thread").caused_by(&e))?;
        Ok(Self {
            end,
            thread: Some(thread),
        })
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        *self.end.lock() = true;
        self.end.changed.notify_all();
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            log::error!("the flushing thread panicked");
        }
    }
}

impl End {
    /// Whether it is wanted within `patience`.
    fn comes_within(&self, patience: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), patience, |wanted| !*wanted);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        // A single word is never half changed.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn work(offer: &Offer, interval: Duration, end: &End) {
    let is_kept = || offer.disk.lock().is_none();
    let mut patience = if is_kept() { Duration::ZERO } else { interval };
    while !end.comes_within(patience) {
        if offer.place.was_taken() || is_kept() {
            // It is told there, and every later flush fails, too.
            if offer.flush().is_err() {
                return;
            }
            log::debug!("flushed by itself");
        }
        patience = interval;
    }
}
