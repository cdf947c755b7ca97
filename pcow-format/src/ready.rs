// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which clusters are ready to become data: known without a system call, and forgotten with the process.

use crate::units::{self, ClusterRange};

/// One bit per cluster: it has storage of its own, and if it is absent that storage reads zero. Zeroed memory is
/// only taken where a bit was ever set.
#[derive(Debug)]
pub(crate) struct Ready(Vec<u64>);

impl Ready {
    /// None of `bits` clusters.
    pub(crate) fn new(bits: u64) -> Self {
        Self(vec![0; units::len(bits.div_ceil(64))])
    }

    /// Whether all of `run` is.
    pub(crate) fn all(&self, run: ClusterRange) -> bool {
        run.iter()
            .all(|c| self.0[units::len(c.0 / 64)] & 1 << (c.0 % 64) != 0)
    }

    /// Notes that `run` is, or is not.
    pub(crate) fn set(&mut self, run: ClusterRange, value: bool) {
        for c in run.iter() {
            let mask = 1 << (c.0 % 64);
            let word = &mut self.0[units::len(c.0 / 64)];
            *word = if value { *word | mask } else { *word & !mask };
        }
    }

    /// The runs of set bits, none longer than 32,768.
    pub(crate) fn runs(&self) -> Vec<ClusterRange> {
        let mut runs: Vec<ClusterRange> = Vec::new();
        for (i, word) in self.0.iter().enumerate().filter(|(_, w)| **w != 0) {
            let base = units::bytes(i) * 64;
            for bit in (0..64).filter(|bit| word & 1 << bit != 0) {
                match runs.last_mut() {
                    Some(run) if run.end == base + bit && run.count() < 32 << 10 => run.end += 1,
                    _ => runs.push(ClusterRange::new(base + bit, base + bit + 1)),
                }
            }
        }
        runs
    }
}
