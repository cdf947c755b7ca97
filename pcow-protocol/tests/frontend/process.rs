// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frontend and backend in two processes, as in real life.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_protocol::message::Status;
use pcow_protocol::uffd::CopyOutcome;

use crate::backend::{
    Backend, CLUSTER, PAGE, file, load, load_fault, map, region, store, store_fault, writable,
};

const SOCKET: &str = "PCOW_TEST_SOCKET";

#[test]
fn faults_of_another_process_are_served_and_its_end_is_seen() {
    if let Some(path) = std::env::var_os(SOCKET) {
        return frontend_process(Path::new(&path));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("backend.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let this_test = "process::faults_of_another_process_are_served_and_its_end_is_seen";
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", this_test, "--test-threads=1"])
        .env(SOCKET, &path)
        .spawn()
        .unwrap();

    let (stream, _) = listener.accept().unwrap();
    let data = file();
    let mut backend = Backend::accept(stream, region(0), &[]);
    assert_eq!(backend.register(writable(0), &data), Status::OK);
    backend.answer_attach(Status::OK);
    assert_eq!(backend.fault(), load_fault(0));
    assert_eq!(backend.copy(0, &[5; 4096]), CopyOutcome::Done);
    for page in [0, PAGE] {
        let orphaned = backend.uffd.is_orphaned(backend.fault_fd.base + page, PAGE);
        assert!(!orphaned.unwrap());
    }
    assert_eq!(backend.fault(), store_fault(CLUSTER));
    // It wants no answer: the process may have ended before it could send one.
    backend
        .outbox
        .send(&map(CLUSTER, CLUSTER), None, None)
        .unwrap();

    assert!(child.wait().unwrap().success());
    let orphaned = backend.uffd.is_orphaned(backend.fault_fd.base, PAGE);
    assert!(orphaned.unwrap());
    assert_eq!(backend.copy(2 * CLUSTER, &[5; 4096]), CopyOutcome::Gone);
}

fn frontend_process(path: &Path) {
    let frontend = Frontend::connect(path, &FrontendOptions::default()).unwrap();
    assert_eq!(load(frontend.region(), 0), 0x0505_0505_0505_0505);
    store(frontend.region(), CLUSTER, 9);
    assert_eq!(load(frontend.region(), CLUSTER), 9);
}
