// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest whose frontend knows no bounces allocates what it reads; the backend gives it back before it ends.

use crate::counts::Counts;
use crate::reading::{read_base, read_empty};
use crate::session::{End, WITHOUT_BOUNCES};
use crate::{CLUSTER, Setting};

pub fn what_was_copied_from_a_base_goes_when_the_frontend_has_left(setting: &Setting) {
    let counts = read_base(setting, WITHOUT_BOUNCES, End::FrontendFirst);
    expect_much(counts, setting.base.bytes);
}

pub fn what_was_copied_from_a_base_goes_when_the_backend_ends_first(setting: &Setting) {
    let counts = read_base(setting, WITHOUT_BOUNCES, End::BackendFirst);
    expect_much(counts, setting.base.bytes);
}

pub fn what_was_allocated_in_an_empty_image_goes_when_the_frontend_has_left(setting: &Setting) {
    let counts = read_empty(setting, WITHOUT_BOUNCES, End::FrontendFirst);
    expect_much(counts, setting.base.bytes);
}

/// Most of the image was allocated while it was read, or the test has shown nothing.
fn expect_much(counts: Counts, bytes: u64) {
    assert_eq!(counts.bounced, 0, "{counts:?}");
    assert!(counts.copied_on_touch > 0, "{counts:?}");
    assert!(counts.given_back * CLUSTER > bytes / 2, "{counts:?}");
}
