// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How much memory the read copies take, and which go first when there are too many.
//!
//! Read copies are pages of the frontend's process (they count in its memory cgroup), so their number is bounded. The
//! kernel does not tell which are used; the oldest goes first.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many are evicted at a time.
const BATCH: usize = 64;
/// How often a waiting thread looks whether the session is over.
const PATIENCE: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
struct State {
    /// Age of each unit that is there or being made.
    present: HashMap<u64, u64>,
    order: VecDeque<(u64, u64)>,
    clock: u64,
    /// Units whose eviction was sent and not answered yet.
    leaving: usize,
}

/// The read copies of one session, in units.
#[derive(Debug)]
pub struct ReadCopies {
    unit: u64,
    max_units: usize,
    state: Mutex<State>,
    changed: Condvar,
}

impl ReadCopies {
    /// At most `max_bytes` in units of `unit` bytes.
    pub fn new(unit: u64, max_bytes: u64) -> Self {
        Self {
            unit,
            max_units: usize::try_from(max_bytes / unit)
                .unwrap_or(usize::MAX)
                .max(1),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Counts the unit at `offset` in. Returns false if something else must go first: then see
    /// [`ReadCopies::victims`] and [`ReadCopies::wait`].
    pub fn admit(&self, offset: u64) -> bool {
        let mut state = self.lock();
        let unit = offset / self.unit;
        if state.present.contains_key(&unit) {
            return true;
        }
        if state.present.len() + state.leaving >= self.max_units {
            return false;
        }
        state.clock += 1;
        let age = state.clock;
        state.present.insert(unit, age);
        state.order.push_back((unit, age));
        true
    }

    /// The oldest units, as byte ranges. They count as leaving until [`ReadCopies::left`].
    pub fn victims(&self) -> Vec<Range<u64>> {
        let mut state = self.lock();
        let wanted = BATCH.min(self.max_units.div_ceil(4));
        let mut victims = Vec::new();
        while victims.len() + state.leaving < wanted {
            let Some((unit, age)) = state.order.pop_front() else {
                break;
            };
            if state.present.get(&unit) == Some(&age) {
                state.present.remove(&unit);
                victims.push(unit * self.unit..(unit + 1) * self.unit);
            }
        }
        state.leaving += victims.len();
        victims
    }

    /// A victim could not be evicted now, since somebody is at work there.
    pub fn stays(&self, bytes: &Range<u64>) {
        let mut state = self.lock();
        state.leaving -= 1;
        state.clock += 1;
        let (unit, age) = (bytes.start / self.unit, state.clock);
        state.present.insert(unit, age);
        state.order.push_back((unit, age));
    }

    /// A victim's memory is free.
    pub fn left(&self) {
        let mut state = self.lock();
        state.leaving = state.leaving.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Waits a moment for memory to become free.
    pub fn wait(&self) {
        let state = self.lock();
        if state.leaving > 0 {
            drop(self.changed.wait_timeout(state, PATIENCE));
        }
    }

    /// What was in `bytes` is gone: a mapping stands there now. A unit of which only a part is gone goes on counting.
    pub fn forget(&self, bytes: &Range<u64>) {
        let mut state = self.lock();
        let units = bytes.start.div_ceil(self.unit)..bytes.end / self.unit;
        if units.end.saturating_sub(units.start)
            < u64::try_from(state.present.len()).unwrap_or(u64::MAX)
        {
            for unit in units {
                state.present.remove(&unit);
            }
        } else {
            state.present.retain(|unit, _| !units.contains(unit));
        }
        if state.order.len() > 2 * state.present.len() + BATCH {
            let State { present, order, .. } = &mut *state;
            order.retain(|(unit, age)| present.get(unit) == Some(age));
        }
        self.changed.notify_all();
    }

    /// All of them are gone.
    pub fn clear(&self) {
        let mut state = self.lock();
        state.present.clear();
        state.order.clear();
        self.changed.notify_all();
    }

    /// The unit at `offset` was counted in, but nothing was copied.
    pub fn cancel(&self, offset: u64) {
        let start = offset / self.unit * self.unit;
        self.forget(&(start..start + self.unit));
    }

    /// Bytes that read copies take now.
    pub fn bytes(&self) -> u64 {
        let state = self.lock();
        u64::try_from(state.present.len() + state.leaving).unwrap_or(u64::MAX) * self.unit
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the state whole before it can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first_and_its_memory_counts_until_it_has_left() {
        let copies = ReadCopies::new(10, 40);
        for i in 0..4 {
            assert!(copies.admit(i * 10));
        }
        assert!(copies.admit(5), "already there");
        assert!(!copies.admit(40));
        assert_eq!(copies.victims(), vec![0..10]);
        assert!(!copies.admit(40), "still leaving");
        copies.left();
        assert!(copies.admit(40));
        assert_eq!(copies.bytes(), 40);
    }

    #[test]
    fn what_was_mapped_over_counts_no_more() {
        let copies = ReadCopies::new(10, 40);
        copies.admit(0);
        copies.admit(10);
        copies.forget(&(5..15));
        assert_eq!(copies.bytes(), 20);
        copies.forget(&(0..1000));
        assert_eq!(copies.bytes(), 0);
        assert_eq!(copies.victims(), []);
    }

    #[test]
    fn a_victim_with_somebody_at_work_in_it_becomes_the_youngest() {
        let copies = ReadCopies::new(10, 20);
        copies.admit(0);
        copies.admit(10);
        let victim = copies.victims().remove(0);
        copies.stays(&victim);
        assert_eq!(copies.victims(), vec![10..20]);
        assert_eq!(copies.bytes(), 20);
    }
}
