// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which pieces of the region are mapped, as the backend has ordered it, and the budget for them. Pure.
//!
//! A run of neighbouring pieces of one file is one mapping to the kernel, and each run costs the process at most one more
//! for the trap behind it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::disk::FileKey;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    end: u64,
    file: FileKey,
    age: u64,
}

/// The mapped runs, and in which order they were last grown.
#[derive(Debug)]
pub struct Mappings {
    runs: BTreeMap<u64, Run>,
    /// Start and age of every run, oldest first; entries whose run has changed since are passed over.
    order: VecDeque<(u64, u64)>,
    clock: u64,
    max_runs: usize,
    /// Runs that somebody is about to map, and has room for.
    kept: usize,
}

impl Mappings {
    /// At most `limit` mappings of the process may come from here.
    pub fn new(limit: u32) -> Self {
        let max_runs = usize::try_from(limit.saturating_sub(1) / 2).unwrap_or(usize::MAX);
        Self {
            runs: BTreeMap::new(),
            order: VecDeque::new(),
            clock: 0,
            max_runs: max_runs.max(1),
            kept: 0,
        }
    }

    /// Whether the byte at `offset` is mapped.
    pub fn covers(&self, offset: u64) -> bool {
        self.runs
            .range(..=offset)
            .next_back()
            .is_some_and(|(_, run)| run.end > offset)
    }

    /// The longest unmapped part of `bytes` around `offset`, which is not mapped: mapping again what is mapped would cost
    /// a hot set its page tables.
    pub fn gap_around(&self, offset: u64, bytes: &Range<u64>) -> Range<u64> {
        let below = self.runs.range(..=offset).next_back();
        let above = self.runs.range(offset..).next();
        let start = below.map_or(bytes.start, |(_, run)| run.end.max(bytes.start));
        let end = above.map_or(bytes.end, |(start, _)| bytes.end.min(*start));
        start..end
    }

    /// Notes that `bytes`, unmapped so far, show `file` now, in the room that was kept for them; joins neighbours.
    pub fn insert(&mut self, bytes: Range<u64>, file: FileKey) {
        self.kept = self.kept.saturating_sub(1);
        let mut bytes = bytes;
        if let Some((start, run)) = self.runs.range(..bytes.start).next_back()
            && run.end == bytes.start
            && run.file == file
        {
            bytes.start = *start;
        }
        if let Some(run) = self.runs.get(&bytes.end).copied()
            && run.file == file
        {
            self.runs.remove(&bytes.end);
            bytes.end = run.end;
        }
        self.put(bytes, file);
    }

    /// Notes that `bytes` are trap again.
    pub fn remove(&mut self, bytes: &Range<u64>) {
        let touched: Vec<_> = self
            .runs
            .range(..bytes.end)
            .rev()
            .take_while(|(_, run)| run.end > bytes.start)
            .map(|(start, run)| (*start, *run))
            .collect();
        for (start, run) in touched {
            self.runs.remove(&start);
            if start < bytes.start {
                self.put(start..bytes.start, run.file);
            }
            if run.end > bytes.end {
                self.put(bytes.end..run.end, run.file);
            }
        }
    }

    /// Whether one more run needs another one to go first.
    pub fn is_full(&self) -> bool {
        self.runs.len() + self.kept >= self.max_runs
    }

    /// Keeps room for a run until [`Self::insert`] or [`Self::remove_part`]: between the look at the budget and the order
    /// to map somebody else may look.
    pub fn keep_room(&mut self) {
        self.kept += 1;
    }

    /// Notes that `bytes`, which may be in the middle of a run, are trap again, in the room that was kept for the second
    /// part of it.
    pub fn remove_part(&mut self, bytes: &Range<u64>) {
        self.kept = self.kept.saturating_sub(1);
        self.remove(bytes);
    }

    /// The run that was grown the longest time ago, which becomes the youngest.
    pub fn victim(&mut self) -> Option<Range<u64>> {
        while let Some((start, age)) = self.order.pop_front() {
            if let Some(run) = self.runs.get(&start).copied()
                && run.age == age
            {
                self.put(start..run.end, run.file);
                return Some(start..run.end);
            }
        }
        None
    }

    /// Takes the budget down to what stands, after the frontend could not map more.
    pub fn shrink_budget(&mut self) {
        self.max_runs = (self.runs.len() * 3 / 4).max(1);
    }

    /// How many runs there are.
    pub fn count(&self) -> usize {
        self.runs.len()
    }

    fn put(&mut self, bytes: Range<u64>, file: FileKey) {
        self.clock += 1;
        let run = Run {
            end: bytes.end,
            file,
            age: self.clock,
        };
        self.runs.insert(bytes.start, run);
        self.order.push_back((bytes.start, self.clock));
        // A run that grows leaves an entry each time; without this they would outnumber the runs without bound.
        if self.order.len() > 2 * self.runs.len() + 64 {
            let runs = &self.runs;
            self.order
                .retain(|(start, age)| runs.get(start).is_some_and(|r| r.age == *age));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: FileKey = FileKey::Active;

    #[test]
    fn neighbours_of_one_file_are_one_run_and_of_two_files_are_two() {
        let mut m = Mappings::new(100);
        m.insert(0..10, A);
        m.insert(20..30, A);
        m.insert(10..20, A);
        assert_eq!(m.count(), 1);
        m.insert(30..40, FileKey::Layer(1));
        assert_eq!(m.count(), 2);
        assert!(m.covers(0) && m.covers(39) && !m.covers(40));
    }

    #[test]
    fn only_the_unmapped_part_around_a_fault_is_offered() {
        let mut m = Mappings::new(100);
        m.insert(10..20, A);
        m.insert(40..50, A);
        assert_eq!(m.gap_around(30, &(0..100)), 20..40);
        assert_eq!(m.gap_around(30, &(25..35)), 25..35);
        assert_eq!(m.gap_around(5, &(0..100)), 0..10);
        assert_eq!(m.gap_around(60, &(0..100)), 50..100);
    }

    #[test]
    fn the_budget_counts_the_trap_between_runs_and_the_oldest_goes_first() {
        let mut m = Mappings::new(9);
        for i in 0..4 {
            assert!(!m.is_full());
            m.insert(i * 10..i * 10 + 5, A);
        }
        assert!(m.is_full());
        m.insert(5..7, A);
        assert_eq!(m.victim(), Some(10..15), "the first run was grown last");
        m.remove(&(10..15));
        assert!(!m.is_full());
        assert_eq!(m.victim(), Some(20..25));
    }

    #[test]
    fn room_that_is_kept_is_nobody_elses() {
        let mut m = Mappings::new(5);
        m.keep_room();
        assert!(!m.is_full());
        m.keep_room();
        assert!(m.is_full(), "two are about to map");
        m.insert(0..5, A);
        m.insert(10..15, A);
        m.remove(&(0..5));
        assert!(!m.is_full());
        m.keep_room();
        m.remove_part(&(12..13));
        assert!(m.is_full(), "two parts are left");
    }

    #[test]
    fn a_part_of_a_run_can_go() {
        let mut m = Mappings::new(100);
        m.insert(0..100, A);
        m.remove_part(&(40..60));
        assert_eq!(m.count(), 2);
        assert!(m.covers(39) && !m.covers(40) && !m.covers(59) && m.covers(60));
    }

    #[test]
    fn a_run_that_grows_a_million_times_takes_no_more_memory() {
        let mut m = Mappings::new(100);
        for i in 0..1_000_000 {
            m.insert(i..i + 1, A);
        }
        assert!(m.order.len() < 1000);
        assert_eq!(m.victim(), Some(0..1_000_000));
    }
}
