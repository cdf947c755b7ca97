// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flushes in time, in a thread of its own: no frontend waits for the storage to be attached, or attached again. Another one
//! watches it, and says so if what is stored is not durable in time: storage may be slow, or hang.
//!
//! A guest stores into what was mapped into it whether it has a session or not. So flushes are due from when a frontend was
//! attached, or, if one had the image when this began, from then on: it may end before it is back. And one is due at once,
//! since nobody knows what was stored before: a backend and its guest may have ended together.

mod schedule;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::connection::Offer;
use crate::failure::Failure;
use crate::server::Quit;
use schedule::Schedule;

/// Least time between two flushes. Whoever else wants to flush, as a guest with virtio-pmem does, waits for the one under way:
/// they are woken as it ends, and go first.
const REST: Duration = Duration::from_millis(10);

/// The threads. They end when this is dropped, after a flush that is under way.
#[derive(Debug)]
pub(super) struct Flusher {
    shared: Arc<Shared>,
    worker: Thread,
    watcher: Thread,
}

/// A thread that is joined once.
#[derive(Debug)]
struct Thread(Option<JoinHandle<()>>);

/// What all of them see.
#[derive(Debug)]
struct Shared {
    offer: Arc<Offer>,
    quit: Arc<Quit>,
    interval: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    schedule: Schedule,
    /// What the watcher has to say, in this order.
    news: Vec<News>,
    /// Whether no other flush is to begin by itself.
    is_ending: bool,
    /// Whether there is nothing left to watch.
    is_over: bool,
}

/// What is said of flushes.
#[derive(Debug, Clone, Copy)]
enum News {
    /// The age of what was stored and was not durable.
    Late(Duration),
    InTimeAgain,
}

impl Flusher {
    /// Flushes what `offer` serves. Asks for the end if the first flush fails while nobody has the image.
    ///
    /// # Errors
    /// If there is no thread left.
    pub(super) fn start(
        offer: Arc<Offer>,
        quit: Arc<Quit>,
        interval: Duration,
    ) -> Result<Self, Failure> {
        // Before anybody is served, or it might have come back already.
        let is_kept = offer.disk.lock().is_none();
        let shared = Arc::new(Shared {
            offer,
            quit,
            interval,
            state: Mutex::new(State {
                schedule: Schedule::new(interval, Instant::now()),
                news: Vec::new(),
                is_ending: false,
                is_over: false,
            }),
            changed: Condvar::new(),
        });
        let mut flusher = Self {
            shared: Arc::clone(&shared),
            worker: Thread(None),
            watcher: Thread(None),
        };
        // If the second one cannot start, the first one ends as this is dropped.
        let watched = Arc::clone(&shared);
        flusher.watcher = Thread::start("flush-watch", move || watched.watch())?;
        flusher.worker = Thread::start("flush", move || shared.work(is_kept))?;
        Ok(flusher)
    }

    /// Flushes once more, and no more. What was stored before is durable then.
    ///
    /// # Errors
    /// As [`Offer::flush`].
    pub(super) fn end(mut self) -> pcow_format::Result<()> {
        self.end_work();
        self.shared.flush().map(drop)
    }

    fn end_work(&mut self) {
        self.shared.change(|state| state.is_ending = true);
        self.worker.join();
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.end_work();
        self.shared.change(|state| state.is_over = true);
        self.watcher.join();
    }
}

impl Thread {
    fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<Self, Failure> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(work);
        thread
            .map(|thread| Self(Some(thread)))
            .map_err(|e| Failure::new("cannot start a thread").caused_by(&e))
    }

    fn join(&mut self) {
        if self.0.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("a thread that flushes panicked");
        }
    }
}

impl Shared {
    fn work(&self, is_kept: bool) {
        let (mut is_first, mut is_used) = (true, is_kept);
        let mut patience = Duration::ZERO;
        while !self.ends_within(patience) {
            // Each time: so the lock is taken that a frontend leaves which does not come back.
            let _ = self.offer.disk.lock();
            let looked = Instant::now();
            is_used |= self.offer.place.was_taken();
            if !(is_first || is_used) {
                self.change(|state| {
                    if state.schedule.skip(looked) {
                        state.news.push(News::InTimeAgain);
                    }
                });
                patience = schedule::pause_after(Duration::ZERO, self.interval);
                continue;
            }
            // A failure is told there, and every later flush fails, too.
            let Ok(pause) = self.flush() else {
                if is_first && !is_used && self.offer.place.close() {
                    // As if it had not been opened, since it cannot be any more: nobody is to find out by losing something.
                    log::error!("nobody has the image, and nothing would be durable: ending");
                    self.quit.ask();
                }
                return;
            };
            log::debug!("flushed by itself");
            (patience, is_first) = (pause, false);
        }
    }

    /// Returns the time until the next flush.
    fn flush(&self) -> pcow_format::Result<Duration> {
        self.change(|state| state.schedule.begin(Instant::now()));
        if let Err(e) = self.offer.flush() {
            self.change(|state| state.schedule.give_up());
            return Err(e);
        }
        let done = self.change(|state| {
            let now = Instant::now();
            // The watcher may not have been in time itself.
            state.note_late(now);
            let done = state.schedule.done(now);
            if done.is_in_time_again {
                state.news.push(News::InTimeAgain);
            }
            done
        });
        Ok(done.pause)
    }

    /// Says so when a flush is late, and when they are in time again.
    fn watch(&self) {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            state.note_late(now);
            let news = std::mem::take(&mut state.news);
            if !news.is_empty() {
                // Not under the lock: whoever reads the log may be slow, too.
                drop(state);
                news.iter().for_each(|news| self.say(*news));
                state = self.lock();
            } else if state.is_over {
                return;
            } else if let Some(patience) = state.schedule.until_late(now) {
                let waited = self.changed.wait_timeout(state, patience);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            } else {
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn say(&self, news: News) {
        match news {
            News::Late(age) => log::warn!(
                "flushing is slow: what was stored {:.1} s ago was not durable yet, and --flush-interval is {} s",
                age.as_secs_f32(),
                self.interval.as_secs()
            ),
            News::InTimeAgain => log::info!("flushing is in time again"),
        }
    }

    /// Whether the end of the work is wanted within `patience`.
    fn ends_within(&self, patience: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), patience, |state| !state.is_ending);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_ending
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nobody panics while it is half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn note_late(&mut self, now: Instant) {
        let late = self.schedule.becomes_late(now);
        self.news.extend(late.map(News::Late));
    }
}
