// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether a frontend is attached: there can be one at a time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a frontend may wait for the one before it to be done with. A flush of much data takes its time; the frontend
/// has a deadline of its own.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long it takes at most to notice that a frontend has died.
const NOTICE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Attached,
    /// The frontend is gone, and what it wrote is being made durable.
    Leaving,
    /// Nobody is to come any more.
    Closed,
}

/// The one place for a frontend.
#[derive(Debug)]
pub struct Occupancy {
    state: Mutex<State>,
    changed: Condvar,
    was_taken: AtomicBool,
}

impl Default for Occupancy {
    fn default() -> Self {
        Self {
            state: Mutex::new(State::Free),
            changed: Condvar::new(),
            was_taken: AtomicBool::new(false),
        }
    }
}

impl Occupancy {
    /// Takes the place; waits for a frontend that is leaving, or has died and was not noticed yet, but not for one that
    /// is attached.
    pub fn take(&self) -> bool {
        let state = self.wait_while(self.lock(), NOTICE, |s| *s == State::Attached);
        let mut state = self.wait_while(state, PATIENCE, |s| *s == State::Leaving);
        let free = *state == State::Free;
        if free {
            *state = State::Attached;
            self.was_taken.store(true, Ordering::Relaxed);
        }
        free
    }

    fn wait_while<'a>(
        &self,
        state: MutexGuard<'a, State>,
        patience: Duration,
        mut condition: impl FnMut(&mut State) -> bool,
    ) -> MutexGuard<'a, State> {
        self.changed
            .wait_timeout_while(state, patience, |s| condition(s))
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// Takes the free place without a frontend: those that come wait until [`Occupancy::free`]. False if it is not free.
    pub fn reserve(&self) -> bool {
        let mut state = self.lock();
        let free = *state == State::Free;
        if free {
            *state = State::Leaving;
        }
        free
    }

    /// Refuses all frontends from now on, if none was ever attached.
    pub fn close(&self) -> bool {
        let mut state = self.lock();
        // What is stored there is so under the lock.
        let unused = *state == State::Free && !self.was_taken();
        if unused {
            *state = State::Closed;
        }
        unused
    }

    /// The frontend is gone.
    pub fn leave(&self) {
        *self.lock() = State::Leaving;
        self.changed.notify_all();
    }

    /// Nothing of the frontend is left.
    pub fn free(&self) {
        *self.lock() = State::Free;
        self.changed.notify_all();
    }

    /// Whether a frontend has ever been attached. One that lost its session may live on, with what was mapped into it.
    pub fn was_taken(&self) -> bool {
        self.was_taken.load(Ordering::Relaxed)
    }

    /// Whether a frontend is attached.
    pub fn is_attached(&self) -> bool {
        *self.lock() == State::Attached
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A single word is never half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_frontend_waits_for_one_that_leaves_and_not_for_one_that_stays() {
        let place = Occupancy::default();
        assert!(place.take());
        assert!(!place.take());
        std::thread::scope(|scope| {
            let next = scope.spawn(|| place.take());
            place.leave();
            place.free();
            assert!(next.join().unwrap());
        });
        assert!(place.is_attached());
    }

    #[test]
    fn a_place_is_closed_before_it_was_taken_or_not_at_all() {
        let place = Occupancy::default();
        assert!(place.close() && !place.take() && !place.reserve());
        let place = Occupancy::default();
        assert!(place.take() && !place.close());
        place.leave();
        place.free();
        assert!(!place.close() && place.take());
    }

    #[test]
    fn a_frontend_waits_for_who_has_reserved_its_place() {
        let place = Occupancy::default();
        assert!(place.reserve() && !place.reserve() && !place.was_taken());
        std::thread::scope(|scope| {
            let next = scope.spawn(|| place.take());
            assert!(!place.is_attached());
            place.free();
            assert!(next.join().unwrap());
        });
        assert!(!place.reserve() && place.was_taken());
    }
}
