// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that only reads allocates nothing.

use pcow_tests::micro_vm::{FaultPath, MicroVm};

use crate::content::Content;
use crate::counts::Counts;
use crate::images::{Holdings, Sectors, TestImage};
use crate::session::{Options, Session, WITH_BOUNCES, WITHOUT_BOUNCES};
use crate::{CLUSTER, PROCESSORS, Setting};

pub fn a_base_is_read_and_nothing_allocated(setting: &Setting) {
    read_with_bounces(&TestImage::clone_of(&setting.base));
}

pub fn an_empty_image_is_read_and_nothing_allocated(setting: &Setting) {
    read_with_bounces(&TestImage::empty(setting.base.bytes));
}

/// A busy host may run a kernel thread too late for its bounce: that load is taken for a store. Such are under one in a hundred
/// of the clusters. The backend ends first, so that nothing of them is given back.
fn read_with_bounces(image: &TestImage) {
    let mut session = Session::start(image, WITH_BOUNCES);
    load_all(&mut session.machine, image.content);
    let counts = session.end_backend_first();
    let unknown = counts.unknown;
    assert!(unknown.bounced > 0, "{counts:?}");
    let allocated = unknown.taken_for_stores + unknown.copied_on_touch;
    assert!(allocated * 100 < image.bytes / CLUSTER, "{counts:?}");
    assert_eq!(unknown.given_back, 0, "{counts:?}");
    expect_read_only(image);
}

/// Nothing has to be given back, and no bounce is needed.
pub fn the_faults_of_a_guest_that_keeps_its_halts_are_exact(setting: &Setting) {
    let exact = Options {
        path: FaultPath::Exact,
        ..WITHOUT_BOUNCES
    };
    let image = TestImage::clone_of(&setting.base);
    let mut session = Session::start(&image, exact);
    load_all(&mut session.machine, image.content);
    let Counts { session, unknown } = session.end();
    assert_eq!((session.unknown, session.stores), (0, 0), "{session:?}");
    assert_eq!(unknown.maybe_clean, 0, "{unknown:?}");
    assert!(session.loads > 0, "{session:?}");
    expect_read_only(&image);
}

/// An image that was only read takes next to nothing, and shows what it did before.
pub fn expect_read_only(image: &TestImage) {
    Holdings::of(image).expect_next_to_nothing(image);
    image.expect_on_disk(&Sectors::new());
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
