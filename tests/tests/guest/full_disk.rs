// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that fills the filesystem of its image.

use pcow_tests::backend::Backend;
use pcow_tests::guest::Guest;
use pcow_tests::loop_mount::LoopMount;
use pcow_tests::qemu::{PATIENCE, Qemu};
use pcow_tests::scratch::Scratch;
use pcow_tests::waiting::wait_until;
use serde_json::json;

const MIB: u64 = 1 << 20;

const FILL: &str = "
ndctl create-namespace -f -e namespace0.0 -m devdax -M mem
echo ready
read -r line
guest_io store /dev/dax0.0 0 96M 5
guest_io verify /dev/dax0.0 0 96M 5
";

#[test]
fn the_machine_is_stopped_before_a_store_waits_for_space_and_can_be_continued() {
    let mount = LoopMount::ext4(400);
    let images = Scratch::below(&mount.path());
    let image = images.image("image", 256 * MIB, 64 << 10);
    let backend = Backend::start(&image, &["--stop-on-low-space"]);
    let mut guest = Guest::boot(Qemu::new().pcow(&backend), FILL);
    guest.wait_for("ready\n");
    let ballast = mount.fill_up_to("ballast", 48 * MIB);
    let mut qmp = guest.qemu().qmp();
    guest.qemu().send_line("go");
    let said = qmp.wait_for_event("MEMORY_BACKEND_PCOW_CHANGE");
    assert_eq!(said["change"], "stopping");
    let reason = said["reason"].as_str().unwrap();
    assert!(reason.contains("almost no space left"), "{reason}");
    wait_until("the machine is stopped", PATIENCE, || {
        qmp.command("query-status")["status"] == json!("io-error")
    });
    let log = backend.log().join("\n");
    assert!(!log.contains("the guest waits"), "{log}");
    std::fs::remove_file(ballast).unwrap();
    qmp.command("cont");
    guest.finish();
}
