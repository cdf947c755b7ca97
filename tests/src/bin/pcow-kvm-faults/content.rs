// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The oracle of what images show.

use pcow_tests::pattern;

use crate::CLUSTER;

/// The seed of the base's pattern.
pub const BASE: u64 = 1;
/// The seed of the pattern of what an image has of its own.
pub const OWN: u64 = 2;

/// What an image shows before a guest has stored into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The base's pattern everywhere.
    Base,
    /// Nothing but zeros.
    Empty,
    /// In turn a cluster of the base, one of the image's own, and one that is in neither.
    Mixed,
}

impl Content {
    const ALL: [Self; 3] = [Self::Base, Self::Empty, Self::Mixed];

    /// Its name, for another process.
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// The content whose name this is.
    pub fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|c| c.name() == name).unwrap()
    }

    /// Fills `bytes` with what stands at `offset`; these bytes are of one cluster, or the content is not mixed.
    pub fn fill(self, offset: u64, bytes: &mut [u8]) {
        match self.seed(offset) {
            Some(seed) => pattern::fill(seed, offset, bytes),
            None => bytes.fill(0),
        }
    }

    /// Compares `bytes`, which were found at `offset`, with what [`Content::fill`] says.
    ///
    /// # Panics
    /// If they differ.
    pub fn expect(self, offset: u64, bytes: &[u8]) {
        let mut wanted = vec![0; bytes.len()];
        self.fill(offset, &mut wanted);
        expect_same(offset, bytes, &wanted);
    }

    /// The seed of the pattern at `offset`; `None` for zeros.
    pub fn seed(self, offset: u64) -> Option<u64> {
        match self {
            Self::Base => Some(BASE),
            Self::Empty => None,
            Self::Mixed => {
                [Some(BASE), Some(OWN), None][usize::try_from(offset / CLUSTER % 3).unwrap()]
            }
        }
    }
}

/// Panics with the first place at which `found`, from `offset`, is not `wanted`.
pub fn expect_same(offset: u64, found: &[u8], wanted: &[u8]) {
    if found == wanted {
        return;
    }
    let at = found.iter().zip(wanted).position(|(f, w)| f != w).unwrap();
    panic!(
        "at {:#x} there is {:#x}, not {:#x}",
        offset + u64::try_from(at).unwrap(),
        found[at],
        wanted[at]
    );
}
