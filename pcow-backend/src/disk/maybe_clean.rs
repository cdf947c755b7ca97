// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clusters that became data for a touch that may have been a load: they may hold what they cover. Pure.
//!
//! Only a hint: a cluster that is not in here stays data, and one that is may have been stored to since.

use std::collections::BTreeMap;
use std::ops::Range;

/// Runs of bytes, none touching another.
#[derive(Debug, Default)]
pub struct MaybeClean {
    runs: BTreeMap<u64, u64>,
    bytes: u64,
}

impl MaybeClean {
    /// Adds `bytes`.
    pub fn insert(&mut self, bytes: &Range<u64>) {
        let mut joined = bytes.clone();
        // Runs do not overlap: the ones that touch `bytes` are neighbours at its end, seen from above.
        while let Some((&start, &end)) = self.runs.range(..=joined.end).next_back()
            && end >= joined.start
        {
            self.runs.remove(&start);
            self.bytes -= end - start;
            joined = joined.start.min(start)..joined.end.max(end);
        }
        self.bytes += joined.end - joined.start;
        self.runs.insert(joined.start, joined.end);
    }

    /// Takes out the first piece, which does not cross a multiple of `piece_bytes`.
    pub fn take(&mut self, piece_bytes: u64) -> Option<Range<u64>> {
        let (start, end) = self.runs.pop_first()?;
        let cut = ((start / piece_bytes + 1) * piece_bytes).min(end);
        if cut < end {
            self.runs.insert(cut, end);
        }
        self.bytes -= cut - start;
        Some(start..cut)
    }

    /// How many bytes are in here.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut clean: MaybeClean, piece: u64) -> Vec<Range<u64>> {
        std::iter::from_fn(|| clean.take(piece)).collect()
    }

    #[test]
    fn neighbours_join_and_pieces_end_at_multiples() {
        let mut clean = MaybeClean::default();
        for range in [10..20, 40..50, 20..30, 25..42, 60..61] {
            clean.insert(&range);
        }
        assert_eq!(clean.bytes(), 41);
        assert_eq!(all(clean, 100), [10..50, 60..61]);
        let mut clean = MaybeClean::default();
        clean.insert(&(10..45));
        assert_eq!(all(clean, 20), [10..20, 20..40, 40..45]);
    }

    #[test]
    fn what_is_inserted_twice_counts_once() {
        let mut clean = MaybeClean::default();
        clean.insert(&(0..100));
        clean.insert(&(10..20));
        clean.insert(&(0..100));
        assert_eq!(clean.bytes(), 100);
        assert_eq!(all(clean, 1000).len(), 1);
    }
}
