// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that only reads allocates nothing.

use pcow_tests::micro_vm::{FaultPath, MicroVm};

use crate::content::Content;
use crate::counts::Counts;
use crate::images::{Holdings, TestImage};
use crate::session::{Options, Session, WITH_BOUNCES, WITHOUT_BOUNCES};
use crate::{CLUSTER, PROCESSORS, Setting};

pub fn a_base_is_read_and_nothing_allocated(setting: &Setting) {
    let counts = read(&TestImage::clone_of(&setting.base), WITH_BOUNCES);
    assert!(counts.unknown.bounced > 0, "{counts:?}");
}

pub fn an_empty_image_is_read_and_nothing_allocated(setting: &Setting) {
    let counts = read(&TestImage::empty(setting.base.bytes), WITH_BOUNCES);
    assert!(counts.unknown.bounced > 0, "{counts:?}");
}

/// Nothing has to be given back, and no bounce is needed.
pub fn the_faults_of_a_guest_that_keeps_its_halts_are_exact(setting: &Setting) {
    let exact = Options {
        path: FaultPath::Exact,
        ..WITHOUT_BOUNCES
    };
    let Counts { session, unknown } = read(&TestImage::clone_of(&setting.base), exact);
    assert_eq!((session.unknown, session.stores), (0, 0), "{session:?}");
    assert_eq!(unknown.maybe_clean, 0, "{unknown:?}");
    assert!(session.loads > 0, "{session:?}");
}

/// Reads all of an image, which takes next to nothing afterwards.
fn read(image: &TestImage, how: Options<'_>) -> Counts {
    let mut session = Session::start(image, how);
    load_all(&mut session.machine, image.content);
    let counts = session.end();
    Holdings::of(image).expect_next_to_nothing(image);
    counts
}

/// Loads every byte, the processors side by side, each one every fourth cluster.
pub fn load_all(machine: &mut MicroVm, content: Content) {
    machine.run(move |vcpu| {
        let mut found = vec![0; usize::try_from(CLUSTER).unwrap()];
        let clusters = (0..vcpu.region_bytes()).step_by(found.len());
        for offset in clusters.skip(vcpu.number()).step_by(PROCESSORS) {
            vcpu.load(offset, &mut found);
            content.expect(offset, &found);
        }
    });
}
