// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The moments in which a page of the region cannot be stored to (`protocol.md` section 5.3), and who must know of them.
//!
//! The mapping thread opens and ends moments. A vCPU whose `KVM_RUN` failed asks whether there was one; a thread that is
//! about to hand an address of the region to a system call keeps them away. The lock is held for short system calls only,
//! never in a touch of the region and never while somebody waits for the backend (F6).

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::quiesce::Gate;
use super::region::GuestRegion;
use super::segv::Repeatable;
use crate::message::RegionRange;
use crate::wire::MAX_MOMENTS;

/// How old a moment gets at most. The backend ends it as soon as the worker has met it, which takes about 0.1 ms unless
/// the host has no processor for the worker.
const LONGEST: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Moment {
    page: RegionRange,
    until: Instant,
}

#[derive(Debug, Default)]
struct State {
    open: Vec<Moment>,
}

/// The moments of one region.
///
/// A virtual machine monitor that uses KVM wraps `KVM_RUN` in [`Bounces::sequence`] and [`Bounces::happened_since`], system
/// calls that store into the region in [`Bounces::begin_io`], and calls
/// [`repeat_stores_in_bounces`](super::repeat_stores_in_bounces) once for its own stores.
#[derive(Debug)]
pub struct Bounces {
    region: Arc<GuestRegion>,
    state: Mutex<State>,
    /// System calls under way that may touch the region.
    gate: Gate,
    /// Changes before a moment opens and after it has ended.
    sequence: AtomicU64,
    /// Moments that are open: raised before the page is protected, lowered after it is not any more.
    open: AtomicUsize,
    /// Not for a read-only region: there nothing but a mistake is refused, and would be repeated for ever.
    _repeatable: Option<Repeatable>,
}

/// Keeps moments away while it lives.
#[derive(Debug)]
pub struct IoGuard<'a>(&'a Bounces);

impl Bounces {
    pub(super) fn new(region: Arc<GuestRegion>, read_only: bool) -> Arc<Self> {
        let repeatable =
            (!read_only).then(|| Repeatable::new(region.as_ptr().addr(), region.len()));
        Arc::new(Self {
            region,
            state: Mutex::default(),
            gate: Gate::default(),
            sequence: AtomicU64::new(0),
            open: AtomicUsize::new(0),
            _repeatable: repeatable,
        })
    }

    /// To be read before `KVM_RUN`, for [`Bounces::happened_since`].
    pub fn sequence(&self) -> u64 {
        self.sequence.load(Ordering::SeqCst)
    }

    /// Whether a moment was open at any time since `sequence` was read. If so, an `EFAULT` of `KVM_RUN` means nothing and
    /// the vCPU goes on.
    pub fn happened_since(&self, sequence: u64) -> bool {
        // In this order: a moment that ends in between changes the sequence before it lowers the number.
        self.open.load(Ordering::SeqCst) > 0 || self.sequence() != sequence
    }

    /// Says that system calls that may touch the region begin: moments end, and none is opened until the guard is dropped.
    /// Waits while the backend holds device I/O for a snapshot, and never for memory. A thread must not have two guards of
    /// a region.
    pub fn begin_io(&self) -> IoGuard<'_> {
        self.gate.enter();
        // After the count, which whoever opens a moment looks at under this lock.
        self.end_all();
        IoGuard(self)
    }

    /// Whether system calls that may touch the region are under way.
    pub(super) fn has_io(&self) -> bool {
        self.gate.has_io()
    }

    /// What all of them pass.
    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Opens a moment of `page` and wakes.
    pub(super) fn open(&self, page: RegionRange) -> Result<(), Errno> {
        let mut state = self.lock();
        if state.open.iter().any(|moment| moment.page == page) {
            // Somebody who asked before it opened.
            drop(state);
            self.wake(page);
            return Ok(());
        }
        if self.gate.has_io() || state.open.len() >= MAX_MOMENTS as usize {
            return Err(Errno::BUSY);
        }
        self.open.fetch_add(1, Ordering::SeqCst);
        self.sequence.fetch_add(1, Ordering::SeqCst);
        if let Err(errno) = self.region.forbid_stores(page) {
            self.open.fetch_sub(1, Ordering::SeqCst);
            return Err(errno);
        }
        let until = Instant::now() + LONGEST;
        state.open.push(Moment { page, until });
        drop(state);
        self.wake(page);
        Ok(())
    }

    /// Ends the moment of `page`, if one is open.
    pub(super) fn end(&self, page: RegionRange) {
        self.end_if(&mut self.lock(), |moment| moment.page == page);
    }

    /// Ends the moments of all pages in `range`.
    pub(super) fn end_within(&self, range: RegionRange) {
        if self.open.load(Ordering::SeqCst) == 0 {
            return; // only the calling thread opens any
        }
        let overlaps =
            |page: RegionRange| page.end() > Some(range.offset) && Some(page.offset) < range.end();
        self.end_if(&mut self.lock(), |moment| overlaps(moment.page));
    }

    /// Ends moments that are too old; says when the next one will be.
    pub(super) fn end_late(&self) -> Option<Instant> {
        let mut state = self.lock();
        let now = Instant::now();
        self.end_if(&mut state, |moment| moment.until <= now);
        state.open.iter().map(|moment| moment.until).min()
    }

    /// Ends all moments.
    pub(super) fn end_all(&self) {
        self.end_if(&mut self.lock(), |_| true);
    }

    fn end_if(&self, state: &mut State, which: impl Fn(&Moment) -> bool) {
        for moment in state.open.extract_if(.., |moment| which(moment)) {
            if let Err(errno) = self.region.allow_stores(moment.page) {
                // Only for want of a mapping, which the moment itself took: the guest's stores would be repeated for ever.
                log::error!(
                    "cannot end the moment of {:?}: {errno}; aborting",
                    moment.page
                );
                std::process::abort();
            }
            self.sequence.fetch_add(1, Ordering::SeqCst);
            self.open.fetch_sub(1, Ordering::SeqCst);
            self.wake(moment.page);
        }
    }

    fn wake(&self, page: RegionRange) {
        if let Err(error) = self.region.wake(page) {
            log::error!("cannot wake {page:?}: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside leaves a page protected at worst, which the handler and KVM_RUN treat as a moment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for IoGuard<'_> {
    fn drop(&mut self) {
        self.0.gate.leave();
    }
}
