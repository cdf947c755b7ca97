// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What others may ask of a running service, for as long as it runs: figures, and that what was only read is given back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use pcow_protocol::Result;
use pcow_protocol::wire::Quiesced;

use super::cut::Cut;
use super::{Counters, Shared, reclaim};

/// A way to reach the service of the attached frontend. The default one reaches nobody.
#[derive(Debug, Clone, Default)]
pub struct Handle(Weak<Shared>);

/// How the backend tells loads from stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The kernel says what each touch is, so far.
    Exact,
    /// KVM's workers ask for write access even for loads: told apart by BOUNCE.
    Bounce,
    /// They do, and the frontend has no BOUNCE: loads copy and allocate, too.
    CopyOnTouch,
    /// Most of those who ask for write access cannot be seen: if they are KVM's workers, loads copy and allocate, too.
    Unclear,
}

impl Direction {
    /// The name used in output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Bounce => "bounce",
            Self::CopyOnTouch => "copy-on-touch",
            Self::Unclear => "unclear",
        }
    }
}

/// What a session has done so far, and what it holds now.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// The frontend's process; 0 if it cannot be seen.
    pub process: u32,
    /// How loads and stores are told apart.
    pub direction: Direction,
    /// Touches that are loads, stores, and of unknown direction.
    pub faults: [u64; 3],
    /// Of the unknown ones: bounced, taken for stores after a bounce, taken for stores at once.
    pub unknown: [u64; 3],
    /// MAPs, UNMAPs.
    pub maps: [u64; 2],
    /// Runs mapped now.
    pub mapped_runs: u64,
    /// Read copies made, evicted.
    pub copies: [u64; 2],
    /// Bytes of read copies now.
    pub copied_bytes: u64,
    /// Bytes that became data for what may have been a load; of those, given back.
    pub clean_bytes: [u64; 2],
    /// Touches that cannot be served now.
    pub waiting: u64,
}

impl Handle {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self(Arc::downgrade(shared))
    }

    /// Gives back what was only read, until `deadline`.
    pub fn give_back(&self, deadline: Instant) {
        let Some(shared) = self.0.upgrade() else {
            return;
        };
        if let Err(e) = reclaim::give_back_mapped(&shared, deadline) {
            log::warn!("cannot give back what was only read: {e}");
        }
    }

    /// The frontend's QUIESCED came.
    pub fn quiesced(&self, quiesced: &Quiesced) {
        if let Some(shared) = self.0.upgrade() {
            shared.quiesces.answered(quiesced);
        }
    }

    /// Makes a cut, until `deadline`; `None` without a session.
    ///
    /// # Errors
    /// As [`Cut`] says.
    pub fn cut(&self, deadline: Instant) -> Result<Option<Cut>> {
        let shared = self.0.upgrade().filter(|s| !s.board.is_stopping());
        shared.map(|s| Cut::make(s, deadline)).transpose()
    }

    /// What the session did so far; `None` without one.
    pub fn figures(&self) -> Option<Figures> {
        self.0.upgrade().map(|shared| figures(&shared))
    }
}

fn figures(shared: &Shared) -> Figures {
    let c = &shared.counters;
    // Only for display: the counters need not agree with each other.
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Figures {
        process: shared.process,
        direction: direction(c, shared.may_bounce),
        faults: [of(&c.loads), of(&c.stores), of(&c.unknown)],
        unknown: [of(&c.bounced), of(&c.second), of(&c.on_touch)],
        maps: [of(&c.maps), of(&c.unmaps)],
        mapped_runs: u64::try_from(shared.channel.run_count()).unwrap_or(u64::MAX),
        copies: [of(&c.copies), of(&c.evictions)],
        copied_bytes: shared.copies.bytes(),
        clean_bytes: [of(&c.maybe_clean), of(&c.given_back)],
        waiting: u64::try_from(shared.board.stalled()).unwrap_or(u64::MAX),
    }
}

/// Moments that are refused make no other mode, nor does a stranger beside threads of the frontend's (a debugger).
pub(super) fn direction(counters: &Counters, may_bounce: bool) -> Direction {
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    if of(&counters.workers) > 0 {
        if may_bounce {
            Direction::Bounce
        } else {
            Direction::CopyOnTouch
        }
    } else if of(&counters.unclear) > of(&counters.stores) {
        Direction::Unclear
    } else {
        Direction::Exact
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was served as a store at once was a sign of "no BOUNCE" once, whoever had asked and why ever it was.
    #[test]
    fn the_mode_follows_from_who_asks_and_what_the_frontend_can_do() {
        let counters = Counters::default();
        let add = |counter: &AtomicU64| Counters::add(counter);
        assert_eq!(direction(&counters, true), Direction::Exact);
        add(&counters.unclear);
        add(&counters.on_touch);
        assert_eq!(direction(&counters, true), Direction::Unclear);
        add(&counters.stores);
        assert_eq!(direction(&counters, true), Direction::Exact);
        add(&counters.workers);
        assert_eq!(direction(&counters, true), Direction::Bounce);
        assert_eq!(direction(&counters, false), Direction::CopyOnTouch);
    }
}
