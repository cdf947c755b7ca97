// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The oracle: plain bytes, kept page by page.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;

/// A disk: its size, and its pages that are not all zero.
#[derive(Clone)]
pub(super) struct Disk {
    pub(super) size: u64,
    pages: BTreeMap<u64, Arc<Vec<u8>>>,
}

impl Disk {
    pub(super) fn empty(size: u64) -> Self {
        Self {
            size,
            pages: BTreeMap::new(),
        }
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let (mut at, mut left) = (offset, bytes);
        while !left.is_empty() {
            let start = usize::try_from(at % PAGE).unwrap();
            let zero = || Arc::new(vec![0; PAGE_LEN]);
            let page = self.pages.entry(at / PAGE).or_insert_with(zero);
            let (now, later) = left.split_at(left.len().min(PAGE_LEN - start));
            Arc::make_mut(page)[start..start + now.len()].copy_from_slice(now);
            at += u64::try_from(now.len()).unwrap();
            left = later;
        }
    }

    pub(super) fn zero(&mut self, start: u64, end: u64) {
        self.write(start, &vec![0; usize::try_from(end - start).unwrap()]);
    }

    pub(super) fn resize(&mut self, size: u64) {
        self.size = size;
        self.pages.retain(|page, _| page * PAGE < size);
    }

    /// Whether `bytes` are what it shows from `at` on.
    pub(super) fn shows(&self, at: u64, bytes: &[u8]) -> Result<(), String> {
        let zeros = vec![0; PAGE_LEN];
        let (mut at, mut left) = (at, bytes);
        while !left.is_empty() {
            let start = usize::try_from(at % PAGE).unwrap();
            let (now, later) = left.split_at(left.len().min(PAGE_LEN - start));
            let page = self.pages.get(&(at / PAGE)).map_or(&zeros, |p| &**p);
            if *now != page[start..start + now.len()] {
                return Err(format!("other bytes in page {}", at / PAGE));
            }
            at += u64::try_from(now.len()).unwrap();
            left = later;
        }
        Ok(())
    }

    /// Whether it shows zeros only in `range`, of which most pages hold nothing.
    pub(super) fn shows_zeros(&self, range: Range<u64>) -> Result<(), String> {
        let pages = range.start / PAGE..range.end.div_ceil(PAGE);
        for (number, _) in self.pages.range(pages) {
            let part = range.start.max(number * PAGE)..range.end.min((number + 1) * PAGE);
            let length = usize::try_from(part.end - part.start).unwrap();
            self.shows(part.start, &vec![0; length])?;
        }
        Ok(())
    }
}
