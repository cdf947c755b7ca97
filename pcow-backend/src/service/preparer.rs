// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Storage for what a guest that writes in sequence will touch next, reserved off the path of its faults.
//!
//! Every byte of the disk has its one place in the data file, so only neighbours can be prepared ahead.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::board::Board;
use crate::disk::Disk;

/// How far ahead at most.
const MAX_AHEAD_BYTES: u64 = 4 << 20;
/// In pieces of this size.
const PIECE_BYTES: u64 = 1 << 20;
/// On DAX: what a huge page maps.
const DAX_PIECE_BYTES: u64 = 2 << 20;

#[derive(Debug, Default)]
struct State {
    /// Where the last allocation ended, and how many bytes of sequence led there.
    last_end: u64,
    sequence: u64,
    /// What is prepared already, after `last_end`.
    prepared_to: u64,
    wanted: Option<Range<u64>>,
    stopping: bool,
}

/// Prepares ahead, in a thread of its own.
#[derive(Debug)]
pub(super) struct Preparer {
    board: Arc<Board>,
    disk: Arc<dyn Disk>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Preparer {
    pub(super) fn new(board: Arc<Board>, disk: Arc<dyn Disk>) -> Self {
        Self {
            board,
            disk,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Notes that `bytes` were allocated by a store. Never waits for the disk.
    pub(super) fn allocated(&self, bytes: &Range<u64>) {
        let mut state = self.lock();
        let length = bytes.end - bytes.start;
        if bytes.start == state.last_end {
            state.sequence += length;
        } else {
            state.sequence = 0;
            state.prepared_to = bytes.end;
        }
        state.last_end = bytes.end;
        let ahead = state.sequence.min(MAX_AHEAD_BYTES);
        let mut end = (bytes.end + ahead).min(self.disk.size());
        if self.disk.is_dax() {
            // A block of which a part was reserved alone may never be one extent.
            end -= end % DAX_PIECE_BYTES;
        }
        // Half of it may be used up before more is prepared, or each fault would wake the thread.
        if state.prepared_to + ahead / 2 < end {
            let start = state.prepared_to.max(bytes.end);
            state.wanted = Some(start..end);
            state.prepared_to = end;
            self.changed.notify_one();
        }
    }

    /// Forgets the sequence: what was prepared for it is not there any more.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        *state = State {
            stopping: state.stopping,
            ..State::default()
        };
    }

    /// The work of the thread, until [`Preparer::stop`].
    pub(super) fn work(&self) {
        while let Some(mut wanted) = self.next() {
            while wanted.start < wanted.end && !self.lock().stopping {
                let piece = first_piece(&wanted, self.piece_bytes());
                if !self.prepare(&piece) {
                    break;
                }
                wanted.start = piece.end;
            }
        }
    }

    fn piece_bytes(&self) -> u64 {
        if self.disk.is_dax() {
            DAX_PIECE_BYTES
        } else {
            PIECE_BYTES
        }
    }

    /// False if it is better to leave it.
    fn prepare(&self, piece: &Range<u64>) -> bool {
        // Somebody at work there needs no help, and must not be met (F1).
        let Some(_claim) = self.board.try_claim(piece.clone()) else {
            return true;
        };
        self.disk
            .prepare(piece.clone())
            .inspect_err(|e| log::debug!("not prepared ahead: {e}"))
            .is_ok()
    }

    fn next(&self) -> Option<Range<u64>> {
        let mut state = self.lock();
        loop {
            if state.stopping {
                return None;
            }
            if let Some(wanted) = state.wanted.take() {
                return Some(wanted);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is a hint: any value of it is valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first part of `wanted`, up to the next multiple of `piece_bytes`.
fn first_piece(wanted: &Range<u64>, piece_bytes: u64) -> Range<u64> {
    let boundary = (wanted.start + 1).next_multiple_of(piece_bytes);
    wanted.start..wanted.end.min(boundary)
}

#[cfg(test)]
mod tests {
    use super::first_piece;

    #[test]
    fn pieces_end_where_a_huge_page_does() {
        assert_eq!(first_piece(&(5..100), 32), 5..32);
        assert_eq!(first_piece(&(32..100), 32), 32..64);
        assert_eq!(first_piece(&(96..100), 32), 96..100);
    }
}
