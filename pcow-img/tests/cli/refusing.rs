// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images and arguments that are wrong: one line that says what to do, the documented exit code, nothing changed.

use crate::harness::{MIB, Sandbox};

/// All commands on an image called `vm`, those that read and those that write.
const COMMANDS: [&[&str]; 7] = [
    &["info", "vm"],
    &["list", "vm"],
    &["map", "vm"],
    &["snapshot", "vm", "new"],
    &["rollback", "vm", "old"],
    &["rebase", "vm", "none"],
    &["create", "clone", "--base", "vm"],
];

/// The commands that need no more than the root.
const ROOT_ONLY: [&str; 2] = ["info", "list"];

fn with_snapshot() -> Sandbox {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    s.store("vm", 0, 1);
    s.ok(&["snapshot", "vm", "old"]);
    s.store("vm", 0, 2);
    s
}

#[test]
fn an_image_that_is_not_there() {
    let s = Sandbox::new();
    for args in &COMMANDS[..6] {
        s.refused(args, 1, &["vm", "No such file", "check the path"]);
    }
    s.refused(&["check", "vm"], 1, &["No such file", "check the path"]);
    s.refused(
        COMMANDS[6],
        1,
        &["cannot use the base vm", "check the path"],
    );
}

#[test]
fn something_that_is_no_image() {
    let s = Sandbox::new();
    std::fs::write(s.path("vm"), vec![0; 4096]).unwrap();
    for args in COMMANDS {
        s.refused(
            args,
            1,
            &["is a file, not a pcow image", "--base-format raw"],
        );
    }
    std::fs::remove_file(s.path("vm")).unwrap();
    std::fs::create_dir(s.path("vm")).unwrap();
    for args in COMMANDS {
        s.refused(args, 1, &["it has no image.json", "give the"]);
    }
    std::fs::write(s.path("vm/image.json"), "{}").unwrap();
    for args in COMMANDS {
        s.refused(args, 1, &["does not start like the root of a pcow image"]);
    }
}

#[test]
fn an_image_with_a_feature_or_version_of_the_future() {
    let s = with_snapshot();
    let features = "\"incompatible-features\": []";
    s.edit_root("vm", true, |t| {
        t.replace(features, "\"incompatible-features\": [\"encrypted\"]")
    });
    let parts = ["the feature 'encrypted'", "use a newer pcow"];
    for args in COMMANDS {
        s.refused(args, 1, &parts);
    }
    s.refused(&["check", "vm"], 63, &parts);
}

#[test]
fn an_image_whose_root_was_damaged() {
    let s = with_snapshot();
    s.edit_root("vm", false, |t| t.replace("4194304", "8388608"));
    for args in COMMANDS {
        s.refused(args, 1, &["image.json has a wrong checksum", "backup"]);
    }
}

#[test]
fn an_image_whose_root_is_signed_but_says_nonsense() {
    let s = with_snapshot();
    s.edit_root("vm", true, |t| {
        t.replace("\"cluster-size\": 65536", "\"cluster-size\": 65537")
    });
    for args in COMMANDS {
        s.refused(args, 1, &["cluster size", "backup"]);
    }
}

#[test]
fn an_image_whose_map_was_damaged() {
    let s = with_snapshot();
    let map = s.active_data("vm").with_extension("map");
    let mut bytes = std::fs::read(&map).unwrap();
    bytes[20] ^= 1;
    std::fs::write(map, bytes).unwrap();
    for args in COMMANDS.iter().filter(|a| !ROOT_ONLY.contains(&a[0])) {
        s.refused(args, 1, &["map header: wrong checksum", "backup"]);
    }
}

#[test]
fn an_image_without_its_raw_base_or_with_another_one() {
    let s = Sandbox::new();
    let raw = s.path("disk.raw");
    std::fs::write(&raw, vec![1; 4096]).unwrap();
    s.ok(&["create", "vm", "--base", "disk.raw", "--base-format", "raw"]);
    s.store("vm", MIB, 1);
    s.ok(&["snapshot", "vm", "old"]);
    let needing = || COMMANDS.iter().filter(|a| !ROOT_ONLY.contains(&a[0]));
    std::fs::rename(&raw, s.path("kept")).unwrap();
    for args in needing() {
        s.refused(args, 1, &["disk.raw is not there", "put the base back"]);
    }
    std::fs::write(&raw, vec![1; 4096]).unwrap();
    for args in needing() {
        s.refused(
            args,
            1,
            &["disk.raw was changed or replaced", "make a new image"],
        );
    }
    std::fs::rename(s.path("kept"), &raw).unwrap();
    for args in [COMMANDS[2], COMMANDS[3]] {
        s.ok(args);
    }
    std::fs::write(&raw, vec![2; 8192]).unwrap();
    s.refused(COMMANDS[2], 1, &["was changed or replaced"]);
}

#[test]
fn an_image_of_which_a_layer_is_gone() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    s.store("vm", 0, 1);
    let sealed = s.active_data("vm");
    s.ok(&["snapshot", "vm", "old"]);
    std::fs::remove_file(sealed).unwrap();
    for args in COMMANDS.iter().filter(|a| !ROOT_ONLY.contains(&a[0])) {
        s.refused(args, 1, &["cannot open the layer file"]);
    }
    let text = s.ok(&["info", "vm"]);
    assert!(text.contains("missing or cannot be read"), "{text}");
    assert!(text.contains("problem:"), "{text}");
}

#[test]
fn an_image_that_a_virtual_machine_keeps_after_its_backend_has_ended() {
    let s = with_snapshot();
    let served = s.image("vm");
    let in_use = served.lock().unwrap().in_use().unwrap();
    let _kept = in_use.try_clone().unwrap();
    drop(served);
    let wanted = [
        "in use by a virtual machine whose backend has ended",
        "start a backend for it",
    ];
    let writing = ["snapshot", "rollback", "rebase"];
    for args in COMMANDS.iter().filter(|a| writing.contains(&a[0])) {
        s.refused(args, 1, &wanted);
    }
    s.refused(&["check", "vm"], 1, &wanted);
    assert!(s.ok(&["info", "vm"]).contains(&wanted[0][10..]));
}

#[test]
fn an_image_that_another_process_holds() {
    let s = with_snapshot();
    let held = s.image("vm");
    let holder = format!("in use by process {}", std::process::id());
    let writing = ["snapshot", "rollback", "rebase", "create"];
    for args in COMMANDS.iter().filter(|a| writing.contains(&a[0])) {
        s.refused(args, 1, &[&holder, "stop that process"]);
    }
    s.refused(&["check", "vm"], 1, &[&holder, "stop that process"]);
    s.refused(&["rebase", "vm", "old"], 1, &["cannot use the base old"]);
    // What is sealed can be looked at meanwhile.
    s.ok(&["info", "vm"]);
    s.ok(&["list", "vm"]);
    s.ok(&["map", "vm", "--snapshot", "old"]);
    drop(held);
    s.ok(&["check", "vm"]);
    s.ok(&["snapshot", "vm", "new"]);
}

#[test]
fn a_base_that_another_process_holds() {
    let s = with_snapshot();
    s.ok(&["create", "other", "4M"]);
    let held = s.image("vm");
    // The image itself is free and was taken: its lock names the process that tried. Nothing else may differ.
    let before = s.state();
    let refused = s.run(&["rebase", "other", "vm"]);
    refused.expect(refused.code() == 1, "exit code 1");
    for part in ["cannot rebase other on 'vm'", "in use by", "IMAGE@SNAPSHOT"] {
        refused.expect(refused.stderr().contains(part), part);
    }
    let mut after = s.state();
    let lock = s.path("other/lock");
    after.insert(lock.clone(), before[&lock].clone());
    assert!(before == after);
    drop(held);
    s.ok(&["rebase", "other", "vm"]);
}

#[test]
fn an_active_file_with_two_names() {
    let s = with_snapshot();
    let data = s.active_data("vm");
    for file in [data.clone(), data.with_extension("map"), s.path("vm/lock")] {
        std::fs::hard_link(&file, s.path("second")).unwrap();
        for args in &COMMANDS[3..6] {
            s.refused(args, 1, &["name", "cp -al", "cp -a"]);
        }
        std::fs::remove_file(s.path("second")).unwrap();
    }
    s.ok(COMMANDS[3]);
}

#[test]
fn a_command_line_that_is_wrong() {
    let s = with_snapshot();
    let refuse = |args: &[&str], part: &str| s.refused(args, 64, &[part]);
    refuse(&[], "requires a subcommand");
    refuse(&["destroy", "vm"], "unrecognized subcommand 'destroy'");
    refuse(&["info"], "see 'pcow-img info --help'");
    refuse(&["info", "vm", "other"], "unexpected argument 'other'");
    refuse(&["check", "--mend", "vm"], "unexpected argument '--mend'");
    refuse(&["info", "vm", "--output", "xml"], "human, json");
    refuse(&["create"], "see 'pcow-img create --help'");
    refuse(&["create", "1", "2", "3", "4", "5"], "unexpected value '5'");
    refuse(
        &[
            "create",
            "a",
            "4M",
            "--base",
            "vm",
            "--base-format",
            "qcow2",
        ],
        "pcow, raw",
    );
}

#[test]
fn help_and_version_are_no_errors() {
    let s = Sandbox::new();
    let help = s.ok(&["--help"]);
    for line in [
        "Exit codes:",
        "  2   check: the image is corrupt",
        "  64  the command line is wrong",
    ] {
        assert!(help.contains(line), "{help}");
    }
    let help = s.ok(&["create", "--help"]);
    assert!(help.contains("CLUSTER_KIB SIZE_GIB IMAGE [BASE]"), "{help}");
    let version = s.ok(&["--version"]);
    assert_eq!(version, format!("pcow-img {}\n", env!("CARGO_PKG_VERSION")));
}
