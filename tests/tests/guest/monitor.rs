// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A running QEMU: what its monitor refuses, and that it lives on without its backend.

use pcow_format::{Stored, holder};
use pcow_tests::backend::Backend;
use pcow_tests::files::allocated_bytes;
use pcow_tests::guest::Guest;
use pcow_tests::qemu::{PATIENCE, Qemu};
use pcow_tests::scratch::Scratch;
use pcow_tests::waiting::wait_until;
use serde_json::json;

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

#[test]
fn migration_is_refused() {
    let scratch = Scratch::new();
    let backend = Backend::start(&scratch.image("image", 64 * MIB, CLUSTER), &[]);
    let mut running = Qemu::new().args(&["-S"]).pcow(&backend).start();
    let migrate = json!({ "uri": format!("file:{}", scratch.path("state").display()) });
    let said = running.qmp().execute("migrate", &migrate).unwrap_err();
    let expected =
        "memory-backend-pcow cannot be migrated: its memory belongs to a backend process";
    assert!(said.contains(expected), "{said}");
}

#[test]
fn merging_cannot_be_switched_on_at_run_time() {
    let scratch = Scratch::new();
    let backend = Backend::start(&scratch.image("image", 64 * MIB, CLUSTER), &[]);
    let mut running = Qemu::new().args(&["-S"]).pcow(&backend).start();
    let mut qmp = running.qmp();
    for property in ["merge", "dump", "prealloc"] {
        let set = json!({ "path": "/objects/pm", "property": property, "value": true });
        let said = qmp.execute("qom-set", &set).unwrap_err();
        assert!(said.contains("does not support property"), "{said}");
    }
}

#[test]
fn an_object_that_finds_no_backend_at_run_time_is_refused_and_the_monitor_goes_on() {
    let scratch = Scratch::new();
    let mut running = Qemu::new().args(&["-S"]).start();
    let mut qmp = running.qmp();
    let address = json!({ "type": "unix", "data": { "path": scratch.path("none") } });
    let socket = json!({ "addr": address, "server": false, "reconnect-ms": 1000 });
    let chardev = json!({ "id": "c0", "backend": { "type": "socket", "data": socket } });
    qmp.execute("chardev-add", &chardev).unwrap();
    let object = json!({ "qom-type": "memory-backend-pcow", "id": "pm", "chardev": "c0" });
    let said = qmp.execute("object-add", &object).unwrap_err();
    assert!(said.starts_with("memory-backend-pcow 'pm': "), "{said}");
    assert_eq!(qmp.command("query-status")["running"], json!(false));
}

#[test]
fn an_object_added_at_run_time_is_served() {
    let scratch = Scratch::new();
    let backend = Backend::start(&scratch.image("image", 64 * MIB, CLUSTER), &[]);
    let mut running = Qemu::new().args(&["-S"]).chardev(backend.socket()).start();
    let mut qmp = running.qmp();
    let object = json!({ "qom-type": "memory-backend-pcow", "id": "pm", "chardev": "c0" });
    qmp.execute("object-add", &object).unwrap();
    assert_eq!(attached(&mut qmp), json!(true));
    qmp.execute("object-del", &json!({ "id": "pm" })).unwrap();
    backend.wait_for_log("frontend detached");
}

#[test]
fn an_object_that_no_device_uses_can_be_deleted_without_a_backend() {
    let scratch = Scratch::new();
    let image = scratch.image("image", 64 * MIB, CLUSTER);
    let mut backend = Backend::start(&image, &[]);
    let mut running = Qemu::new().args(&["-S"]).chardev(backend.socket()).start();
    let mut qmp = running.qmp();
    let object = json!({ "qom-type": "memory-backend-pcow", "id": "pm", "chardev": "c0" });
    qmp.execute("object-add", &object).unwrap();
    backend.kill();
    wait_until("it is missed", PATIENCE, || {
        attached(&mut qmp) == json!(false)
    });
    qmp.execute("object-del", &json!({ "id": "pm" })).unwrap();
    wait_until("nobody keeps the image any more", PATIENCE, || {
        let stored = Stored::open(&image, &[]).unwrap();
        holder(stored.directory()).unwrap().is_none()
    });
    let _backend = Backend::start_at(backend.socket(), &image, &[]);
    qmp.execute("object-add", &object).unwrap();
    assert_eq!(attached(&mut qmp), json!(true));
}

fn attached(qmp: &mut pcow_tests::qmp::Qmp) -> serde_json::Value {
    let get = json!({ "path": "/objects/pm", "property": "attached" });
    qmp.execute("qom-get", &get).unwrap()
}

/// The memory of a dump would be the image, read and copied as a whole.
#[test]
fn a_dump_of_the_guest_leaves_the_image_out() {
    let scratch = Scratch::new();
    let image = scratch.image("image", 4096 * MIB, CLUSTER);
    let empty = allocated_bytes(&image);
    let backend = Backend::start(&image, &[]);
    let mut running = Qemu::new().args(&["-S"]).pcow(&backend).start();
    let dump = scratch.path("dump");
    let to = json!({ "paging": false, "protocol": format!("file:{}", dump.display()) });
    running.qmp().execute("dump-guest-memory", &to).unwrap();
    let size = std::fs::metadata(&dump).unwrap().len();
    assert!(
        (512 * MIB..600 * MIB).contains(&size),
        "{size} bytes dumped"
    );
    let grown = allocated_bytes(&image) - empty;
    assert!(grown < CLUSTER, "grown by {grown} bytes");
}

/// A guest that stores to and loads from 2 MiB that are mapped, over and over, whose backend was killed meanwhile. A
/// line on its console makes it touch memory that is not mapped. There is no filesystem, which would touch more memory
/// by itself.
fn guest_without_backend(scratch: &Scratch) -> Guest {
    let script = "
ndctl create-namespace -f -e namespace0.0 -m devdax
guest_io tick /dev/dax0.0 0 2M &
read -r line
echo going
guest_io store /dev/dax0.0 64M 2M 1
echo gone
";
    let image = scratch.image("image", 256 * MIB, CLUSTER);
    let mut backend = Backend::start(&image, &[]);
    let mut guest = Guest::boot(Qemu::new().pcow(&backend), script);
    guest.wait_for("tick 2\n");
    backend.kill();
    guest
        .qemu()
        .wait_for_message("the session with the backend has ended");
    guest
}

fn last_tick(guest: &mut Guest) -> u64 {
    let console = guest.qemu().serial();
    let mut ticks = console
        .lines()
        .filter_map(|line| line.strip_prefix("tick "));
    ticks.next_back().unwrap().parse().unwrap_or(0)
}

#[test]
fn a_guest_whose_backend_was_killed_goes_on_with_mapped_memory_and_qemu_can_quit() {
    let scratch = Scratch::new();
    let mut guest = guest_without_backend(&scratch);
    let seen = last_tick(&mut guest);
    guest.wait_for(&format!("tick {}\n", seen + 3));
    let mut qmp = guest.qemu().qmp();
    assert_eq!(qmp.command("query-status")["status"], json!("running"));
    assert_eq!(attached(&mut qmp), json!(false));
    qmp.command("quit");
    assert!(guest.qemu().wait().success());
}

#[test]
fn a_vcpu_that_waits_for_a_dead_backend_sees_no_zeros_and_leaves_the_monitor_alone() {
    let scratch = Scratch::new();
    let mut guest = guest_without_backend(&scratch);
    guest.qemu().send_line("go");
    guest.wait_for("going\n");
    wait_until("the only vCPU waits", PATIENCE, || {
        guest.qemu().waits_for_memory()
    });
    let mut qmp = guest.qemu().qmp();
    assert_eq!(qmp.command("query-status")["status"], json!("running"));
    assert!(!guest.qemu().serial().contains("gone"));
}
