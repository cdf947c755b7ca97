// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Space that runs low: the virtual machine is stopped, as by a disk with `werror=stop`, before a store of its has to wait.
//!
//! A thread that waits for a fault cannot be stopped, and who wants to stop it waits, too. So this happens while there is
//! still space for what the guest touches until it has stopped.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::disk::Disk;

/// Whether somebody was told.
#[derive(Debug)]
pub(super) struct LowSpace {
    wanted: bool,
    was_low: AtomicBool,
}

impl LowSpace {
    /// For a session whose frontend `can_stop`, if that is `wanted`.
    pub(super) fn new(wanted: bool, can_stop: bool) -> Self {
        if wanted && !can_stop {
            log::warn!(
                "this frontend cannot stop its machine: it will wait when there is no space left"
            );
        }
        Self {
            wanted: wanted && can_stop,
            was_low: AtomicBool::new(false),
        }
    }

    /// Looks, after storage may have been taken; true once each time that space has become low. Whoever continues the
    /// machine without freeing some wants it to go on until a store waits.
    pub(super) fn has_fallen(&self, disk: &dyn Disk) -> bool {
        if !self.wanted {
            return false;
        }
        let low = disk.is_low_on_space();
        // Nothing else is told through it: the swap decides which of several threads tells.
        let was_low = self.was_low.swap(low, Ordering::Relaxed);
        low && !was_low
    }
}
