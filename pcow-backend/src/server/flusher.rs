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
    progress: Arc<Progress>,
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
        let progress = Arc::new(Progress::new(interval));
        let (until, made) = (Arc::clone(&end), Arc::clone(&progress));
        let thread = std::thread::Builder::new()
            .name("flush".into())
            .spawn(move || work(&offer, interval, &until, &made))
            .map_err(|e| Failure::new("cannot start a thread").caused_by(&e))?;
        Ok(Self {
            end,
            progress,
            thread: Some(thread),
        })
    }

    /// Says so if a flush that is under way is late by now. The thread itself waits for storage, which may hang.
    pub(super) fn watch(&self) {
        self.progress.watch(Instant::now());
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

fn work(offer: &Offer, interval: Duration, end: &End, progress: &Progress) {
    let is_kept = || offer.disk.lock().is_none();
    let mut patience = if is_kept() {
        Duration::ZERO
    } else {
        pause_after(Duration::ZERO, interval)
    };
    while !end.comes_within(patience) {
        let began = Instant::now();
        if !offer.place.was_taken() && !is_kept() {
            progress.skip(began);
            patience = pause_after(Duration::ZERO, interval);
            continue;
        }
        progress.begin(began);
        // It is told there, and every later flush fails, too.
        if offer.flush().is_err() {
            progress.give_up();
            return;
        }
        log::debug!("flushed by itself");
        patience = progress.end(Instant::now());
    }
}

/// The [`Schedule`], with a log.
#[derive(Debug)]
struct Progress(Mutex<Schedule>);

impl Progress {
    fn new(interval: Duration) -> Self {
        Self(Mutex::new(Schedule::new(interval, Instant::now())))
    }

    fn skip(&self, now: Instant) {
        self.lock().skip(now);
    }

    fn begin(&self, now: Instant) {
        self.lock().under_way = Some(now);
    }

    fn give_up(&self) {
        self.lock().under_way = None;
    }

    fn watch(&self, now: Instant) {
        let mut schedule = self.lock();
        let became_late = schedule.becomes_late(now);
        Self::tell(&schedule, became_late);
    }

    /// Returns the time until the next flush.
    fn end(&self, now: Instant) -> Duration {
        let mut schedule = self.lock();
        let became_late = schedule.becomes_late(now);
        Self::tell(&schedule, became_late);
        let done = schedule.done(now);
        if done.is_in_time_again {
            log::info!("flushing is in time again");
        }
        done.pause
    }

    fn tell(schedule: &Schedule, became_late: Option<Duration>) {
        if let Some(age) = became_late {
            log::warn!(
                "flushing is slow: what was stored {:.1} s ago was not durable yet, and --flush-interval is {} s",
                age.as_secs_f32(),
                schedule.interval.as_secs()
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, Schedule> {
        // Nobody panics while it is half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When flushes begin, for nothing to be durable later than an interval after it was stored.
///
/// What is stored when a flush has just begun is durable when the next one ends. So it is the end of a flush that is due an
/// interval after the one before it began.
#[derive(Debug)]
struct Schedule {
    interval: Duration,
    /// When the last complete flush began: what was stored before is durable.
    began: Instant,
    /// When the flush began that has not ended yet.
    under_way: Option<Instant>,
    is_late: bool,
}

/// What follows from a flush that has ended.
#[derive(Debug, PartialEq, Eq)]
struct Done {
    /// Until the next one begins.
    pause: Duration,
    is_in_time_again: bool,
}

impl Schedule {
    /// Nothing was stored before `now`.
    fn new(interval: Duration, now: Instant) -> Self {
        Self {
            interval,
            began: now,
            under_way: None,
            is_late: false,
        }
    }

    /// Nothing was stored before `now`.
    fn skip(&mut self, now: Instant) {
        *self = Self::new(self.interval, now);
    }

    /// The age of the oldest store that is not durable at `now`, if the flush under way has not been late until now.
    fn becomes_late(&mut self, now: Instant) -> Option<Duration> {
        let age = now.saturating_duration_since(self.began);
        if self.is_late || self.under_way.is_none() || age <= self.interval {
            return None;
        }
        self.is_late = true;
        Some(age)
    }

    /// The flush under way has ended.
    fn done(&mut self, ended: Instant) -> Done {
        let began = self.under_way.take().unwrap_or(ended);
        let is_in_time = ended - self.began <= self.interval;
        self.began = began;
        Done {
            pause: pause_after(ended - began, self.interval),
            is_in_time_again: is_in_time && std::mem::take(&mut self.is_late),
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

    /// What a flush came to.
    #[derive(Debug)]
    struct Flush {
        /// Of the oldest store that was not durable just before it ended.
        age: Duration,
        became_late: bool,
        done: Done,
    }

    /// Flushes that take so many milliseconds each, one after the other.
    fn flushes(milliseconds: &[u64]) -> Vec<Flush> {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(INTERVAL, now);
        now += pause_after(Duration::ZERO, INTERVAL);
        let flushes = milliseconds.iter().map(|took| {
            schedule.under_way = Some(now);
            now += Duration::from_millis(*took);
            let age = now - schedule.began;
            let became_late = schedule.becomes_late(now).is_some();
            let done = schedule.done(now);
            now += done.pause;
            Flush {
                age,
                became_late,
                done,
            }
        });
        flushes.collect()
    }

    #[test]
    fn nothing_is_older_than_the_interval_though_a_flush_takes_twice_as_long_as_the_last() {
        let flushes = flushes(&[
            600, 0, 600, 1200, 2400, 2495, 2495, 100, 600, 1200, 0, 0, 600,
        ]);
        for flush in &flushes {
            assert!(flush.age <= INTERVAL && !flush.became_late, "{flush:?}");
        }
    }

    #[test]
    fn the_interval_is_used() {
        for flush in flushes(&[0, 10, 100, 10, 0]) {
            assert!(flush.age >= INTERVAL * 7 / 8, "{flush:?}");
        }
    }

    #[test]
    fn that_it_is_late_is_said_once_until_it_is_in_time_again() {
        let flushes = flushes(&[0, 3000, 3000, 3000, 2000, 2000, 3001]);
        let late: Vec<bool> = flushes.iter().map(|f| f.became_late).collect();
        assert_eq!(late, [false, true, false, false, false, false, true]);
        let again = flushes.iter().map(|f| f.done.is_in_time_again);
        let again: Vec<bool> = again.collect();
        assert_eq!(again, [false, false, false, false, false, true, false]);
        assert!(flushes[1..4].iter().all(|f| f.done.pause == REST));
    }

    #[test]
    fn a_flush_that_hangs_is_late_before_it_ends_and_a_pause_never_is() {
        let start = Instant::now();
        let mut schedule = Schedule::new(INTERVAL, start);
        assert_eq!(schedule.becomes_late(start + INTERVAL * 2), None);
        schedule.under_way = Some(start + INTERVAL);
        assert_eq!(schedule.becomes_late(start + INTERVAL), None);
        let late = start + INTERVAL + Duration::from_millis(1);
        assert_eq!(schedule.becomes_late(late), Some(late - start));
        assert_eq!(schedule.becomes_late(late + INTERVAL), None);
    }
}
