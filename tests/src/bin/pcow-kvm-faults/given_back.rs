// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest whose frontend knows no bounces allocates what it reads; the backend gives it back when the frontend's memory is
//! gone, and not before.

use std::path::Path;
use std::process::Command;

use pcow_protocol::frontend::Frontend;
use pcow_tests::backend::Backend;
use pcow_tests::micro_vm::MicroVm;

use crate::content::Content;
use crate::counts::Counts;
use crate::images::{Holdings, Sectors, TestImage};
use crate::reading::{expect_read_only, load_all};
use crate::session::{Session, WITHOUT_BOUNCES};
use crate::{CLUSTER, PROCESSORS, Setting};

/// The first argument of this program when it is a virtual machine monitor of its own: [`read_as_told`].
pub const READER: &str = "read-all-and-leave";

pub fn what_was_copied_from_a_base_goes_when_the_frontend_has_left(setting: &Setting) {
    read_and_leave(&TestImage::clone_of(&setting.base));
}

pub fn what_was_allocated_in_an_empty_image_goes_when_the_frontend_has_left(setting: &Setting) {
    read_and_leave(&TestImage::empty(setting.base.bytes));
}

/// A frontend that does not know bounces does not count its device I/O, which may have pages that are not mapped any more.
pub fn what_was_copied_from_a_base_stays_when_the_backend_ends_first(setting: &Setting) {
    let image = TestImage::clone_of(&setting.base);
    let mut session = Session::start(&image, WITHOUT_BOUNCES);
    load_all(&mut session.machine, image.content);
    let counts = session.end_backend_first();
    assert!(counts.unknown.copied_on_touch > 0, "{counts:?}");
    assert_eq!(counts.unknown.given_back, 0, "{counts:?}");
    let holdings = Holdings::of(&image);
    assert!(
        holdings.data_clusters * CLUSTER > image.bytes / 2,
        "{holdings:?}"
    );
    image.expect_on_disk(&Sectors::new());
}

/// The frontend is a process that ends: as long as it lives, what it has mapped may be stored into.
fn read_and_leave(image: &TestImage) {
    let mut backend = Backend::start(&image.path, &[]);
    let status = Command::new(std::env::current_exe().unwrap())
        .arg(READER)
        .arg(backend.socket())
        .arg(image.content.name())
        .status()
        .unwrap();
    assert!(status.success(), "the frontend ended with {status}");
    backend.wait_for_log("frontend detached");
    assert!(backend.terminate().success(), "{:#?}", backend.log());
    expect_all_given_back(image, Counts::of(&backend));
}

/// The program as a virtual machine monitor: `words` are the socket of a backend, and the name of what its image shows.
pub fn read_as_told(words: &[String]) {
    let [socket, content] = words else {
        panic!("{READER} SOCKET CONTENT, not {words:?}");
    };
    let frontend = Frontend::connect(Path::new(socket), &WITHOUT_BOUNCES.frontend()).unwrap();
    let mut machine = MicroVm::new(&frontend, PROCESSORS, WITHOUT_BOUNCES.path);
    load_all(&mut machine, Content::named(content));
}

/// Most of the image was allocated, or the test has shown nothing; and next to nothing of it is left.
fn expect_all_given_back(image: &TestImage, counts: Counts) {
    assert_eq!(counts.unknown.bounced, 0, "{counts:?}");
    assert!(counts.unknown.copied_on_touch > 0, "{counts:?}");
    let given_back = counts.unknown.given_back * CLUSTER;
    assert!(given_back > image.bytes / 2, "{counts:?}");
    expect_read_only(image);
}
