// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A cut: the frontend's device I/O is held, nobody is at work on a fault, and nothing is mapped any more. Whatever a guest
//! stores from now on is a fault that waits here.
//!
//! The order, and why:
//!
//! 1. QUIESCE: device I/O has pages of the region pinned, which no mapping takes away from it.
//! 2. All claims are waited for, and none is given out (F1): nothing that was decided before the cut is copied or sent
//!    after it (F2). Events are read on, since the frontend sleeps in RESET until that of its move is read (F4).
//! 3. RESET: one `mremap`. A store landed before it, or traps after it. What was noted of the frontend's side is forgotten.
//!
//! Faults that were parked before stay parked: the frontend wakes everybody, who then asks again, and what is asked twice is
//! looked up twice. None is dropped, since one that came after the wake-up would not come again.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pcow_protocol::wire::Quiesced;
use pcow_protocol::{Error, ErrorKind, Result};

use super::Shared;
use super::board::Hold;
use crate::disk::FileKey;

/// How long a frontend may take to say that it has begun to drain its I/O, or to carry out RESET.
const ANSWER: Duration = Duration::from_secs(10);
/// How much later than its own deadline a frontend's QUIESCED may arrive.
const GRACE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    last_id: u64,
    /// What became of the QUIESCE with the last id.
    outcome: Option<u32>,
    over: bool,
}

/// The QUIESCEs of one session.
#[derive(Debug, Default)]
pub(super) struct Quiesces {
    state: Mutex<State>,
    changed: Condvar,
}

impl Quiesces {
    fn begin(&self) -> u64 {
        let mut state = self.lock();
        state.last_id += 1;
        state.outcome = None;
        state.last_id
    }

    /// The frontend's QUIESCED came. A late one of an earlier QUIESCE says nothing.
    pub(super) fn answered(&self, quiesced: &Quiesced) {
        let mut state = self.lock();
        if quiesced.id == state.last_id {
            state.outcome = Some(quiesced.error);
            self.changed.notify_all();
        }
    }

    fn wait(&self, deadline: Instant) -> Result<()> {
        let patience = deadline.saturating_duration_since(Instant::now());
        let pending = |s: &mut State| s.outcome.is_none() && !s.over;
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), patience, pending);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let what = "hold the frontend's device I/O";
        match (state.outcome, state.over) {
            (_, true) => Err(Error::new(ErrorKind::Closed, what)),
            (None, _) => Err(Error::new(ErrorKind::TimedOut, what)),
            (Some(0), _) => Ok(()),
            (Some(errno), _) => {
                let errno = i32::try_from(errno).unwrap_or(libc::EPROTO);
                Err(Error::refused(what, errno))
            }
        }
    }

    /// The session is over: nobody waits any longer.
    pub(super) fn end(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long the steps of a cut took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CutTimes {
    /// Until device I/O was held.
    pub quiesce: Duration,
    /// Until nobody was at work on a fault.
    pub drain: Duration,
    /// Until nothing was mapped.
    pub reset: Duration,
}

/// See above. Dropping it lets everything go on as it was.
#[derive(Debug)]
pub struct Cut {
    times: CutTimes,
    shared: Arc<Shared>,
    quiesce: Option<Quiesce>,
    hold: Option<Hold>,
}

impl Cut {
    /// Makes a cut.
    ///
    /// # Errors
    /// `Refused` if the frontend cannot or will not, or touches of the guest wait for something else; `TimedOut`; `Closed`
    /// if the session ends. Everything goes on as it was, except that a session that leaves a RESET unanswered is ended.
    pub(super) fn make(shared: Arc<Shared>, deadline: Instant) -> Result<Self> {
        if !shared.may_quiesce {
            let what = "hold the frontend's device I/O, which it does not offer";
            return Err(Error::refused(what, libc::EOPNOTSUPP));
        }
        if shared.board.stalled() > 0 {
            let what = "make a cut while the guest waits for something, most often for space";
            return Err(Error::refused(what, libc::EBUSY));
        }
        let mut last = Instant::now();
        let mut step = || std::mem::replace(&mut last, Instant::now()).elapsed();
        let mut cut = Self {
            times: CutTimes::default(),
            quiesce: Some(Quiesce::begin(&shared, deadline)?),
            hold: None,
            shared,
        };
        let shared = &cut.shared;
        shared.quiesces.wait(deadline + GRACE)?;
        cut.times.quiesce = step();
        let hold = shared.board.hold(deadline);
        cut.hold = Some(hold.ok_or_else(|| {
            Error::new(
                ErrorKind::TimedOut,
                "wait for the faults that are under way",
            )
        })?);
        cut.times.drain = step();
        cut.reset()?;
        cut.times.reset = step();
        Ok(cut)
    }

    /// How long it took to make it.
    pub fn times(&self) -> CutTimes {
        self.times
    }

    fn reset(&self) -> Result<()> {
        let s = &self.shared;
        let what = "take the guest's mappings away";
        let Some(errno) = s.channel.reset_and_wait(ANSWER)? else {
            // It may still be carried out, after mappings that would be ordered from now on: nothing would be known of
            // what is mapped. The frontend comes back with nothing mapped.
            let error = || Error::new(ErrorKind::TimedOut, what);
            s.end(Some(error()));
            return Err(error());
        };
        if errno == 0 || errno == libc::EBUSY {
            s.copies.clear();
            s.bounces.forget(&(0..s.disk.size()));
        }
        match errno {
            0 => Ok(()),
            errno => Err(Error::refused(what, errno)),
        }
    }

    /// Goes on, with `layer` as the active layer, which is another one now.
    pub fn go_on_with(mut self, layer: [u8; 16]) {
        let s = Arc::clone(&self.shared);
        // What was prepared ahead went with the sealed layer.
        s.preparer.reset();
        // Before the first fault is answered, so that a refusal is not met there first.
        if let Err(e) = s.channel.register(s.disk.as_ref(), FileKey::Active) {
            s.end((e.kind() != ErrorKind::Closed).then_some(e));
        }
        // Faults are served before I/O goes on: whoever lets it go on may be waiting for one.
        self.hold = None;
        if let Some(quiesce) = self.quiesce.take() {
            quiesce.resume(layer);
        }
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        // In this order, as in `go_on_with`.
        self.hold = None;
        self.quiesce = None;
    }
}

/// The frontend's device I/O is held, or about to be. Dropping it cancels that.
#[derive(Debug)]
struct Quiesce {
    shared: Arc<Shared>,
    id: u64,
    over: bool,
}

impl Quiesce {
    fn begin(shared: &Arc<Shared>, deadline: Instant) -> Result<Self> {
        let id = shared.quiesces.begin();
        let left = deadline.saturating_duration_since(Instant::now());
        let deadline_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
        // From here on it may be held.
        let quiesce = Self {
            shared: Arc::clone(shared),
            id,
            over: false,
        };
        let what = "hold the frontend's device I/O";
        match shared.channel.quiesce_and_wait(id, deadline_ms, ANSWER)? {
            Some(0) => Ok(quiesce),
            Some(errno) => Err(Error::refused(what, errno)),
            None => Err(Error::new(ErrorKind::TimedOut, what)),
        }
    }

    fn resume(mut self, layer: [u8; 16]) {
        self.over = true;
        self.tell(self.shared.channel.resume(self.id, layer));
    }

    fn tell(&self, sent: Result<()>) {
        if let Err(e) = sent {
            self.shared
                .end((e.kind() != ErrorKind::Closed).then_some(e));
        }
    }
}

impl Drop for Quiesce {
    fn drop(&mut self) {
        if !self.over {
            self.tell(self.shared.channel.cancel(self.id));
        }
    }
}
