// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that do something to a guest's memory as a whole.

use pcow_tests::backend::Backend;
use pcow_tests::files::allocated_bytes;
use pcow_tests::guest::Guest;
use pcow_tests::qemu::{PATIENCE, Qemu};
use pcow_tests::qmp::Qmp;
use pcow_tests::scratch::Scratch;
use pcow_tests::tpm::Tpm;
use pcow_tests::waiting::wait_until;
use serde_json::json;

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

/// Sets the balloon so that `mib` are left to the guest, and waits until it has done so.
fn inflate(qmp: &mut Qmp, mib: u64) {
    let size = json!({ "value": mib * MIB });
    qmp.execute("balloon", &size).unwrap();
    wait_until("the balloon has its size", PATIENCE, || {
        qmp.command("query-balloon")["actual"] == json!(mib * MIB)
    });
}

/// QEMU discards what a balloon takes, page by page. It must not reach the persistent memory.
#[test]
fn a_balloon_takes_the_guests_memory_and_nothing_of_the_image() {
    let scratch = Scratch::new();
    let image = scratch.image("image", 256 * MIB, CLUSTER);
    let script = "
ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem
mkfs.ext4 -q -b 4096 /dev/pmem0
mount -o dax /dev/pmem0 /mnt
guest_io store /mnt/before 0 32M 1
echo stored
read -r line
guest_io verify /mnt/before 0 32M 1
guest_io store /mnt/inflated 0 32M 2
echo inflated
read -r line
guest_io verify /mnt/inflated 0 32M 2
umount /mnt
";
    let mut backend = Backend::start(&image, &[]);
    let machine = Qemu::new().args(&["-device", "virtio-balloon-pci"]);
    let mut guest = Guest::boot(machine.pcow(&backend), script);
    guest.wait_for("stored\n");
    let mut qmp = guest.qemu().qmp();
    inflate(&mut qmp, 256);
    guest.qemu().send_line("go");
    guest.wait_for("inflated\n");
    inflate(&mut qmp, 512);
    guest.qemu().send_line("go");
    guest.finish();
    assert!(backend.terminate().success());

    let again = "
mount -o dax /dev/pmem0 /mnt
guest_io verify /mnt/before 0 32M 1
guest_io verify /mnt/inflated 0 32M 2
";
    Guest::run_on(&image, Qemu::new(), again);
}

/// Bytes that QEMU has cleared, as its trace events say.
fn cleared(messages: &str) -> u64 {
    let sizes = messages
        .lines()
        .filter(|line| line.contains("tpm_ppi_memset"));
    sizes
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

/// A guest asks the firmware to clear its memory when it starts again (TCG Platform Reset Attack Mitigation), and QEMU
/// does that in the place of the firmware. It clears the firmware, too, so that this machine does not come back.
#[test]
fn a_tpm_clears_the_guests_memory_and_nothing_of_the_image() {
    let scratch = Scratch::new();
    let image = scratch.image("image", 256 * MIB, CLUSTER);
    // The byte is `movv` of the interface at TPM_PPI_ADDR_BASE (QEMU, docs/specs/tpm.rst).
    let script = "
ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem
mkfs.ext4 -q -b 4096 /dev/pmem0
mount -o dax /dev/pmem0 /mnt
guest_io store /mnt/file 0 32M 1
umount /mnt
devmem 0xfed4515a 8 1
echo stored
read -r line
reboot -f
";
    let mut backend = Backend::start(&image, &[]);
    let tpm = Tpm::start(scratch.path("tpm"));
    let mut guest = Guest::boot(tpm.add_to(Qemu::new()).pcow(&backend), script);
    guest.wait_for("stored\n");
    let machine = guest.qemu();
    let mut qmp = machine.qmp();
    // A machine of these tests ends when its guest starts again, unless told otherwise.
    let restart = json!({ "reboot": "reset" });
    qmp.execute("set-action", &restart).unwrap();
    machine.send_line("go");
    machine.wait_for_message("tpm_ppi_memset");
    // The monitor answers when the reset is over.
    qmp.command("query-status");
    let cleared = cleared(&machine.messages());
    assert!(
        (512 * MIB..513 * MIB).contains(&cleared),
        "{cleared} bytes cleared, of 512 MiB of memory"
    );
    qmp.command("quit");
    assert!(machine.wait().success());
    assert!(backend.terminate().success());
    let allocated = allocated_bytes(&image);
    assert!(allocated < 128 * MIB, "{allocated} bytes of 256 MiB");

    let again = "
mount -o dax /dev/pmem0 /mnt
guest_io verify /mnt/file 0 32M 1
";
    Guest::run_on(&image, Qemu::new(), again);
}
