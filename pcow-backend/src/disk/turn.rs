// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Something that is done by one at a time: for as long as it takes, or briefly. Who is brief goes first, since others wait for
//! that, and need not wait for ever.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

#[derive(Debug, Default)]
pub(super) struct Turn {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_taken: bool,
    /// How many wait for it who are brief.
    brief: usize,
}

/// Gives the turn back when dropped.
#[derive(Debug)]
pub(super) struct Taken<'a>(&'a Turn);

impl Turn {
    /// Waits until nobody has it or waits for it who is brief, and takes it.
    pub(super) fn take(&self) -> Taken<'_> {
        let free = self
            .changed
            .wait_while(self.lock(), |state| state.is_taken || state.brief > 0);
        free.unwrap_or_else(PoisonError::into_inner).is_taken = true;
        Taken(self)
    }

    /// Waits until nobody has it, and takes it.
    pub(super) fn take_briefly(&self) -> Taken<'_> {
        let mut state = self.lock();
        state.brief += 1;
        let free = self.changed.wait_while(state, |state| state.is_taken);
        let mut state = free.unwrap_or_else(PoisonError::into_inner);
        state.brief -= 1;
        state.is_taken = true;
        Taken(self)
    }

    /// As [`Turn::take_briefly`], but does not wait after `deadline`; `None` if somebody has it then.
    pub(super) fn take_briefly_by(&self, deadline: Instant) -> Option<Taken<'_>> {
        let patience = deadline.saturating_duration_since(Instant::now());
        let mut state = self.lock();
        state.brief += 1;
        let waited = self
            .changed
            .wait_timeout_while(state, patience, |state| state.is_taken);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.brief -= 1;
        if state.is_taken {
            // Who waited for it only because of this one finds it as it is.
            return None;
        }
        state.is_taken = true;
        Some(Taken(self))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing can panic while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.lock().is_taken = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::Turn;

    #[test]
    fn who_is_brief_goes_first_and_need_not_wait_for_ever() {
        let turn = Turn::default();
        let long = turn.take();
        assert!(turn.take_briefly_by(Instant::now()).is_none());
        let (sooner, order) = mpsc::channel();
        let (later, turn) = (sooner.clone(), &turn);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let _long = turn.take();
                later.send("long").unwrap();
            });
            scope.spawn(move || {
                let _brief = turn.take_briefly();
                sooner.send("brief").unwrap();
            });
            while turn.lock().brief == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            drop(long);
        });
        assert_eq!(order.iter().collect::<Vec<_>>(), ["brief", "long"]);
        assert!(turn.take_briefly_by(Instant::now()).is_some());
    }
}
