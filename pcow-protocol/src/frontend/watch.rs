// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The helper for moves whose event nobody reads (`protocol.md` section 6, rule 6).
//!
//! A move of registered memory returns when its event was read, which is the backend's work. If the backend died or hangs,
//! this thread reads in its place after [`PATIENCE`]. Reading takes page faults off the backend as well; they are thrown
//! away and raised again by waking the whole region. While no move is late it reads nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::retry_on_intr;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use super::region::GuestRegion;
use crate::error::{Chain, Error, Result};
use crate::uffd::EventBuffer;

/// How long a move may wait for the backend to read its event.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// Zero would disarm the timer.
const AT_ONCE: Duration = Duration::from_nanos(1);

/// How often a late move is looked at while its event has not come.
const POLL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};

const NEVER: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// Watches the moves of one region, for as long as it lives.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    region: Arc<GuestRegion>,
    timer: OwnedFd,
    stop: OwnedFd,
    moving: AtomicBool,
}

/// What the mapping thread holds of a [`Watch`].
#[derive(Clone, Debug)]
pub(super) struct MoveGuard(Arc<Shared>);

impl Watch {
    pub(super) fn start(region: Arc<GuestRegion>) -> Result<Self> {
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )
        .map_err(|e| Error::io("create a timer", e))?;
        let stop =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| Error::io("create an eventfd", e))?;
        let shared = Arc::new(Shared {
            region,
            timer,
            stop,
            moving: AtomicBool::new(false),
        });
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("pcow-watch".into())
            .spawn(move || watched.run())
            .map_err(|e| Error::io("start the watching thread", e))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(super) fn guard(&self) -> MoveGuard {
        MoveGuard(Arc::clone(&self.shared))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Err(errno) = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes()) {
            log::error!("cannot stop the watching thread: {errno}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the watching thread panicked");
        }
    }
}

impl MoveGuard {
    /// Runs a move under the watch.
    pub(super) fn during<R>(&self, work: impl FnOnce() -> R) -> R {
        self.within(PATIENCE, work)
    }

    /// Runs a move while there is no backend, so that the event is read here at once.
    pub(super) fn alone<R>(&self, work: impl FnOnce() -> R) -> R {
        self.within(AT_ONCE, work)
    }

    fn within<R>(&self, patience: Duration, work: impl FnOnce() -> R) -> R {
        self.0.moving.store(true, Ordering::SeqCst);
        self.0.set_timer(patience);
        let result = work();
        self.0.moving.store(false, Ordering::SeqCst);
        self.0.set_timer(Duration::ZERO);
        result
    }
}

impl Shared {
    fn run(&self) {
        while self.wait_for_late_move() {
            if let Err(error) = self.help() {
                log::error!(
                    "cannot read the userfaultfd in the backend's place: {}",
                    Chain(&error)
                );
            }
        }
    }

    /// Waits for the timer; false when it is time to stop.
    fn wait_for_late_move(&self) -> bool {
        let mut fds = [
            PollFd::new(&self.stop, PollFlags::IN),
            PollFd::new(&self.timer, PollFlags::IN),
        ];
        let ready = retry_on_intr(|| poll(&mut fds, None));
        let stop = ready.is_err() || !fds[0].revents().is_empty();
        // What the timer counted is of no interest, and it may have been disarmed since.
        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
        !stop
    }

    /// Reads events until the move is over, then wakes everybody whose page fault was thrown away.
    fn help(&self) -> Result<()> {
        let mut buffer = EventBuffer::default();
        let mut taken = 0;
        while self.moving.load(Ordering::SeqCst) {
            self.wait_for_event()?;
            taken += self.region.uffd().read_events(&mut buffer)?.count();
        }
        if taken > 0 {
            log::debug!("read {taken} events in the backend's place");
            self.region.wake_all()?;
        }
        Ok(())
    }

    fn wait_for_event(&self) -> Result<()> {
        let mut fds = [PollFd::from_borrowed_fd(
            self.region.uffd().as_fd(),
            PollFlags::IN,
        )];
        retry_on_intr(|| poll(&mut fds, Some(&POLL)))
            .map_err(|e| Error::io("wait for an event", e))?;
        Ok(())
    }

    /// Arms the timer, or with zero disarms it.
    fn set_timer(&self, after: Duration) {
        let it_value = Timespec::try_from(after).expect("a second fits");
        let spec = Itimerspec {
            it_interval: NEVER,
            it_value,
        };
        if let Err(errno) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            log::error!("cannot set the timer of the watching thread: {errno}");
        }
    }
}
