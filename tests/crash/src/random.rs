// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Numbers that look random and come again for the same seed.

use pcow_format::medium::sim::Choice;

/// A small generator (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).expect("usize is at most 64 bits");
        usize::try_from(self.number() % bound).expect("below a usize")
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// One outcome for each choice; how much survives differs from call to call.
    pub fn picks(&mut self, choices: &[Choice]) -> Vec<usize> {
        let density = self.below(5);
        let mut pick = |c: &Choice| match self.below(4) < density {
            true => c.options() - 1 - self.below(c.options()) / 2,
            false => self.below(c.options()) / 2,
        };
        choices.iter().map(&mut pick).collect()
    }
}

/// The outcome in which everything was written back.
pub fn newest(choices: &[Choice]) -> Vec<usize> {
    choices.iter().map(|c| c.options() - 1).collect()
}
