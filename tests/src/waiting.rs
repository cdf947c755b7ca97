// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting for a condition instead of for time.

use std::time::{Duration, Instant};

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not within `timeout`, naming `what` was waited for.
pub fn wait_until(what: &str, timeout: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + timeout;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {timeout:?} for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
