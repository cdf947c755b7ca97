// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which clusters are ready to become data: known without a system call, and forgotten with the process.

use std::collections::BTreeSet;

use crate::units::{self, ClusterRange};

/// One bit per cluster: it has storage of its own, and if it is absent that storage reads zero. Zeroed memory is
/// only taken where a bit was ever set.
#[derive(Debug)]
pub(crate) struct Ready {
    bits: Vec<u64>,
    /// Those that were made ready ahead, and are no data yet: few, next to all.
    spare: BTreeSet<u64>,
}

impl Ready {
    /// None of `bits` clusters.
    pub(crate) fn new(bits: u64) -> Self {
        Self {
            bits: vec![0; units::len(bits.div_ceil(64))],
            spare: BTreeSet::new(),
        }
    }

    /// Whether all of `run` is.
    pub(crate) fn all(&self, run: ClusterRange) -> bool {
        run.iter()
            .all(|c| self.bits[units::len(c.0 / 64)] & 1 << (c.0 % 64) != 0)
    }

    /// Notes that `run` is, or is not.
    pub(crate) fn set(&mut self, run: ClusterRange, value: bool) {
        for c in run.iter() {
            let mask = 1 << (c.0 % 64);
            let word = &mut self.bits[units::len(c.0 / 64)];
            *word = if value { *word | mask } else { *word & !mask };
        }
        self.used(run);
    }

    /// Notes that `run` was made ready ahead.
    pub(crate) fn set_spare(&mut self, run: ClusterRange) {
        self.set(run, true);
        self.spare.extend(run.start..run.end);
    }

    /// Notes that `run` is data now, or soon.
    pub(crate) fn used(&mut self, run: ClusterRange) {
        if !self.spare.is_empty() {
            for c in run.iter() {
                self.spare.remove(&c.0);
            }
        }
    }

    /// The runs of those that were made ready ahead and are not used.
    pub(crate) fn spare(&self) -> Vec<ClusterRange> {
        let mut runs: Vec<ClusterRange> = Vec::new();
        for cluster in &self.spare {
            match runs.last_mut() {
                Some(run) if run.end == *cluster => run.end += 1,
                _ => runs.push(ClusterRange::new(*cluster, cluster + 1)),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::Ready;
    use crate::units::ClusterRange;

    #[test]
    fn what_is_made_ready_ahead_is_spare_until_it_is_used_or_given_back() {
        let mut ready = Ready::new(1000);
        ready.set(ClusterRange::new(0, 100), true);
        ready.set_spare(ClusterRange::new(100, 130));
        ready.set_spare(ClusterRange::new(500, 510));
        ready.used(ClusterRange::new(90, 110));
        ready.set(ClusterRange::new(505, 1000), false);
        let expected = [ClusterRange::new(110, 130), ClusterRange::new(500, 505)];
        assert_eq!(ready.spare(), expected);
        assert!(ready.all(ClusterRange::new(0, 130)) && !ready.all(ClusterRange::new(504, 506)));
    }
}
