// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What users of `qemu-img` type without thinking; `commit`; and what is made of the definitions of the command line.

use serde_json::json;

use crate::content::raw;
use crate::harness::{MIB, Sandbox};

#[test]
fn create_takes_the_options_of_qemu_img() {
    let s = Sandbox::new();
    s.ok(&["create", "-f", "pcow", "-o", "size=4M,cluster_size=4K", "a"]);
    let info = s.json(&["info", "a"]);
    assert_eq!(
        (&info["virtual-size"], &info["cluster-size"]),
        (&(4 * MIB).into(), &4096.into())
    );
    raw(&s, "disk", 4 * MIB, &[(0, &[1])]);
    s.ok(&["create", "-b", "disk", "-F", "raw", "b"]);
    s.ok(&[
        "create",
        "-o",
        "backing_file=disk,backing_fmt=raw,preallocation=metadata",
        "c",
        "8M",
    ]);
    assert_eq!((s.load("b", 0), s.load("c", 0)), (1, 1));
    s.refused(
        &["create", "-o", "lazy_refcounts=on", "d", "4M"],
        64,
        &["lazy_refcounts"],
    );
    s.refused(&["create", "-o", "size=4M", "d", "8M"], 64, &["twice"]);
    s.refused(&["create", "-o", "size", "d"], 64, &["size=VALUE"]);
    s.refused(&["create", "-f", "qcow2", "d", "4M"], 64, &["qcow2"]);
}

#[test]
fn snapshot_takes_the_commands_of_qemu_img() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    s.ok(&["snapshot", "-c", "first", "vm"]);
    s.store("vm", 0, 1);
    s.ok(&["snapshot", "-c", "second", "vm"]);
    assert_eq!(s.ok(&["snapshot", "-l", "vm"]), s.ok(&["list", "vm"]));
    s.ok(&["snapshot", "-a", "first", "vm"]);
    assert_eq!(s.load("vm", 0), 0);
    s.ok(&["snapshot", "-d", "second", "vm"]);
    let names = s.json(&["list", "vm"]);
    assert_eq!(names["snapshots"].as_array().unwrap().len(), 1);
    s.refused(
        &["snapshot", "-c", "x", "-l", "vm"],
        64,
        &["cannot be used with"],
    );
    s.refused(
        &["snapshot", "-c", "x", "vm", "y"],
        64,
        &["cannot be used with"],
    );
}

#[test]
fn rebase_takes_the_options_of_qemu_img_and_flattens() {
    let s = Sandbox::new();
    raw(&s, "disk", 4 * MIB, &[(0, &[1]), (MIB, &[1])]);
    raw(&s, "other", 4 * MIB, &[(0, &[2])]);
    s.ok(&["create", "vm", "-b", "disk", "-F", "raw"]);
    s.ok(&["rebase", "-b", "other", "-F", "raw", "vm"]);
    assert_eq!((s.load("vm", 0), s.load("vm", MIB)), (1, 1));
    s.ok(&["create", "loose", "-b", "disk", "-F", "raw"]);
    s.ok(&["rebase", "-u", "-b", "other", "-F", "raw", "loose"]);
    assert_eq!(s.load("loose", 0), 2);
    let done = s.json(&["rebase", "--flatten", "loose"]);
    assert_eq!((&done["base"], &done["safe"]), (&json!(null), &json!(true)));
    std::fs::remove_file(s.path("other")).unwrap();
    assert_eq!(s.load("loose", 0), 2);
    s.refused(&["rebase", "vm"], 64, &["required"]);
    s.refused(
        &["rebase", "--flatten", "vm", "other"],
        64,
        &["cannot be used with"],
    );
}

#[test]
fn commit_gives_up_a_snapshot_and_keeps_the_disk() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    s.store("vm", 0, 1);
    s.ok(&["snapshot", "vm", "first"]);
    s.store("vm", MIB, 2);
    let done = s.json(&["commit", "vm"]);
    assert_eq!(
        (&done["snapshot"]["name"], &done["copied-size"]),
        (&json!("first"), &json!(65536))
    );
    assert_eq!((s.load("vm", 0), s.load("vm", MIB)), (1, 2));
    let info = s.json(&["info", "vm"]);
    assert_eq!(info["layers"].as_array().unwrap().len(), 1);
    s.ok(&["check", "vm"]);
    s.refused(&["commit", "vm"], 1, &["lies on no snapshot"]);
    s.ok(&["snapshot", "vm", "trunk"]);
    s.store("vm", 0, 3);
    s.ok(&["snapshot", "vm", "branch"]);
    s.ok(&["rollback", "vm", "trunk"]);
    s.refused(
        &["commit", "vm"],
        1,
        &["other snapshots need", "delete them first"],
    );
}

#[test]
fn every_shell_has_its_completions_and_every_command_its_page() {
    let s = Sandbox::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = s.ok(&["completions", shell]);
        assert!(script.contains("rollback"), "{shell}");
    }
    assert_eq!(s.json(&["completions", "fish"])["shell"], "fish");
    let written = s.json(&["man", "."]);
    assert!(written["files"].as_array().unwrap().len() > 15, "{written}");
    let page = std::fs::read_to_string(s.path("pcow-img-rollback.1")).unwrap();
    assert!(
        page.contains("pcow\\-img\\-rollback") && page.contains("discard"),
        "{page}"
    );
    s.refused(&["man", "nowhere"], 1, &["nowhere"]);
}

#[test]
fn doctor_says_what_is_missing() {
    let s = Sandbox::new();
    let finished = s.run(&["doctor", "--qemu", "no-such-program", "--output", "json"]);
    finished.expect(finished.code() == 1, "exit code 1");
    let found = finished.json();
    let checks = found["checks"].as_array().unwrap();
    let names: Vec<_> = checks.iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "kernel",
            "userfaultfd",
            "map count",
            "DAX",
            "reflink",
            "QEMU",
            "qemu-img"
        ]
    );
    let qemu = checks.iter().find(|c| c["name"] == "QEMU").unwrap();
    assert_eq!(qemu["result"], "missing");
    assert!(qemu["advice"].as_str().unwrap().contains("--qemu"));
    let left = std::fs::read_dir(s.path(".")).unwrap().count();
    assert_eq!(left, 0);
    s.refused(&["doctor", "nowhere"], 1, &["nowhere", "written to"]);
}
