// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When flushes begin, and when they are late. Knows no clock.

use std::time::{Duration, Instant};

use super::REST;

/// When flushes begin, for nothing to be durable later than an interval after it was stored.
///
/// What is stored when a flush has just begun is durable when the next one ends. So it is the end of a flush that is due an
/// interval after the one before it began.
#[derive(Debug)]
pub(super) struct Schedule {
    interval: Duration,
    /// Since when there may be stores that are not durable: the last complete flush began then. At first, when this was
    /// made: how old what an earlier backend left is nobody knows.
    began: Instant,
    /// When the flush began that has not ended yet.
    under_way: Option<Instant>,
    /// Whether that was said, and has not become untrue since.
    is_late: bool,
}

/// What follows from a flush that has ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Done {
    /// Until the next one begins.
    pub pause: Duration,
    /// Whether that has to be said.
    pub is_in_time_again: bool,
}

impl Schedule {
    /// Nothing was stored before `now`.
    pub(super) fn new(interval: Duration, now: Instant) -> Self {
        Self {
            interval,
            began: now,
            under_way: None,
            is_late: false,
        }
    }

    /// Nothing was stored before `now`. Returns whether it has to be said that flushes are in time again.
    pub(super) fn skip(&mut self, now: Instant) -> bool {
        self.began = now;
        std::mem::take(&mut self.is_late)
    }

    /// A flush begins.
    pub(super) fn begin(&mut self, now: Instant) {
        self.under_way = Some(now);
    }

    /// How long it is at `now` until the flush under way is late; `None` if there is none, or that was said.
    pub(super) fn until_late(&self, now: Instant) -> Option<Duration> {
        self.is_watched()
            .then(|| self.interval.saturating_sub(self.age(now)))
    }

    /// The age of the oldest store that is not durable at `now`, if that has to be said: the flush under way is late, and none
    /// was since flushes were in time.
    pub(super) fn becomes_late(&mut self, now: Instant) -> Option<Duration> {
        let age = self.age(now);
        let becomes_late = self.is_watched() && age > self.interval;
        self.is_late |= becomes_late;
        becomes_late.then_some(age)
    }

    /// The flush under way has ended.
    pub(super) fn done(&mut self, ended: Instant) -> Done {
        let began = self.under_way.take().unwrap_or(ended);
        let is_in_time = self.age(ended) <= self.interval;
        self.began = began;
        Done {
            pause: pause_after(ended.saturating_duration_since(began), self.interval),
            is_in_time_again: is_in_time && std::mem::take(&mut self.is_late),
        }
    }

    fn is_watched(&self) -> bool {
        self.under_way.is_some() && !self.is_late
    }

    /// Of the oldest store that is not durable.
    fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    /// The flush under way failed, as all others will.
    pub(super) fn give_up(&mut self) {
        self.under_way = None;
    }
}

/// Between a flush that took so long and the next one, which may take twice as long, or an eighth of the interval.
pub(super) fn pause_after(took: Duration, interval: Duration) -> Duration {
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
            schedule.begin(now);
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
    fn nothing_is_late_where_nobody_stores() {
        let start = Instant::now();
        let mut schedule = Schedule::new(INTERVAL, start);
        schedule.begin(start);
        let late = start + INTERVAL * 2;
        assert_eq!(schedule.becomes_late(late), Some(INTERVAL * 2));
        assert!(!schedule.done(late).is_in_time_again);
        assert!(schedule.skip(late + REST));
        assert!(!schedule.skip(late + REST * 2));
    }

    #[test]
    fn a_flush_that_hangs_is_late_before_it_ends_and_a_pause_never_is() {
        let start = Instant::now();
        let mut schedule = Schedule::new(INTERVAL, start);
        assert_eq!(schedule.becomes_late(start + INTERVAL * 2), None);
        let begin = start + INTERVAL * 7 / 8;
        let late = start + INTERVAL + Duration::from_millis(1);
        schedule.begin(begin);
        assert_eq!(schedule.becomes_late(begin), None);
        assert_eq!(schedule.until_late(begin), Some(INTERVAL / 8));
        assert_eq!(schedule.becomes_late(late), Some(late - start));
        assert_eq!(schedule.becomes_late(late + INTERVAL), None);
        assert_eq!(schedule.until_late(late), None);
    }
}
