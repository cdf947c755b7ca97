// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What QEMU refuses, each with one line that says what is wrong.

use pcow_tests::backend::Backend;
use pcow_tests::qemu::Qemu;
use pcow_tests::scratch::Scratch;

const SIZE: u64 = 64 << 20;
const CLUSTER: u64 = 64 << 10;

/// Starts QEMU with the chardev `c0`, unless `arguments` make one, and returns what it says about `arguments`.
fn refusal(backend: &Backend, arguments: &str) -> String {
    let mut machine = Qemu::new().args(&["-S"]);
    if !arguments.contains("-chardev") {
        machine = machine.chardev(backend.socket());
    }
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    machine.args(&arguments).refusal()
}

/// A command line, and what the first line of the answer says.
const REFUSED: &[(&str, &str)] = &[
    (
        "-object memory-backend-pcow,id=pm,chardev=c0,merge=on",
        "memory-backend-pcow does not support property 'merge'",
    ),
    (
        "-object memory-backend-pcow,id=pm,chardev=c0,dump=on",
        "memory-backend-pcow does not support property 'dump'",
    ),
    (
        "-object memory-backend-pcow,id=pm,chardev=c0,host-nodes=0,policy=bind",
        "memory-backend-pcow does not support property 'host-nodes'",
    ),
    (
        "-object memory-backend-pcow,id=pm,chardev=c0,policy=interleave",
        "memory-backend-pcow does not support property 'policy'",
    ),
    (
        "-object memory-backend-pcow,id=pm,chardev=c0,share=off",
        "memory-backend-pcow 'pm': share=off is not supported",
    ),
    (
        "-object memory-backend-pcow,id=pm,chardev=c0,prealloc=on",
        "memory-backend-pcow 'pm': prealloc=on is not supported",
    ),
    (
        "-mem-prealloc -object memory-backend-pcow,id=pm,chardev=c0",
        "memory-backend-pcow 'pm': prealloc=on is not supported",
    ),
    (
        "-overcommit mem-lock=on -object memory-backend-pcow,id=pm,chardev=c0",
        "memory-backend-pcow 'pm': -overcommit mem-lock is not supported",
    ),
    (
        "-object memory-backend-pcow,id=pm,chardev=c0,size=1G",
        "memory-backend-pcow 'pm': size 1073741824 was given, but the image has 67108864 bytes; size can be left out",
    ),
    (
        "-object memory-backend-pcow,id=pm",
        "-object memory-backend-pcow,id=pm: Parameter 'chardev' is missing",
    ),
    (
        "-object memory-backend-pcow,id=pm,chardev=other",
        "memory-backend-pcow 'pm': chardev 'other' not found",
    ),
    (
        "-chardev null,id=c0 -object memory-backend-pcow,id=pm,chardev=c0",
        "memory-backend-pcow 'pm': chardev 'c0' is not a socket",
    ),
    (
        "-chardev socket,id=c0,path=/nonexistent -object memory-backend-pcow,id=pm,chardev=c0",
        "-chardev socket,id=c0,path=/nonexistent: Failed to connect to '/nonexistent': No such file or directory",
    ),
    (
        "-chardev socket,id=c0,path=/nonexistent,reconnect-ms=1000 -object memory-backend-pcow,id=pm,chardev=c0",
        "memory-backend-pcow 'pm': cannot connect to '/nonexistent': No such file or directory",
    ),
    (
        "-object memory-backend-pcow,id=pm,chardev=c0 -device nvdimm,memdev=pm,label-size=128K",
        "-device nvdimm,memdev=pm,label-size=128K: 'label-size' is not supported with memdev pm: \
         labels would not survive a power failure",
    ),
    (
        "-object memory-backend-pcow,id=pm,chardev=c0 -device nvme,serial=1,pmrdev=pm",
        "-device nvme,serial=1,pmrdev=pm: memory-backend-pcow 'pm' needs bounce=off for this device, which has the kernel \
         store into it without telling",
    ),
];

#[test]
fn what_cannot_work_is_refused_with_a_line_that_says_so() {
    let scratch = Scratch::new();
    let backend = Backend::start(&scratch.image("image", SIZE, CLUSTER), &[]);
    for (arguments, expected) in REFUSED {
        let said = refusal(&backend, arguments);
        let line = said.lines().next().unwrap_or_default();
        let told = line.split_once(": ").map(|(_program, message)| message);
        assert_eq!(told, Some(*expected), "{arguments}\n{said}");
    }
}

#[test]
fn a_kernel_without_write_protection_is_refused() {
    let scratch = Scratch::new();
    let backend = Backend::start(&scratch.image("image", SIZE, CLUSTER), &[]);
    let machine = Qemu::new().on_old_kernel().pcow(&backend).args(&["-S"]);
    let said = machine.refusal();
    let reason = "the kernel's userfaultfd lacks write protection or remap events";
    assert!(said.contains(reason), "{said}");
}

#[test]
fn who_set_prealloc_without_naming_this_memory_is_told_how() {
    let scratch = Scratch::new();
    let backend = Backend::start(&scratch.image("image", SIZE, CLUSTER), &[]);
    let object = "-mem-prealloc -object memory-backend-pcow,id=pm,chardev=c0";
    let said = refusal(&backend, object);
    assert!(said.contains("-mem-prealloc sets it for every"), "{said}");
}

#[test]
fn a_persistent_memory_region_of_an_nvme_controller_starts_without_bounces() {
    let scratch = Scratch::new();
    let backend = Backend::start(&scratch.image("image", SIZE, CLUSTER), &[]);
    let machine = Qemu::new().chardev(backend.socket()).args(&[
        "-object",
        "memory-backend-pcow,id=pm,chardev=c0,bounce=off",
        "-device",
        "nvme,serial=1,pmrdev=pm",
        "-S",
    ]);
    let mut running = machine.start();
    running.qmp().command("quit");
    assert!(running.wait().success());
}

#[test]
fn an_image_that_is_served_read_only_needs_an_unarmed_nvdimm() {
    let scratch = Scratch::new();
    let image = scratch.image("image", SIZE, CLUSTER);
    let backend = Backend::start(&image, &["--read-only"]);
    let object = "-object memory-backend-pcow,id=pm,chardev=c0";
    let said = refusal(&backend, &format!("{object} -device nvdimm,memdev=pm"));
    assert!(said.contains("'unarmed' property must be 'on'"), "{said}");
    let device = ["-device", "nvdimm,memdev=pm,unarmed=on", "-S"];
    let machine = Qemu::new().chardev(backend.socket());
    let machine = machine.args(&object.split(' ').collect::<Vec<_>>());
    let mut running = machine.args(&device).start();
    running.qmp().command("quit");
    assert!(running.wait().success());
}
