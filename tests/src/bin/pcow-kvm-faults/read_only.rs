// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image that is served read-only.

use pcow_tests::files::checksums;

use crate::Setting;
use crate::images::TestImage;
use crate::reading::load_all;
use crate::session::{Options, Session, WITH_BOUNCES};

/// KVM's thread asks for write access here, too, and cannot have it; the loads have to end all the same.
pub fn every_load_from_a_read_only_image_ends_with_its_bytes(setting: &Setting) {
    let image = TestImage::mixed(setting.effort.mixed_bytes);
    let before = checksums(&image.path, &[".data", ".map"]);
    let read_only = Options {
        backend: &["--read-only"],
        ..WITH_BOUNCES
    };
    let mut session = Session::start(&image, read_only);
    load_all(&mut session.machine, image.content);
    let counts = session.end();
    assert!(counts.session.loads > 0, "{counts:?}");
    assert_eq!((counts.session.stores, counts.session.unknown), (0, 0));
    assert_eq!(checksums(&image.path, &[".data", ".map"]), before);
}
