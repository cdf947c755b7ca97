// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which pages were bounced, and when each moment is over (`protocol.md` section 5.3).
//!
//! A moment must last until the worker has met it: it asks for another page, or it was given a processor after the wake-up
//! and has nothing to do any more. A thread of its own looks for that, so that neither a resolver nor the frontend sleeps. Ending too early costs a
//! copy that nobody needed; the frontend ends late moments by itself.
//!
//! A request for a page that arrives while its moment is open was made before that: in the moment, no worker gets so far.
//! Nobody knows of it whether it is a store. It comes from another vCPU's worker, or from the same one, which had not gone to
//! sleep yet when the read copy was installed and so asked for a second time. It is bounced like the first.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::origin::{Share, Worker};

/// Bytes of a page of the frontend's.
pub(super) const PAGE_BYTES: u64 = 4096;
/// How often open moments are looked at.
const LOOK: Duration = Duration::from_micros(20);
/// How much of a processor's time a worker has had at most when it fails. It needs some microseconds; the kernel counts in
/// ticks, and a hypervisor below may take as many away. One that has had more has gone on to other work.
const GRACE: Duration = Duration::from_millis(20);
/// How long a moment lasts when the kernel does not tell of the worker.
const BLIND: Duration = Duration::from_micros(200);
/// How often a page is bounced again for requests in its moment. They are older than the moment, unless the frontend has
/// ended it by itself: then it is a store that comes again and again.
const MOST_AGAIN: u32 = 3;
/// How long it lasts at most, on a host where the worker is not given a processor; the frontend gives it a second.
const LONGEST: Duration = Duration::from_millis(900);

/// A moment that was ordered.
#[derive(Debug)]
pub(super) struct Moment {
    page: u64,
    worker: Arc<Worker>,
    /// What the worker had of the processors before it was woken.
    before: Option<Share>,
    begin: Instant,
    /// Whether it has asked for another page since.
    asked_again: bool,
    /// How often the page was bounced again.
    again: u32,
}

impl Moment {
    fn is_over(&self, now: Instant) -> bool {
        let age = now - self.begin;
        let Some(before) = self.before else {
            return age >= BLIND;
        };
        self.asked_again || age >= LONGEST || self.was_met(before)
    }

    fn was_met(&self, before: Share) -> bool {
        // Gone: it has nothing to do any more.
        let Some(now) = self.worker.share() else {
            return true;
        };
        // A bounce before this one may have woken it already, and it may have run to its end before this one began.
        let ran = now.runs > before.runs || self.again > 0;
        ran && (now.time.saturating_sub(before.time) >= GRACE || self.worker.is_idle())
    }
}

fn page_of(offset: u64) -> u64 {
    offset / PAGE_BYTES * PAGE_BYTES
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
        let page = page_of(offset);
        let mut state = self.lock();
        *state.tried.entry(unit).or_default() |= bit;
        // Its end must not come in the new moment.
        let open = state.open.extract_if(.., |moment| moment.page == page);
        let again = open.map(|moment| moment.again + 1).max().unwrap_or(0);
        drop(state);
        Moment {
            page,
            before: worker.share(),
            worker,
            begin: Instant::now(),
            asked_again: false,
            again,
        }
    }

    /// Sees to the end of a moment that was ordered. One that was refused meanwhile is ended all the same, which does
    /// nothing.
    pub(super) fn watch(&self, moment: Moment) {
        self.lock().open.push(moment);
        self.changed.notify_one();
    }

    /// Notes that the worker `thread` asks for the page at `offset`: what it was woken for before is behind it, unless that
    /// is the same page.
    pub(super) fn asks_again(&self, thread: u32, offset: u64) {
        let page = page_of(offset);
        // Open moments are looked at all the time: nobody needs to be told.
        for moment in &mut self.lock().open {
            moment.asked_again |= moment.page != page && moment.worker.thread() == thread;
        }
    }

    /// Whether a request for the page at `offset`, which has a read copy, is a store: the page was bounced since the copy was
    /// made, and its moment is over.
    pub(super) fn is_store(&self, offset: u64) -> bool {
        let (unit, bit) = self.place(offset);
        let page = page_of(offset);
        let state = self.lock();
        let tried = state.tried.get(&unit).is_some_and(|t| t & bit != 0);
        let older = |moment: &Moment| moment.page == page && moment.again < MOST_AGAIN;
        tried && !state.open.iter().any(older)
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
        let page = page_of(offset);
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
    fn a_request_after_a_bounce_is_a_store_until_the_read_copy_is_gone() {
        let bounces = Bounces::new(65536);
        let _moment = bounces.begin(5 * 4096 + 1, some_worker());
        assert!(bounces.is_store(5 * 4096));
        assert!(!bounces.is_store(6 * 4096) && !bounces.is_store(65536 + 5 * 4096));
        bounces.forget(&(65536..1 << 30));
        assert!(bounces.is_store(5 * 4096));
        bounces.forget(&(0..65536));
        assert!(!bounces.is_store(5 * 4096));
    }

    #[test]
    fn a_request_in_the_moment_is_no_store_unless_it_comes_again_and_again() {
        let bounces = Bounces::new(65536);
        bounces.watch(bounces.begin(4096, some_worker()));
        for _ in 0..MOST_AGAIN {
            assert!(!bounces.is_store(4096));
            bounces.watch(bounces.begin(4096, some_worker()));
            assert_eq!(bounces.lock().open.len(), 1);
        }
        assert!(bounces.is_store(4096));
    }

    #[test]
    fn a_worker_that_asks_for_the_same_page_has_not_met_the_moment() {
        let bounces = Bounces::new(65536);
        let worker = some_worker();
        let thread = worker.thread();
        bounces.watch(bounces.begin(4096, worker));
        bounces.asks_again(thread, 4096 + 8);
        bounces.asks_again(thread + 1, 8192);
        assert!(!bounces.lock().open[0].asked_again);
        bounces.asks_again(thread, 8192);
        assert!(bounces.lock().open[0].asked_again);
    }

    #[test]
    fn a_moment_ends_when_the_worker_has_run_or_does_not_run_for_too_long() {
        let worker = some_worker();
        let begin = Instant::now();
        let after = |runs, time| Moment {
            page: 0,
            worker: Arc::clone(&worker),
            before: Some(Share { time, runs }),
            begin,
            asked_again: false,
            again: 0,
        };
        // Of more runs than it has had, none can be seen.
        let mut moment = after(u64::MAX, Duration::ZERO);
        assert!(!moment.is_over(begin + BLIND) && moment.is_over(begin + LONGEST));
        moment.asked_again = true;
        assert!(moment.is_over(begin));
        moment.before = None;
        moment.asked_again = false;
        assert!(!moment.is_over(begin) && moment.is_over(begin + BLIND));
        let had = worker.share().unwrap();
        let moment = after(0, had.time);
        // One that has work now has none a moment later.
        while !moment.is_over(begin) {
            std::thread::yield_now();
        }
        if let Some(less) = had.time.checked_sub(GRACE) {
            assert!(after(0, less).is_over(begin));
        }
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
