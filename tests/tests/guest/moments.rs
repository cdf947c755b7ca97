// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU's own stores in a moment of BOUNCE (`protocol.md` section 5.3). The backend here is one that a test tells what to do:
//! a real one opens moments under KVM only, and ends them at once.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use pcow_protocol::message::{BackendRequest, Status};
use pcow_protocol::uffd::CopyOutcome;
use pcow_tests::qemu::{PATIENCE, Qemu};
use pcow_tests::waiting::wait_until;
use serde_json::json;

use crate::told_backend::{
    Backend, CLUSTER, Fault, PAGE, REGION_SIZE, file, map, range, region, writable,
};

const OLD: u64 = 0x0101_0101_0101_0101;

/// The socket through which a test has QEMU itself load and store (`-qtest`).
struct Qtest(BufReader<UnixStream>);

impl Qtest {
    fn connect(path: &Path) -> Self {
        let mut stream = None;
        wait_until("QEMU listens for what to do", PATIENCE, || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        Self(BufReader::new(stream.unwrap()))
    }

    fn ask(&mut self, command: &str) -> String {
        writeln!(self.0.get_mut(), "{command}").unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        let answer = answer.strip_prefix("OK").expect("QEMU carries it out");
        answer.trim().to_owned()
    }

    fn store(&mut self, address: u64, value: u64) {
        self.ask(&format!("writeq {address:#x} {value:#x}"));
    }

    fn load(&mut self, address: u64) -> u64 {
        let answer = self.ask(&format!("readq {address:#x}"));
        u64::from_str_radix(answer.trim_start_matches("0x"), 16).unwrap()
    }
}

/// QEMU would die of the SIGSEGV. The store may be late, and find that QEMU has ended the moment, which it does when it is a
/// second old; then the next one shall meet one.
#[test]
fn a_store_of_qemus_own_that_meets_a_moment_is_repeated() {
    let data = file();
    data.write_all_at(&vec![1; usize::try_from(REGION_SIZE).unwrap()], 0)
        .unwrap();
    let machine = Qemu::new();
    let (socket, qtest) = (machine.file("backend"), machine.file("qtest"));
    let listener = UnixListener::bind(&socket).unwrap();
    let attaching = thread::spawn(move || {
        // The chardev connects before the object does, and says nothing.
        let mut streams = listener.incoming().map(Result::unwrap);
        let attached = streams.find_map(|s| Backend::negotiate(s, region(0), &[], Status::OK));
        let mut backend = attached.unwrap();
        assert_eq!(backend.register(writable(0), &data), Status::OK);
        backend.answer_attach(Status::OK);
        backend
    });
    let mut machine = machine
        .args(&["-S", "-qtest"])
        .args(&[format!("unix:{},server=on,wait=off", qtest.display())])
        .chardev(&socket)
        .args(&["-object", "memory-backend-pcow,id=pm,chardev=c0"])
        .args(&["-device", "nvdimm,memdev=pm"])
        .start();
    let mut backend = attaching.join().unwrap();
    let mut qmp = machine.qmp();
    let devices = qmp.command("query-memory-devices");
    let base = devices[0]["data"]["addr"].as_u64().unwrap();
    let mut qtest = Qtest::connect(&qtest);
    let repeated = (0..REGION_SIZE / CLUSTER).position(|cluster| {
        let offset = cluster * CLUSTER;
        assert_eq!(backend.copy(offset, &[1; 4096]), CopyOutcome::Done);
        let bounce = BackendRequest::Bounce(range(offset, PAGE));
        assert_eq!(backend.ask(&bounce, None), Status::OK);
        thread::scope(|scope| {
            let storing = scope.spawn(|| qtest.store(base + offset + 16, 5));
            // Nobody ends the moment: QEMU does.
            let fault = Fault {
                offset,
                write: true,
                wp: true,
            };
            assert_eq!(backend.fault(), fault);
            assert_eq!(backend.ask(&map(offset, CLUSTER), None), Status::OK);
            storing.join().unwrap();
        });
        let shown = [16, 24].map(|at| qtest.load(base + offset + at));
        assert_eq!(shown, [5, OLD]);
        let counter = json!({"path": "/objects/pm", "property": "repeated-stores"});
        qmp.execute("qom-get", &counter).unwrap().as_u64().unwrap() > 0
    });
    assert!(repeated.is_some(), "no store has met a moment");
}
