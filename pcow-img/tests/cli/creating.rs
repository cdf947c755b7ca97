// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `create`: sizes, both forms of its command line, bases of every kind.

use std::os::unix::fs::MetadataExt;

use crate::harness::{MIB, Sandbox};

#[test]
fn an_image_of_128_gib_takes_less_than_4_mib() {
    let s = Sandbox::new();
    let made = s.json(&["create", "vm.pcow", "128G"]);
    assert_eq!(made["virtual-size"], 128_u64 << 30);
    assert_eq!(
        (&made["cluster-size"], &made["format"]),
        (&65536.into(), &"pcow".into())
    );
    assert!(s.allocated("vm.pcow") < 4 * MIB);
    assert_eq!(s.json(&["info", "vm.pcow"])["virtual-size"], 128_u64 << 30);
}

#[test]
fn a_size_that_a_guest_may_not_see_whole_is_warned_of() {
    let s = Sandbox::new();
    let odd = s.run(&["create", "-q", "odd", "200M"]);
    odd.expect(odd.code() == 0 && odd.stdout().is_empty(), "success");
    odd.expect(
        odd.stderr().contains("warning: ") && odd.stderr().contains("72 MiB"),
        "a warning",
    );
    let even = s.run(&["create", "even", "256M"]);
    even.expect(even.code() == 0 && even.stderr().is_empty(), "none");
}

#[test]
fn the_older_command_line_means_kib_and_gib_and_a_base() {
    let s = Sandbox::new();
    s.ok(&["create", "64", "128", "my_first_pcow.img"]);
    s.store("my_first_pcow.img", MIB, 7);
    s.ok(&["create", "4", "1", "clone.img", "my_first_pcow.img"]);
    let info = s.json(&["info", "my_first_pcow.img"]);
    assert_eq!(info["cluster-size"], 64 << 10);
    assert_eq!(info["virtual-size"], 128_u64 << 30);
    let info = s.json(&["info", "clone.img"]);
    assert_eq!(
        (&info["cluster-size"], &info["virtual-size"]),
        (&4096.into(), &(1 << 30).into())
    );
    assert_eq!(s.load("clone.img", MIB), 7);
}

#[test]
fn the_older_form_is_told_from_the_new_one_by_the_number_of_arguments() {
    let s = Sandbox::new();
    // Two arguments are image and size, even if both are numbers.
    s.ok(&["create", "64", "4194304"]);
    assert_eq!(s.json(&["info", "64"])["virtual-size"], 4 * MIB);
    let refuse = |args: &[&str], parts: &[&str]| s.refused(args, 64, parts);
    refuse(&["create", "64", "128"], &["the smallest is 2M"]);
    refuse(
        &["create", "64K", "1", "a"],
        &["too many arguments", "IMAGE [BASE]"],
    );
    refuse(&["create", "a", "4M", "b"], &["too many arguments"]);
    refuse(&["create", "64", "0", "a"], &["the smallest is 2M"]);
    refuse(
        &["create", "63", "1", "a"],
        &["cluster size of 64512 bytes"],
    );
    refuse(&["create", "64", "8192", "a"], &["the largest is 8388606M"]);
    refuse(
        &["create", "64", "99999999999999999999999", "a"],
        &["the largest is"],
    );
    refuse(
        &["create", "64", "1", "a", "--cluster-size", "4K"],
        &["--cluster-size"],
    );
}

#[test]
fn impossible_sizes_are_refused_with_the_nearest_possible_ones() {
    let s = Sandbox::new();
    let refuse = |args: &[&str], parts: &[&str]| s.refused(args, 64, parts);
    refuse(
        &["create", "a", "5M"],
        &["5242880 bytes", "the nearest are 4M and 6M"],
    );
    refuse(&["create", "a", "8T"], &["the largest is 8388606M"]);
    refuse(&["create", "a", "1.5G"], &["'1.5G' is not a size"]);
    refuse(&["create", "a"], &["needs a size"]);
    refuse(
        &["create", "a", "4M", "--cluster-size", "3K"],
        &["power of two from 4 KiB"],
    );
    refuse(
        &["create", "a", "4M", "--allocation-unit", "3M"],
        &["power of two up to 1G"],
    );
    refuse(
        &["create", "a", "4M", "--allocation-unit", "4K"],
        &["smaller than a cluster"],
    );
    refuse(&["create", "a", "4M", "--base-format", "raw"], &["--base"]);
    s.ok(&["create", "a", "8388606M"]);
}

#[test]
fn a_wrong_unit_is_refused_before_the_base_gets_a_snapshot() {
    let s = Sandbox::new();
    s.ok(&["create", "base", "4M"]);
    s.store("base", 0, 1);
    let args = ["create", "a", "--base", "base", "--allocation-unit", "4K"];
    s.refused(&args, 64, &["smaller than a cluster"]);
}

#[test]
fn cluster_size_and_allocation_unit_are_as_asked() {
    let s = Sandbox::new();
    let args = [
        "create",
        "a",
        "4M",
        "--cluster-size",
        "4k",
        "--allocation-unit",
        "2MiB",
    ];
    let made = s.json(&args);
    assert_eq!(
        (&made["cluster-size"], &made["allocation-unit"]),
        (&4096.into(), &(2 * MIB).into())
    );
}

#[test]
fn a_clone_has_the_size_and_bytes_of_its_base_and_shares_its_files() {
    let s = Sandbox::new();
    s.ok(&["create", "base", "8M"]);
    s.store("base", MIB, 1);
    let made = s.json(&["create", "clone", "--base", "base"]);
    assert_eq!(made["virtual-size"], 8 * MIB);
    assert_eq!(made["sealed-base-as"], "base-of-clone");
    assert_eq!(made["copied-size"], 0);
    s.store("base", MIB, 2);
    assert_eq!((s.load("clone", MIB), s.load("base", MIB)), (1, 2));
    s.store("clone", MIB, 3);
    assert_eq!((s.load("clone", MIB), s.load("base", MIB)), (3, 2));
    let info = s.json(&["info", "clone"]);
    assert!(info["shared-size"].as_u64() >= Some(64 << 10), "{info}");
    assert_eq!(info["bases"][0]["image"], s.json(&["info", "base"])["uuid"]);
    std::fs::remove_dir_all(s.path("base")).unwrap();
    assert_eq!(s.load("clone", MIB), 3);
    s.ok(&["check", "clone"]);
}

#[test]
fn a_clone_of_a_snapshot_shows_that_snapshot_even_while_the_base_is_in_use() {
    let s = Sandbox::new();
    s.ok(&["create", "base", "4M"]);
    s.store("base", 0, 1);
    s.ok(&["snapshot", "base", "old"]);
    s.store("base", 0, 2);
    let held = s.image("base");
    let made = s.json(&["create", "a", "--base", "base@old", "6M"]);
    assert_eq!(
        (&made["sealed-base-as"], &made["virtual-size"]),
        (&().into(), &(6 * MIB).into())
    );
    s.ok(&["create", "b", "--base", "base@1"]);
    let advice = ["in use by process", "--base base@SNAPSHOT"];
    s.refused(&["create", "c", "--base", "base"], 1, &advice);
    drop(held);
    assert_eq!((s.load("a", 0), s.load("b", 0)), (1, 1));
}

#[test]
fn a_referenced_base_keeps_its_files_where_they_are() {
    let s = Sandbox::new();
    s.ok(&["create", "base", "4M"]);
    s.store("base", 0, 1);
    s.ok(&["create", "a", "--base", "base", "--reference"]);
    assert_eq!(s.load("a", 0), 1);
    let info = s.json(&["info", "a"]);
    let base = s.path("base").canonicalize().unwrap();
    assert_eq!(info["backing-filename"], base.to_str().unwrap());
    assert_eq!(info["backing-filename-format"], "pcow");
    assert_eq!(info["bases"][0]["usage"], "referenced");
    assert_eq!(info["shared-size"], 0);
    std::fs::rename(s.path("base"), s.path("gone")).unwrap();
    s.refused(
        &["snapshot", "a"],
        1,
        &["base", "is not there", "put the base back"],
    );
    s.refused(&["map", "a"], 1, &["is not there"]);
}

#[test]
fn a_raw_base_is_used_only_when_its_format_is_said() {
    let s = Sandbox::new();
    std::fs::write(s.path("disk.raw"), vec![3; 4096]).unwrap();
    let args = ["create", "a", "--base", "disk.raw"];
    s.refused(
        &args,
        1,
        &["is a file, not a pcow image", "--base-format raw"],
    );
    s.ok(&[&args[..], &["--base-format", "raw"]].concat());
    assert_eq!((s.load("a", 4095), s.load("a", 4096)), (3, 0));
    let info = s.json(&["info", "a"]);
    assert_eq!(
        (&info["virtual-size"], &info["backing-filename-format"]),
        (&(2 * MIB).into(), &"raw".into())
    );
    // A raw file that looks like an image is raw all the same.
    s.ok(&["create", "base", "4M"]);
    let root = std::fs::read(s.path("base/image.json")).unwrap();
    std::fs::copy(s.path("base/image.json"), s.path("looks.raw")).unwrap();
    s.ok(&["create", "b", "--base", "looks.raw", "--base-format", "raw"]);
    assert_eq!(s.load("b", 2), root[2]);
    let args = ["create", "c", "--base", "base", "--base-format", "raw"];
    s.refused(&args, 1, &["is a directory, not a raw file"]);
}

#[test]
fn a_base_elsewhere_is_warned_of_and_works_with_its_directory_allowed() {
    let (s, elsewhere) = (Sandbox::new(), Sandbox::new());
    std::fs::write(elsewhere.path("disk.raw"), vec![3; 4096]).unwrap();
    let (raw, dir) = (elsewhere.path("disk.raw"), elsewhere.path("."));
    let (raw, dir) = (raw.to_str().unwrap(), dir.to_str().unwrap());
    let made = s.run(&["create", "a", "--base", raw, "--base-format", "raw"]);
    made.expect(made.code() == 0, "success");
    made.expect(made.stderr().contains("--base-dir DIR"), "a warning");
    s.refused(&["map", "a"], 1, &["outside the directories", "--base-dir"]);
    s.ok(&["map", "a", "--base-dir", dir]);
    s.ok(&["--base-dir", dir, "snapshot", "a"]);
    let args = [
        "create",
        "b",
        "--base",
        raw,
        "--base-format",
        "raw",
        "--base-dir",
        dir,
    ];
    s.ok(&args);
}

#[test]
fn what_exists_is_never_replaced() {
    let s = Sandbox::new();
    s.ok(&["create", "a", "4M"]);
    std::fs::write(s.path("file"), "precious").unwrap();
    std::fs::create_dir(s.path("dir")).unwrap();
    for name in ["a", "file", "dir"] {
        s.refused(
            &["create", name, "4M"],
            1,
            &["exists already", "choose another name"],
        );
    }
    s.refused(
        &["create", "nowhere/a", "4M"],
        1,
        &["nowhere", "No such file"],
    );
}

#[test]
fn the_files_of_an_image_belong_to_its_owner_alone() {
    let s = Sandbox::new();
    s.ok(&["create", "a", "4M"]);
    for entry in std::fs::read_dir(s.path("a")).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().mode();
        assert_eq!(mode & 0o077, 0, "{:?}", entry.file_name());
    }
}
