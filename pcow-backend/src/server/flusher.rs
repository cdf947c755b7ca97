// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flushes in time, in a thread of its own: no frontend waits for the storage to be attached, or attached again.
//!
//! A guest stores into what was mapped into it whether it has a session or not. So flushes are due once a frontend has been
//! attached, while one has the image that has not come back yet, and at once if one was found so: nobody has flushed since its
//! backend ended.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::connection::Offer;
use crate::failure::Failure;

/// Least time between two flushes. Whoever else wants to flush, as a guest with virtio-pmem does, waits for the one under way:
/// they are woken as it ends, and go first.
const REST: Duration = Duration::from_millis(10);

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
    let mut schedule = Schedule::new(interval, Instant::now());
    let mut patience = if is_kept() {
        Duration::ZERO
    } else {
        pause_after(Duration::ZERO, interval)
    };
    while !end.comes_within(patience) {
        let began = Instant::now();
        if !offer.place.was_taken() && !is_kept() {
            schedule = Schedule::new(interval, began);
            patience = pause_after(Duration::ZERO, interval);
            continue;
        }
        // It is told there, and every later flush fails, too.
        if offer.flush().is_err() {
            return;
        }
        log::debug!("flushed by itself");
        let done = schedule.done(began, Instant::now());
        if done.has_become_late {
            log::warn!(
                "flushing is slow: what was stored {:.1} s ago was not durable yet, and --flush-interval is {} s",
                done.age.as_secs_f32(),
                interval.as_secs()
            );
        }
        patience = done.pause;
    }
}

/// When flushes begin, for nothing to be durable later than an interval after it was stored.
///
/// What is stored when a flush has just begun is durable when the next one ends. So it is the end of a flush that is due an
/// interval after the one before it began.
#[derive(Debug)]
struct Schedule {
    interval: Duration,
    /// When the last flush began: what was stored before is durable.
    began: Instant,
    is_late: bool,
}

/// What follows from a flush that has ended.
#[derive(Debug, PartialEq, Eq)]
struct Done {
    /// Until the next one begins.
    pause: Duration,
    /// Of the oldest store that was not durable just before this one ended.
    age: Duration,
    /// Whether that is more than an interval, and was not the last time.
    has_become_late: bool,
}

impl Schedule {
    /// Nothing was stored before `now`.
    fn new(interval: Duration, now: Instant) -> Self {
        Self {
            interval,
            began: now,
            is_late: false,
        }
    }

    fn done(&mut self, began: Instant, ended: Instant) -> Done {
        let (took, age) = (ended - began, ended - self.began);
        let was_late = std::mem::replace(&mut self.is_late, age > self.interval);
        self.began = began;
        Done {
            pause: pause_after(took, self.interval),
            age,
            has_become_late: self.is_late && !was_late,
        }
    }
}

/// Between a flush that took so long and the next one, which may take twice as long, or an eighth of the interval.
fn pause_after(took: Duration, interval: Duration) -> Duration {
    interval
        .saturating_sub(took + (took * 2).max(interval / 8))
        .max(REST)
}

#[cfg(test)]
mod tests {
    use super::{Done, REST, Schedule, pause_after};
    use std::time::{Duration, Instant};

    const INTERVAL: Duration = Duration::from_secs(5);

    /// Flushes that take so many milliseconds each, one after the other.
    fn flushes(milliseconds: &[u64]) -> Vec<Done> {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(INTERVAL, now);
        now += pause_after(Duration::ZERO, INTERVAL);
        let flushes = milliseconds.iter().map(|took| {
            let began = now;
            now += Duration::from_millis(*took);
            let done = schedule.done(began, now);
            now += done.pause;
            done
        });
        flushes.collect()
    }

    #[test]
    fn nothing_is_older_than_the_interval_though_a_flush_takes_twice_as_long_as_the_last() {
        let done = flushes(&[
            600, 0, 600, 1200, 2400, 2495, 2495, 100, 600, 1200, 0, 0, 600,
        ]);
        for done in &done {
            assert!(done.age <= INTERVAL && !done.has_become_late, "{done:?}");
        }
    }

    #[test]
    fn the_interval_is_used() {
        for done in flushes(&[0, 10, 100, 10, 0]) {
            assert!(done.age >= INTERVAL * 7 / 8, "{done:?}");
        }
    }

    #[test]
    fn that_it_is_late_is_said_once_until_it_is_in_time_again() {
        let done = flushes(&[0, 3000, 3000, 3000, 2000, 2000, 3001]);
        let late: Vec<bool> = done.iter().map(|d| d.has_become_late).collect();
        assert_eq!(late, [false, true, false, false, false, false, true]);
        assert!(done[1..4].iter().all(|d| d.pause == REST));
    }
}
