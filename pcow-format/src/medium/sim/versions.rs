// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a power cut may leave of one changeable thing. Knows nothing of files.

/// A value that a power cut may take back: the durable one, and those it had since, newest last.
#[derive(Debug, Clone)]
pub(super) struct Versions<T> {
    durable: T,
    later: Vec<T>,
    /// How often it was settled: tells whether a version number is still the same version.
    pub(super) epoch: u64,
    /// Its write-back has failed, and it counts as written until it is written to again.
    pub(super) clean: bool,
    /// M17: it is in the CPU's caches, and no sync knows of it until it is stored to again.
    cached: bool,
}

impl<T: Clone + PartialEq> Versions<T> {
    pub(super) fn new(durable: T) -> Self {
        Self {
            durable,
            later: Vec::new(),
            epoch: 0,
            clean: false,
            cached: false,
        }
    }

    pub(super) fn now(&self) -> &T {
        self.later.last().unwrap_or(&self.durable)
    }

    pub(super) fn set(&mut self, value: T) {
        // Writing what is there already counts, too.
        self.clean = false;
        self.cached = false;
        if *self.now() != value {
            self.later.push(value);
        }
    }

    pub(super) fn mark_clean(&mut self) {
        self.clean = !self.is_settled();
    }

    /// Shows the durable version again, if this counts as written and is not.
    pub(super) fn evict(&mut self) {
        if self.clean {
            self.later.clear();
            self.clean = false;
            self.epoch += 1;
        }
    }

    /// How many versions a power cut may leave; version 0 is the durable one.
    pub(super) fn count(&self) -> usize {
        self.later.len() + 1
    }

    pub(super) fn version(&self, number: usize) -> &T {
        match number.checked_sub(1) {
            Some(later) => &self.later[later],
            None => &self.durable,
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        self.later.is_empty()
    }

    /// Makes the present value durable, unless it is taken for durable already, or nobody knows that it is not.
    pub(super) fn settle(&mut self) {
        if self.clean || self.cached {
            return;
        }
        if let Some(now) = self.later.pop() {
            self.durable = now;
            self.later.clear();
        }
        self.epoch += 1;
    }

    /// M17: the value is copied to storage that holds `before`, and the copy stays in the CPU's caches.
    pub(super) fn copy_over(&mut self, before: T) {
        let now = self.now().clone();
        self.later.extend([before, now]);
        self.cached = true;
    }

    /// Changes every version up to and including `number`.
    pub(super) fn change_up_to(&mut self, number: usize, change: impl Fn(&mut T)) {
        change(&mut self.durable);
        self.later.iter_mut().take(number).for_each(change);
    }

    /// Forgets versions that have become the durable one. Renumbers the others.
    pub(super) fn merge(&mut self) {
        let durable = &self.durable;
        let same = self.later.iter().take_while(|v| *v == durable).count();
        self.later.drain(..same);
    }
}
