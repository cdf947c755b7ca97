// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that only reads allocates nothing.

use pcow_tests::micro_vm::FaultPath;

use crate::counts::Counts;
use crate::images::{Holdings, TestImage};
use crate::session::{End, Options, Session, WITH_BOUNCES, WITHOUT_BOUNCES};
use crate::{CLUSTER, PROCESSORS, Setting};

pub fn a_base_is_read_and_nothing_allocated(setting: &Setting) {
    let counts = read_base(setting, WITH_BOUNCES, End::FrontendFirst);
    assert!(counts.bounced > 0, "{counts:?}");
}

pub fn an_empty_image_is_read_and_nothing_allocated(setting: &Setting) {
    let counts = read_empty(setting, WITH_BOUNCES, End::FrontendFirst);
    assert!(counts.bounced > 0, "{counts:?}");
}

/// Nothing has to be given back, and no bounce is needed.
pub fn the_faults_of_a_guest_that_keeps_its_halts_are_exact(setting: &Setting) {
    let exact = Options {
        path: FaultPath::Exact,
        ..WITHOUT_BOUNCES
    };
    let counts = read_base(setting, exact, End::FrontendFirst);
    assert_eq!((counts.unknown, counts.stores), (0, 0), "{counts:?}");
    assert_eq!(counts.maybe_clean, 0, "{counts:?}");
    assert!(counts.reads > 0, "{counts:?}");
}

/// Reads all of a clone, which takes next to nothing afterwards.
pub fn read_base(setting: &Setting, how: Options<'_>, end: End) -> Counts {
    read(&TestImage::clone_of(&setting.base), how, end)
}

/// Reads all of an image without any data, which takes next to nothing afterwards.
pub fn read_empty(setting: &Setting, how: Options<'_>, end: End) -> Counts {
    read(&TestImage::empty(setting.base.bytes), how, end)
}

fn read(image: &TestImage, how: Options<'_>, end: End) -> Counts {
    let mut session = Session::start(image, how);
    load_all(&mut session, image);
    let counts = session.end(end);
    Holdings::of(image).expect_next_to_nothing(image);
    counts
}

/// Loads every byte, the processors side by side, each one every fourth cluster.
pub fn load_all(session: &mut Session, image: &TestImage) {
    let TestImage { content, bytes, .. } = *image;
    session.machine.run(move |vcpu| {
        let mut found = vec![0; usize::try_from(CLUSTER).unwrap()];
        let clusters = (0..bytes).step_by(found.len());
        for offset in clusters.skip(vcpu.number()).step_by(PROCESSORS) {
            vcpu.load(offset, &mut found);
            content.expect(offset, &found);
        }
    });
}
