// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A quick digest of 64 bits, the same on every run. For telling states apart, not for hostile input.

use std::hash::{BuildHasherDefault, Hasher};

/// Odd, with about as many ones as zeros.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// A digest under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest(u64);

/// Of many bytes: several sums at once, since each step waits for the one before.
pub fn of_bytes(bytes: &[u8]) -> u64 {
    let mut lanes = [Digest(0), Digest(1), Digest(2), Digest(3)];
    let (rows, rest) = bytes.as_chunks::<32>();
    for row in rows {
        let words = row.as_chunks::<8>().0;
        let pairs = lanes.iter_mut().zip(words);
        pairs.for_each(|(lane, word)| lane.mix(u64::from_le_bytes(*word)));
    }
    let mut digest = Digest::default();
    lanes.iter().for_each(|lane| digest.mix(lane.0));
    digest.write(rest);
    digest.finish()
}

impl Digest {
    /// Multiplies to 128 bits and folds them, so that every bit of the input reaches every bit of the sum.
    fn mix(&mut self, value: u64) {
        let product = u128::from(self.0 ^ value ^ FACTOR.rotate_left(32)) * u128::from(FACTOR);
        let (low, high) = (product & u128::from(u64::MAX), product >> 64);
        self.0 = u64::try_from(low ^ high)
            .unwrap_or_default()
            .rotate_left(23);
    }
}

impl Hasher for Digest {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks();
        words.iter().for_each(|w| self.mix(u64::from_le_bytes(*w)));
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        if !rest.is_empty() {
            self.mix(u64::from_le_bytes(last));
        }
        self.mix(u64::try_from(bytes.len()).unwrap_or_default());
    }

    fn write_u64(&mut self, value: u64) {
        self.mix(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.mix(u64::try_from(value).unwrap_or_default());
    }

    fn finish(&self) -> u64 {
        let mut last = *self;
        last.mix(FACTOR);
        last.mix(!FACTOR);
        last.0
    }
}

/// For sets of digests, which are mixed already.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mixed(u64);

impl Hasher for Mixed {
    fn write(&mut self, _: &[u8]) {
        unreachable!("it takes digests only");
    }

    fn write_u64(&mut self, digest: u64) {
        self.0 = digest;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A set of digests.
pub type DigestSet = std::collections::HashSet<u64, BuildHasherDefault<Mixed>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_long_piece_counts() {
        let mut bytes = vec![7; 8192 + 5];
        let mut seen = DigestSet::default();
        assert!(seen.insert(of_bytes(&bytes)));
        for at in 0..bytes.len() {
            bytes[at] = 8;
            assert!(seen.insert(of_bytes(&bytes)), "{at}");
        }
    }

    #[test]
    fn small_changes_of_a_long_input_give_other_digests() {
        let digest = |words: &[u64]| {
            let mut digest = Digest::default();
            words.iter().for_each(|w| digest.write_u64(*w));
            digest.finish()
        };
        let mut seen = DigestSet::default();
        for place in 0..64 {
            for value in 0..256 {
                let mut words = [0; 64];
                words[place] = value;
                words[(place + 7) % 64] += value / 16;
                assert!(seen.insert(digest(&words)) || value == 0, "{place} {value}");
            }
        }
    }
}
