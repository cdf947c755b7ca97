// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Content that tells where it belongs: each word is made of a seed and of its own place.

const WORD: usize = size_of::<u64>();

/// Fills `bytes`, which stand at `offset`, with the pattern of `seed`.
///
/// # Panics
/// If `bytes` are not whole words.
pub fn fill(seed: u64, offset: u64, bytes: &mut [u8]) {
    for (place, word) in (offset..).step_by(WORD).zip(bytes.chunks_mut(WORD)) {
        word.copy_from_slice(&value(seed, place).to_le_bytes());
    }
}

/// The place of the first word of `bytes`, which stand at `offset`, that is not of the pattern of `seed`.
pub fn first_difference(seed: u64, offset: u64, bytes: &[u8]) -> Option<u64> {
    let mut words = (offset..).step_by(WORD).zip(bytes.chunks(WORD));
    let differs = words.find(|(place, word)| value(seed, *place).to_le_bytes() != **word);
    differs.map(|(place, _)| place)
}

fn value(seed: u64, place: u64) -> u64 {
    (seed << 48) ^ place ^ 0x7063_6f77_0000_0001
}

#[cfg(test)]
mod tests {
    use super::{fill, first_difference};

    #[test]
    fn a_word_of_another_place_or_seed_is_a_difference() {
        let mut bytes = [0; 64];
        fill(3, 4096, &mut bytes);
        assert_eq!(first_difference(3, 4096, &bytes), None);
        assert_eq!(first_difference(3, 8192, &bytes), Some(8192));
        assert_eq!(first_difference(4, 4096, &bytes), Some(4096));
        bytes[40] ^= 1;
        assert_eq!(first_difference(3, 4096, &bytes), Some(4096 + 40));
    }
}
