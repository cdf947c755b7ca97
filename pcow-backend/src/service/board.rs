// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What waits to be resolved, who is at work where, and who leads.
//!
//! - A place of the disk is *parked* at most once, however often the kernel repeats its event (F3): signals make one
//!   blocked load report itself without bound.
//! - A resolver works only inside its *claim*; claims never overlap, so that no cluster has two resolvers (F1).
//! - One thread of the crew *leads*: it reads the userfaultfd and the channel, and never blocks in anything else (F4). It
//!   resolves a fault itself only when an idle thread takes the lead, so the way from event to answer has no hop
//!   between threads, and somebody always reads.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What is known of a touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// A load.
    Load,
    /// A kernel worker asks for write access on behalf of a vCPU that may only want to load.
    Unknown {
        /// The worker's thread.
        worker: u32,
        /// The page is there, write-protected.
        present: bool,
    },
    /// A store, or what is taken for one.
    Store {
        /// Whether it is one.
        sure: bool,
    },
}

impl Touch {
    fn rank(self) -> u8 {
        match self {
            Self::Load => 0,
            Self::Unknown { .. } => 1,
            Self::Store { .. } => 2,
        }
    }
}

/// A fault to be resolved: a byte offset of the disk, and what is wanted there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub offset: u64,
    /// What for.
    pub touch: Touch,
}

/// What a thread of the crew does next.
#[derive(Debug)]
pub enum Duty {
    /// Read events until somebody else can.
    Lead,
    /// Resolve one fault.
    Resolve(Fault, Claim),
    /// The session is over.
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Queued,
    /// Could not be resolved; waits for [`Board::retry_stalled`].
    Stalled,
}

#[derive(Debug, Default)]
struct State {
    parked: HashMap<u64, (Fault, Place)>,
    queue: VecDeque<u64>,
    claims: BTreeMap<u64, u64>,
    stalled: usize,
    /// Units that had stalled and were queued again since.
    retried: HashSet<u64>,
    leading: bool,
    idle: usize,
    /// Nobody may begin to work anywhere: see [`Board::hold`].
    held: bool,
    stopping: bool,
}

/// Shared by the crew of one session.
#[derive(Debug)]
pub struct Board {
    unit: u64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Board {
    /// A board for a disk whose faults are told apart in units of `unit` bytes.
    pub fn new(unit: u64) -> Arc<Self> {
        Arc::new(Self {
            unit,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Parks a fault. One that is parked already stays where it is; a store outweighs a
    /// touch of unknown direction, and that a load.
    pub fn post(&self, fault: Fault) {
        self.lock()
            .post(fault.offset / self.unit, fault, Place::Queued);
    }

    /// Parks a fault that could not be resolved now; true if everything went well until then.
    pub fn stall(&self, fault: Fault) -> bool {
        let mut state = self.lock();
        let first = state.stalled == 0 && state.retried.is_empty();
        let unit = fault.offset / self.unit;
        state.retried.remove(&unit);
        state.post(unit, fault, Place::Stalled);
        first
    }

    /// How many faults could not be resolved and wait.
    pub fn stalled(&self) -> usize {
        self.lock().stalled
    }

    /// Notes that the fault at `offset` was resolved; true if it was the last one of those that had stalled.
    pub fn recovered(&self, offset: u64) -> bool {
        let mut state = self.lock();
        if state.retried.is_empty() {
            return false;
        }
        state.retried.remove(&(offset / self.unit))
            && state.retried.is_empty()
            && state.stalled == 0
    }

    /// Queues the stalled faults again.
    pub fn retry_stalled(&self) {
        let mut state = self.lock();
        state.retry_stalled();
        self.changed.notify_all();
    }

    /// Waits for something to do. `scope` gives the bytes to claim for a fault.
    pub fn next_duty(self: &Arc<Self>, scope: &dyn Fn(u64) -> Range<u64>) -> Duty {
        let mut state = self.lock();
        loop {
            if state.stopping {
                return Duty::Stop;
            }
            if !state.leading {
                state.leading = true;
                return Duty::Lead;
            }
            if let Some((fault, bytes)) = state.take(scope) {
                return Duty::Resolve(fault, self.claim(bytes));
            }
            state.idle += 1;
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    /// Lets the leader take a fault, if somebody idle can lead. Otherwise the faults wait for the threads at work.
    pub fn relieve(self: &Arc<Self>, scope: &dyn Fn(u64) -> Range<u64>) -> Option<(Fault, Claim)> {
        let mut state = self.lock();
        if state.idle == 0 || state.queue.is_empty() {
            return None;
        }
        let (fault, bytes) = state.take(scope)?;
        state.leading = false;
        // One of them leads; the others find what is left in the queue.
        for _ in 0..=state.queue.len().min(state.idle) {
            self.changed.notify_one();
        }
        Some((fault, self.claim(bytes)))
    }

    /// Claims `bytes` if nobody is at work in any of them.
    pub fn try_claim(self: &Arc<Self>, bytes: Range<u64>) -> Option<Claim> {
        let mut state = self.lock();
        if state.held || state.is_claimed(&bytes) {
            return None;
        }
        state.claims.insert(bytes.start, bytes.end);
        Some(self.claim(bytes))
    }

    /// Lets nobody begin to work anywhere, and waits until nobody is at work; `None` if that takes until `deadline`, if the
    /// session ends, or if it is held already. Faults are parked meanwhile.
    pub fn hold(self: &Arc<Self>, deadline: Instant) -> Option<Hold> {
        let mut state = self.lock();
        if state.held {
            return None;
        }
        state.held = true;
        let hold = Hold(Arc::clone(self));
        let patience = deadline.saturating_duration_since(Instant::now());
        let busy = |s: &mut State| !s.claims.is_empty() && !s.stopping;
        let waited = self.changed.wait_timeout_while(state, patience, busy);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let quiet = state.claims.is_empty() && !state.stopping;
        // Before the hold may be dropped, which needs it.
        drop(state);
        quiet.then_some(hold)
    }

    /// Whether nobody may begin to work: who works and waits for others to do something should give up.
    pub fn is_held(&self) -> bool {
        self.lock().held
    }

    /// Ends the work of the crew.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Whether [`Board::stop`] was called.
    pub fn is_stopping(&self) -> bool {
        self.lock().stopping
    }

    fn claim(self: &Arc<Self>, bytes: Range<u64>) -> Claim {
        Claim {
            board: Arc::clone(self),
            bytes,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the state whole before it can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn post(&mut self, unit: u64, fault: Fault, place: Place) {
        if let Some((parked, _)) = self.parked.get_mut(&unit) {
            // The kernel repeats the events of one wait (F3).
            if fault.touch.rank() > parked.touch.rank() {
                *parked = fault;
            }
            return;
        }
        self.parked.insert(unit, (fault, place));
        match place {
            Place::Queued => self.queue.push_back(unit),
            Place::Stalled => self.stalled += 1,
        }
    }

    fn retry_stalled(&mut self) {
        for (unit, (_, place)) in &mut self.parked {
            if *place == Place::Stalled {
                *place = Place::Queued;
                self.queue.push_back(*unit);
                self.retried.insert(*unit);
            }
        }
        self.stalled = 0;
    }

    /// The first queued fault whose scope is free, claimed.
    fn take(&mut self, scope: &dyn Fn(u64) -> Range<u64>) -> Option<(Fault, Range<u64>)> {
        if self.held {
            return None;
        }
        for i in 0..self.queue.len() {
            let unit = self.queue[i];
            let Some((fault, _)) = self.parked.get(&unit).copied() else {
                continue;
            };
            let bytes = scope(fault.offset);
            if !self.is_claimed(&bytes) {
                self.queue.remove(i);
                self.parked.remove(&unit);
                self.claims.insert(bytes.start, bytes.end);
                return Some((fault, bytes));
            }
        }
        None
    }

    fn is_claimed(&self, bytes: &Range<u64>) -> bool {
        // Claims do not overlap, so only the last one that starts before the end can reach into the range.
        self.claims
            .range(..bytes.end)
            .next_back()
            .is_some_and(|(_, end)| *end > bytes.start)
    }
}

/// The right to look up and change a range of the disk, until it is dropped.
#[derive(Debug)]
pub struct Claim {
    board: Arc<Board>,
    bytes: Range<u64>,
}

impl Claim {
    /// Grows the claim towards `wanted` as far as nobody else is at work, and returns the part of `wanted` that is claimed
    /// now: one piece around the original claim.
    pub fn extend(&mut self, wanted: Range<u64>) -> Range<u64> {
        let mut state = self.board.lock();
        state.claims.remove(&self.bytes.start);
        let floor = state
            .claims
            .range(..self.bytes.start)
            .next_back()
            .map_or(0, |(_, end)| *end);
        let ceiling = state
            .claims
            .range(self.bytes.end..)
            .next()
            .map_or(u64::MAX, |(start, _)| *start);
        self.bytes.start = self.bytes.start.min(wanted.start.max(floor));
        self.bytes.end = self.bytes.end.max(wanted.end.min(ceiling));
        state.claims.insert(self.bytes.start, self.bytes.end);
        self.bytes.start.max(wanted.start)..self.bytes.end.min(wanted.end)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.board.lock();
        state.claims.remove(&self.bytes.start);
        if state.held {
            // Among those who wait is the one that waits for all claims.
            self.board.changed.notify_all();
        }
        // A queued fault may have waited for this claim.
        if !state.queue.is_empty() && state.idle > 0 {
            self.board.changed.notify_one();
        }
    }
}

/// The right to be the only one at work, until it is dropped.
#[derive(Debug)]
pub struct Hold(Arc<Board>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.lock().held = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 4096;
    const STORE: Touch = Touch::Store { sure: true };

    fn scope(offset: u64) -> Range<u64> {
        offset / UNIT * UNIT..(offset / UNIT + 1) * UNIT
    }

    fn fault(offset: u64, touch: Touch) -> Fault {
        Fault { offset, touch }
    }

    fn resolve(board: &Arc<Board>) -> (Fault, Claim) {
        match board.next_duty(&scope) {
            Duty::Resolve(fault, claim) => (fault, claim),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_repeated_event_is_parked_once_and_a_store_outweighs_a_load() {
        let board = Board::new(UNIT);
        assert!(matches!(board.next_duty(&scope), Duty::Lead));
        for _ in 0..1000 {
            board.post(fault(5, Touch::Load));
        }
        let unknown = Touch::Unknown {
            worker: 1,
            present: false,
        };
        board.post(fault(9, STORE));
        board.post(fault(7, unknown));
        let (taken, _claim) = resolve(&board);
        assert_eq!((taken.offset, taken.touch), (9, STORE));
        assert!(board.lock().queue.is_empty() && board.lock().parked.is_empty());
    }

    #[test]
    fn no_place_has_two_resolvers_and_the_second_comes_after_the_first() {
        let board = Board::new(UNIT);
        assert!(matches!(board.next_duty(&scope), Duty::Lead));
        board.post(fault(0, Touch::Load));
        let (_, claim) = resolve(&board);
        board.post(fault(1, STORE));
        board.post(fault(UNIT, Touch::Load));
        let (other, _other_claim) = resolve(&board);
        assert_eq!(other.offset, UNIT, "the claimed place is passed over");
        drop(claim);
        assert_eq!(resolve(&board).0.offset, 1);
    }

    #[test]
    fn a_claim_grows_only_up_to_its_neighbours() {
        let board = Board::new(UNIT);
        let _low = board.try_claim(0..UNIT).unwrap();
        let _high = board.try_claim(5 * UNIT..6 * UNIT).unwrap();
        let mut claim = board.try_claim(2 * UNIT..3 * UNIT).unwrap();
        assert_eq!(claim.extend(0..10 * UNIT), UNIT..5 * UNIT);
        assert!(board.try_claim(4 * UNIT..5 * UNIT).is_none());
        drop(claim);
        assert!(board.try_claim(4 * UNIT..5 * UNIT).is_some());
    }

    #[test]
    fn the_leader_resolves_only_when_somebody_else_can_lead() {
        let board = Board::new(UNIT);
        assert!(matches!(board.next_duty(&scope), Duty::Lead));
        board.post(fault(0, Touch::Load));
        assert!(board.relieve(&scope).is_none(), "nobody is idle");
        let other = Arc::clone(&board);
        let (taken, _claim) = resolve(&board);
        assert_eq!(taken.offset, 0);
        let idle = std::thread::spawn(move || matches!(other.next_duty(&scope), Duty::Lead));
        while board.lock().idle == 0 {
            std::thread::yield_now();
        }
        board.post(fault(UNIT, Touch::Load));
        assert_eq!(board.relieve(&scope).unwrap().0.offset, UNIT);
        assert!(idle.join().unwrap());
    }

    #[test]
    fn while_the_board_is_held_faults_are_parked_and_nobody_begins_to_work() {
        let board = Board::new(UNIT);
        assert!(matches!(board.next_duty(&scope), Duty::Lead));
        let claim = board.try_claim(0..UNIT).unwrap();
        assert!(board.hold(Instant::now()).is_none(), "somebody is at work");
        assert!(!board.is_held(), "what failed leaves nothing behind");
        let holder = Arc::clone(&board);
        let soon = Instant::now() + std::time::Duration::from_secs(60);
        let hold = std::thread::spawn(move || holder.hold(soon));
        while !board.is_held() {
            std::thread::yield_now();
        }
        board.post(fault(UNIT, STORE));
        drop(claim);
        let hold = hold.join().unwrap().unwrap();
        assert!(board.try_claim(5 * UNIT..6 * UNIT).is_none());
        assert!(board.lock().take(&scope).is_none());
        assert!(board.hold(soon).is_none(), "one at a time");
        drop(hold);
        assert_eq!(resolve(&board).0.offset, UNIT);
    }

    #[test]
    fn a_stalled_fault_waits_until_it_is_tried_again() {
        let board = Board::new(UNIT);
        assert!(matches!(board.next_duty(&scope), Duty::Lead));
        assert!(
            board.stall(fault(0, STORE)),
            "the first one is worth a message"
        );
        board.post(fault(0, Touch::Load));
        assert_eq!((board.stalled(), board.lock().queue.len()), (1, 0));
        board.retry_stalled();
        assert_eq!(board.stalled(), 0);
        let (again, claim) = resolve(&board);
        assert_eq!(again.touch, STORE);
        drop(claim);
        board.retry_stalled();
        assert!(!board.stall(again), "not news any more");
        board.retry_stalled();
        resolve(&board);
        assert!(board.recovered(0));
    }
}
