// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clusters that were copied or allocated for what may have been a load, given back where they hold what they cover.
//!
//! The order while a frontend has them mapped: they become trap again, the frontend has confirmed that and that no device
//! I/O of its has the old pages (which only one that knows BOUNCE can tell), then they are compared, the word is durable, and last their storage goes (I3). A store before the trap is seen by the comparison, a
//! store after it is a fault that waits for the claim.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pcow_protocol::Result;

use super::channel::Unmapped;
use super::{Counters, Shared};

/// How long a frontend may take to confirm, and a flush to end.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct State {
    wanted: bool,
    stopping: bool,
}

/// Wakes the thread that gives back when space runs low.
#[derive(Debug, Default)]
pub(super) struct Reclaimer {
    state: Mutex<State>,
    changed: Condvar,
}

impl Reclaimer {
    /// Asks for all that can be given back.
    pub(super) fn request(&self) {
        self.lock().wanted = true;
        self.changed.notify_all();
    }

    pub(super) fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    /// False when it is time to stop.
    fn wait(&self) -> bool {
        let mut state = self
            .changed
            .wait_while(self.lock(), |s| !s.wanted && !s.stopping)
            .unwrap_or_else(PoisonError::into_inner);
        state.wanted = false;
        !state.stopping
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Two flags are never half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The work of the thread: what stalled for want of space is tried again after each round.
pub(super) fn work(shared: &Shared) {
    while shared.reclaimer.wait() {
        if shared.disk.maybe_clean_bytes() == 0 {
            continue;
        }
        match give_back_mapped(shared, Instant::now() + 12 * PATIENCE) {
            Ok(0) => {}
            Ok(bytes) => {
                log::info!("{} KiB given back that were only read", bytes >> 10);
                shared.board.retry_stalled();
            }
            Err(e) => return shared.end(Some(e)),
        }
    }
}

/// Gives back what a frontend that is attached may have mapped, until `deadline`; returns how many bytes.
///
/// # Errors
/// The session is over.
pub(super) fn give_back_mapped(shared: &Shared, deadline: Instant) -> Result<u64> {
    let mut given_back = 0;
    let mut kept = Vec::new();
    let mut ended = Ok(());
    // A frontend that does not count its device I/O may have some in pages that are about to go.
    while shared.may_bounce && shared.disk.maybe_clean_bytes() > 0 && Instant::now() < deadline {
        // Before anything is unmapped: from then on the guest waits, too, if one begins just then.
        if !shared
            .disk
            .waits_for_flush(deadline.min(Instant::now() + PATIENCE))
        {
            break;
        }
        let Some(bytes) = shared.disk.take_maybe_clean() else {
            break;
        };
        match give_back_piece(shared, &bytes) {
            Ok(Some(count)) => given_back += count,
            Ok(None) => kept.push(bytes),
            Err(e) => {
                kept.push(bytes);
                ended = Err(e);
                break;
            }
        }
    }
    for bytes in kept {
        shared.disk.note_maybe_clean(&bytes);
    }
    ended.map(|()| given_back)
}

/// `None` if it is in use in some way.
fn give_back_piece(shared: &Shared, bytes: &Range<u64>) -> Result<Option<u64>> {
    let Some(_claim) = shared.board.try_claim(bytes.clone()) else {
        return Ok(None);
    };
    // What is left of its run may be two.
    shared.make_room_for_a_run()?;
    let unmapped = shared.channel.unmap_and_wait(bytes, PATIENCE)?;
    Counters::add(&shared.counters.unmaps);
    let is_quiet = unmapped == Unmapped::Quiet;
    Ok(is_quiet.then(|| give_back(shared, bytes.clone())).flatten())
}

/// Gives back after a frontend whose process is gone, and with it all that it had mapped; returns how many bytes.
pub(super) fn give_back_unmapped(shared: &Shared) -> u64 {
    std::iter::from_fn(|| shared.disk.take_maybe_clean())
        .map_while(|bytes| give_back(shared, bytes))
        .sum()
}

/// `None` if a flush takes too long, which may have begun at any time.
fn give_back(shared: &Shared, bytes: Range<u64>) -> Option<u64> {
    let deadline = Instant::now() + PATIENCE;
    let given_back = shared.disk.give_back_clean(bytes, deadline);
    let given_back = given_back.unwrap_or_else(|e| {
        log::warn!("cannot give back what was only read: {e}");
        Some(0)
    })?;
    // Only ever read for display.
    shared
        .counters
        .given_back
        .fetch_add(given_back, Ordering::Relaxed);
    Some(given_back)
}
