// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `convert` and `measure`, with `qemu-img` as the judge where it is there.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::content::raw;
use crate::harness::{MIB, Sandbox, wait_until};

/// A raw disk of an odd size with data at its start, across clusters, and at its end.
fn disk(s: &Sandbox, name: &str) -> u64 {
    let size = 9 * MIB + 512;
    let content: &[(u64, &[u8])] = &[
        (0, &[1; 100]),
        (65_000, &[2; 5000]),
        (3 * MIB, &[3; 200_000]),
        (size - 512, &[4; 512]),
    ];
    raw(s, name, size, content);
    size
}

/// Whether qemu-img is there; a run under CI must have it.
fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    assert!(
        found || std::env::var_os("CI").is_none(),
        "CI needs qemu-img"
    );
    if !found {
        eprintln!("qemu-img is not there: nothing was compared with it");
    }
    found
}

#[test]
fn a_raw_file_becomes_an_image_and_comes_back_with_its_holes() {
    let s = Sandbox::new();
    let size = disk(&s, "disk");
    let done = s.json(&["convert", "-f", "raw", "disk", "vm"]);
    assert_eq!(done["virtual-size"], 10 * MIB);
    assert!(done["copied-size"].as_u64().unwrap() < 400_000, "{done}");
    assert!(s.allocated("vm") < 500_000, "{}", s.allocated("vm"));
    s.ok(&["compare", "-F", "raw", "vm", "disk"]);
    s.ok(&["check", "vm"]);
    s.ok(&["convert", "-O", "raw", "vm", "back"]);
    assert_eq!(std::fs::metadata(s.path("back")).unwrap().len(), 10 * MIB);
    s.ok(&["compare", "-f", "raw", "-F", "raw", "back", "disk"]);
    let blocks = s.shell("du -B1 back | cut -f1").stdout();
    assert!(blocks.trim().parse::<u64>().unwrap() < 400_000, "{blocks}");
    // In place, over what is there: also what is a hole in the source.
    std::fs::write(s.path("full"), vec![9; usize::try_from(11 * MIB).unwrap()]).unwrap();
    s.ok(&["convert", "-n", "-O", "raw", "vm", "full"]);
    s.ok(&["compare", "-f", "raw", "-F", "raw", "full", "disk"]);
    assert!(size < 10 * MIB);
}

#[test]
fn a_snapshot_is_converted_without_what_came_later() {
    let s = Sandbox::new();
    s.ok(&["create", "base", "4M"]);
    s.store("base", 0, 1);
    s.ok(&["create", "vm", "--base", "base"]);
    s.store("vm", MIB, 2);
    s.ok(&["snapshot", "vm", "first"]);
    s.store("vm", 0, 9);
    s.ok(&["convert", "--cluster-size", "4K", "vm@first", "copy"]);
    s.ok(&["compare", "vm@first", "copy"]);
    assert_eq!((s.load("copy", 0), s.load("copy", MIB)), (1, 2));
    assert_eq!(s.json(&["info", "copy"])["bases"], json!([]));
    assert_eq!(s.json(&["info", "copy"])["cluster-size"], 4096);
    s.ok(&["check", "copy"]);
}

#[test]
fn a_raw_file_that_begins_like_something_else_is_raw() {
    let s = Sandbox::new();
    raw(&s, "disk", 2 * MIB, &[(0, b"QFI\xfb\0\0\0\x03")]);
    s.ok(&["convert", "-f", "raw", "disk", "vm"]);
    assert_eq!(s.run(&["read", "vm", "0", "4"]).bytes(), b"QFI\xfb");
    s.refused(
        &["convert", "disk", "other"],
        1,
        &["formats are never guessed"],
    );
    s.refused(
        &["convert", "-f", "raw", "vm", "other"],
        1,
        &["it is a directory"],
    );
}

#[test]
fn a_target_that_exists_is_never_replaced() {
    let s = Sandbox::new();
    disk(&s, "disk");
    s.ok(&["create", "vm", "4M"]);
    s.refused(
        &["convert", "-f", "raw", "disk", "vm"],
        1,
        &["exists already"],
    );
    s.refused(
        &["convert", "-O", "raw", "vm", "disk"],
        1,
        &["exists already", "-n"],
    );
    s.refused(&["convert", "-n", "vm", "disk"], 64, &["-O raw"]);
    raw(&s, "small", MIB, &[]);
    s.refused(
        &["convert", "-n", "-O", "raw", "vm", "small"],
        1,
        &["has 1048576 bytes"],
    );
    s.refused(&["convert", "-f", "qcow2", "disk", "new"], 1, &["disk"]);
}

#[test]
fn raw_to_pcow_to_qcow2_to_raw_is_the_same_disk() {
    if !has_qemu_img() {
        return;
    }
    let s = Sandbox::new();
    disk(&s, "disk");
    s.ok(&["convert", "-f", "raw", "disk", "vm"]);
    s.ok(&["convert", "-O", "qcow2", "vm", "vm.qcow2"]);
    let same = s.shell("qemu-img compare -f qcow2 -F raw vm.qcow2 disk");
    same.expect(same.code() == 0, "the same disk");
    s.ok(&["convert", "-f", "qcow2", "-O", "raw", "vm.qcow2", "back"]);
    let same = s.shell("qemu-img compare -f raw -F raw back disk");
    same.expect(same.code() == 0, "the same disk");
    s.ok(&["compare", "-f", "qcow2", "vm.qcow2", "vm"]);
    let left: Vec<_> = s
        .state()
        .into_keys()
        .filter(|p| p.extension().is_some_and(|e| e == "part"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// In the variants that `qemu-img` makes.
#[test]
fn images_of_qemu_img_read_the_same() {
    if !has_qemu_img() {
        return;
    }
    let s = Sandbox::new();
    disk(&s, "disk");
    let variants = [
        ("plain", "qcow2", "-O qcow2"),
        ("old", "qcow2", "-O qcow2 -o compat=0.10"),
        ("compressed", "qcow2", "-c -O qcow2"),
        (
            "subclusters",
            "qcow2",
            "-O qcow2 -o extended_l2=on,cluster_size=128k",
        ),
        ("small", "qcow2", "-O qcow2 -o cluster_size=512"),
        ("vmware", "vmdk", "-O vmdk"),
        ("stream", "vmdk", "-O vmdk -o subformat=streamOptimized"),
    ];
    for (name, format, options) in variants {
        let made = s.shell(&format!("qemu-img convert -f raw {options} disk {name}"));
        made.expect(made.code() == 0, "a file");
        s.ok(&["convert", "-f", format, name, &format!("{name}.pcow")]);
        s.ok(&["compare", "-F", "raw", &format!("{name}.pcow"), "disk"]);
    }
    let made = s.shell("qemu-img create -q -f qcow2 -b plain -F qcow2 top && qemu-io -f qcow2 -c 'write -P 7 1M 64k' top");
    made.expect(made.code() == 0, "a chain");
    s.ok(&["convert", "-f", "qcow2", "top", "top.pcow"]);
    s.ok(&["convert", "-O", "raw", "top.pcow", "top.raw"]);
    let same = s.shell("qemu-img compare -f qcow2 -F raw top top.raw");
    same.expect(same.code() == 0, "the same disk");
}

#[test]
fn what_is_measured_is_what_it_takes() {
    let s = Sandbox::new();
    let size = 64 * MIB;
    let data: Vec<u8> = vec![5; 100_000];
    let content: Vec<(u64, &[u8])> = (0..60).map(|n| (n * MIB + 4096, data.as_slice())).collect();
    raw(&s, "disk", size, &content);
    let measured = s.json(&["measure", "-f", "raw", "disk"]);
    s.ok(&["convert", "-f", "raw", "disk", "vm"]);
    let (required, taken) = (measured["required"].as_u64().unwrap(), s.allocated("vm"));
    assert!(
        required.abs_diff(taken) * 100 <= taken,
        "{required} for {taken}"
    );
    let again = s.json(&["measure", "vm"])["required"].as_u64().unwrap();
    assert!(again.abs_diff(taken) * 100 <= taken, "{again} for {taken}");
    let empty = s.json(&["measure", "--size", "1G"]);
    assert_eq!(empty["fully-allocated"], Value::from((1 << 30) + 4 * 4096));
    let as_raw = s.json(&["measure", "vm", "-O", "raw"]);
    assert_eq!(as_raw["fully-allocated"], size);
    let text = s.ok(&["measure", "--size", "4M", "-O", "raw"]);
    assert_eq!(text, "required size: 0\nfully allocated size: 4194304\n");
    s.refused(&["measure", "vm", "-O", "qcow2"], 64, &["qemu-img measure"]);
    s.refused(&["measure"], 64, &[]);
}

/// A file that somebody else made may refer to any file of the machine.
#[test]
fn what_a_file_refers_to_must_be_beside_it_or_allowed() {
    if !has_qemu_img() {
        return;
    }
    let s = Sandbox::new();
    std::fs::create_dir(s.path("secret")).unwrap();
    std::fs::create_dir(s.path("got")).unwrap();
    disk(&s, "secret/disk");
    for options in ["", "-o extended_l2=on,cluster_size=128k"] {
        let line = format!(
            "rm -f got/file && qemu-img create -q -f qcow2 {options} -b $PWD/secret/disk -F raw got/file"
        );
        let made = s.shell(&line);
        made.expect(made.code() == 0, "a file");
        let convert = ["convert", "-f", "qcow2", "got/file", "vm"];
        let finished = s.run(&convert);
        finished.expect(finished.code() == 1 && !s.path("vm").exists(), "a refusal");
    }
    let made =
        s.shell("rm got/file && qemu-img create -q -f qcow2 -b ../secret/disk -F raw got/file");
    made.expect(made.code() == 0, "a file");
    let convert = ["convert", "-f", "qcow2", "got/file", "vm"];
    s.refused(&convert, 1, &["--base-dir", "secret/disk"]);
    s.ok(&[&convert[..], &["--base-dir", "secret"]].concat());
    s.ok(&["compare", "-F", "raw", "vm", "secret/disk"]);
}

/// As with Ctrl-C, as soon as something is on its way.
#[test]
fn a_conversion_that_is_interrupted_leaves_no_target_or_a_whole_one() {
    let s = Sandbox::new();
    let block = vec![7; 1 << 20];
    let content: Vec<(u64, &[u8])> = (0..64).map(|n| (n * 2 * MIB, block.as_slice())).collect();
    raw(&s, "disk", 128 * MIB, &content);
    let targets: [(&[&str], &str); 2] = [
        (&["-f", "raw", "disk", "vm"], "vm"),
        (&["-f", "raw", "-O", "raw", "disk", "copy"], "copy"),
    ];
    for (arguments, target) in targets {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pcow-img"));
        command
            .arg("convert")
            .args(arguments)
            .current_dir(s.path("."));
        let mut child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
        let names = || {
            std::fs::read_dir(s.path("."))
                .unwrap()
                .map(|e| e.unwrap().path())
        };
        let on_its_way = || names().any(|p| p.extension().is_some_and(|e| e == "part"));
        // It is not waited for before the signal, so that its number stays its own.
        let target_is_there = || s.path(target).exists();
        wait_until(Duration::from_secs(30), || {
            on_its_way() || target_is_there()
        });
        let pid = rustix::process::Pid::from_child(&child);
        let interrupted = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        child.wait().unwrap();
        interrupted.unwrap();
        if s.path(target).exists() {
            let format = if target == "vm" { "pcow" } else { "raw" };
            s.ok(&["compare", "-f", "raw", "-F", format, "disk", target]);
        }
        // What was on its way is in nobody's way.
        let again = format!("{target}-2");
        let mut arguments = arguments.to_vec();
        *arguments.last_mut().unwrap() = &again;
        s.ok(&[&["convert"], arguments.as_slice()].concat());
    }
}
