// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which pages were bounced, and when each moment is over (`protocol.md` section 5.3).
//!
//! A moment must last until the worker has met it: it asks for another page, or it was given a processor after the wake-up
//! and has nothing to do any more. A thread of its own looks for that, so that neither a resolver nor the frontend sleeps. Ending too early costs a
//! copy that nobody needed; the frontend ends late moments by itself.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::origin::Worker;

/// Bytes of a page of the frontend's.
pub(super) const PAGE_BYTES: u64 = 4096;
/// How often open moments are looked at.
const LOOK: Duration = Duration::from_micros(20);
/// For how long a worker that was given a processor and is not idle may still be on its way to fail: it may wait for the
/// lock of the address space. Most often it has gone on to other work.
const GRACE: Duration = Duration::from_millis(20);
/// How long a moment lasts when the kernel does not tell of the worker.
const BLIND: Duration = Duration::from_micros(200);
/// How long it lasts at most, on a host where the worker is not given a processor; the frontend gives it a second.
const LONGEST: Duration = Duration::from_millis(900);

/// A moment that was ordered.
#[derive(Debug)]
pub(super) struct Moment {
    page: u64,
    worker: Arc<Worker>,
    /// How often the worker had run before it was woken.
    runs_before: Option<u64>,
    begin: Instant,
    /// When the worker was first seen to have run.
    ran: Option<Instant>,
    /// Whether it has asked for a page since.
    asked_again: bool,
}

impl Moment {
    fn is_over(&mut self, now: Instant) -> bool {
        let age = now - self.begin;
        let Some(before) = self.runs_before else {
            return age >= BLIND;
        };
        if self.ran.is_none() && self.worker.runs().is_none_or(|runs| runs > before) {
            self.ran = Some(now);
        }
        let met = |ran| now - ran >= GRACE || self.worker.is_idle();
        self.asked_again || age >= LONGEST || self.ran.is_some_and(met)
    }
}

#[derive(Debug, Default)]
struct State {
    open: Vec<Moment>,
    /// Bounced pages of each unit that has a read copy, one bit each.
    tried: HashMap<u64, u64>,
    stopping: bool,
}

/// The bounces of one session.
#[derive(Debug)]
pub(super) struct Bounces {
    unit: u64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Bounces {
    /// For a disk whose read copies are units of `unit` bytes.
    pub(super) fn new(unit: u64) -> Self {
        assert!(
            unit / PAGE_BYTES <= u64::from(u64::BITS),
            "the pages of a unit have a bit each"
        );
        Self {
            unit,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Notes that the page at `offset` is about to be bounced for `worker`, which sleeps. Its moment is to be ordered now,
    /// and then [`Bounces::watch`] is to be told: its end must not be ordered first.
    pub(super) fn begin(&self, offset: u64, worker: Arc<Worker>) -> Moment {
        let (unit, bit) = self.place(offset);
        *self.lock().tried.entry(unit).or_default() |= bit;
        Moment {
            page: offset / PAGE_BYTES * PAGE_BYTES,
            runs_before: worker.runs(),
            worker,
            begin: Instant::now(),
            ran: None,
            asked_again: false,
        }
    }

    /// Sees to the end of a moment that was ordered. One that was refused meanwhile is ended all the same, which does
    /// nothing.
    pub(super) fn watch(&self, moment: Moment) {
        self.lock().open.push(moment);
        self.changed.notify_one();
    }

    /// Notes that the worker `thread` asks for a page: what it was woken for before is behind it.
    pub(super) fn asks_again(&self, thread: u32) {
        // Open moments are looked at all the time: nobody needs to be told.
        for moment in &mut self.lock().open {
            moment.asked_again |= moment.worker.is_thread(thread);
        }
    }

    /// Whether the page at `offset` was bounced since its read copy was made.
    pub(super) fn was_tried(&self, offset: u64) -> bool {
        let (unit, bit) = self.place(offset);
        self.lock().tried.get(&unit).is_some_and(|t| t & bit != 0)
    }

    /// The read copies in `bytes` are gone.
    pub(super) fn forget(&self, bytes: &Range<u64>) {
        let mut state = self.lock();
        let units = bytes.start / self.unit..bytes.end.div_ceil(self.unit);
        if units.end - units.start < u64::try_from(state.tried.len()).unwrap_or(u64::MAX) {
            for unit in units {
                state.tried.remove(&unit);
            }
        } else {
            state.tried.retain(|unit, _| !units.contains(unit));
        }
    }

    /// The moment of the page at `offset` was refused: it is not open.
    pub(super) fn refused(&self, offset: u64) {
        let page = offset / PAGE_BYTES * PAGE_BYTES;
        self.lock().open.retain(|moment| moment.page != page);
    }

    /// The work of the thread, until [`Bounces::stop`]: calls `end` with the offset of each page whose moment is over.
    pub(super) fn work(&self, mut end: impl FnMut(u64)) {
        // The default slack of 50 us would double the length of a moment.
        if let Err(e) = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1)) {
            log::debug!("cannot have exact timers: {e}");
        }
        while let Some(over) = self.next() {
            for page in over {
                end(page);
            }
        }
    }

    /// Waits until moments are over, and takes them out.
    fn next(&self) -> Option<Vec<u64>> {
        let mut state = self.lock();
        loop {
            if state.stopping {
                return None;
            }
            let now = Instant::now();
            let over = state.open.extract_if(.., |moment| moment.is_over(now));
            let over: Vec<u64> = over.map(|moment| moment.page).collect();
            if !over.is_empty() {
                return Some(over);
            }
            state = if state.open.is_empty() {
                self.changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner)
            } else {
                let waited = self.changed.wait_timeout(state, LOOK);
                waited.unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    pub(super) fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    fn place(&self, offset: u64) -> (u64, u64) {
        (offset / self.unit, 1 << (offset % self.unit / PAGE_BYTES))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the state whole before it can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::origin::tests::some_worker;

    #[test]
    fn a_page_counts_as_tried_until_its_read_copy_is_gone() {
        let bounces = Bounces::new(65536);
        let _moment = bounces.begin(5 * 4096 + 1, some_worker());
        assert!(bounces.was_tried(5 * 4096));
        assert!(!bounces.was_tried(6 * 4096) && !bounces.was_tried(65536 + 5 * 4096));
        bounces.forget(&(65536..1 << 30));
        assert!(bounces.was_tried(5 * 4096));
        bounces.forget(&(0..65536));
        assert!(!bounces.was_tried(5 * 4096));
    }

    #[test]
    fn a_moment_ends_when_the_worker_has_run_or_does_not_run_for_too_long() {
        let begin = Instant::now();
        let mut moment = Moment {
            page: 0,
            worker: some_worker(),
            runs_before: Some(u64::MAX),
            begin,
            ran: None,
            asked_again: false,
        };
        assert!(!moment.is_over(begin + BLIND));
        assert!(moment.is_over(begin + LONGEST));
        moment.runs_before = None;
        assert!(!moment.is_over(begin) && moment.is_over(begin + BLIND));
        moment.asked_again = true;
        moment.runs_before = Some(u64::MAX);
        assert!(moment.is_over(begin));
        moment.asked_again = false;
        moment.runs_before = Some(0);
        moment.is_over(begin + BLIND);
        assert!(moment.ran.is_some(), "it has run since");
        assert!(moment.is_over(begin + BLIND + GRACE));
    }

    #[test]
    fn moments_that_are_over_are_ended_once_and_refused_ones_never() {
        let bounces = Bounces::new(65536);
        for page in [4096, 8192] {
            bounces.watch(bounces.begin(page, some_worker()));
        }
        bounces.refused(8192 + 1);
        let mut ended = Vec::new();
        bounces.work(|page| {
            ended.push(page);
            bounces.stop();
        });
        assert_eq!(ended, [4096]);
    }
}
