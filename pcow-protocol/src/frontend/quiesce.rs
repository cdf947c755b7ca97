// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Device I/O into the region: counted, and held while the backend asks for that (`protocol.md` section 5.4).
//!
//! The lock is held for counting only: never in a system call that may touch the region, and never while somebody waits
//! for the backend (F6). I/O that is held waits without it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::io::Errno;

#[derive(Debug, Default)]
struct State {
    /// System calls under way that may touch the region.
    io: usize,
    /// The quiesce in force or under way.
    hold: Option<Hold>,
    /// How many there have been.
    holds: u64,
}

#[derive(Clone, Copy, Debug)]
struct Hold {
    /// Tells it from every other of this region; ids are a session's.
    number: u64,
    id: u64,
}

/// What all I/O into one region passes.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// A quiesce that was begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draining(u64);

impl Gate {
    /// Before a system call that may touch the region; waits while a quiesce holds I/O.
    pub(super) fn enter(&self) {
        let held = self.changed.wait_while(self.lock(), |s| s.hold.is_some());
        held.unwrap_or_else(PoisonError::into_inner).io += 1;
    }

    /// After it.
    pub(super) fn leave(&self) {
        self.lock().io -= 1;
        self.changed.notify_all();
    }

    /// Whether any is under way.
    pub(super) fn has_io(&self) -> bool {
        self.lock().io > 0
    }

    /// Holds what is new from now on.
    pub(super) fn hold(&self, id: u64) -> Result<Draining, Errno> {
        let mut state = self.lock();
        if state.hold.is_some() {
            return Err(Errno::BUSY);
        }
        state.holds += 1;
        let number = state.holds;
        state.hold = Some(Hold { number, id });
        Ok(Draining(number))
    }

    /// Waits until what was under way has ended. If that takes too long, nothing is held any more. `None` if the quiesce
    /// was ended meanwhile.
    pub(super) fn drain(&self, draining: Draining, deadline: Instant) -> Option<Result<(), Errno>> {
        let mine = |s: &State| s.hold.is_some_and(|hold| hold.number == draining.0);
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), left, |s| mine(s) && s.io > 0);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !mine(&state) {
            return None;
        }
        if state.io == 0 {
            return Some(Ok(()));
        }
        state.hold = None;
        self.changed.notify_all();
        Some(Err(Errno::TIMEDOUT))
    }

    /// Lets I/O go on if it is held for `id`; says whether it was.
    pub(super) fn release(&self, id: u64) -> bool {
        self.release_if(|hold| hold.id == id)
    }

    /// Lets I/O go on.
    pub(super) fn release_any(&self) {
        self.release_if(|_| true);
    }

    fn release_if(&self, which: impl Fn(&Hold) -> bool) -> bool {
        let mut state = self.lock();
        let held = state.hold.as_ref().is_some_and(which);
        if held {
            state.hold = None;
            self.changed.notify_all();
        }
        held
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
