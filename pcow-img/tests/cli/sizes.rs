// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `resize`, `compact`, and `create --preallocation`: how large a disk is, and what it takes.

use serde_json::json;

use crate::content::raw;
use crate::harness::{MIB, Sandbox};

#[test]
fn a_disk_grows_and_keeps_what_it_holds() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    let done = s.json(&["resize", "vm", "8M"]);
    let expected = json!({"filename": "vm", "virtual-size": 8 * MIB, "old-size": 4 * MIB});
    assert_eq!(done, expected);
    // Empty: the layer was replaced, not covered.
    assert_eq!(
        s.json(&["info", "vm"])["layers"].as_array().unwrap().len(),
        1
    );
    s.store("vm", 7 * MIB, 1);
    s.ok(&["snapshot", "vm", "small"]);
    s.ok(&["resize", "vm", "+8M"]);
    s.store("vm", 15 * MIB, 2);
    s.ok(&["resize", "vm", "32M"]);
    assert_eq!((s.load("vm", 7 * MIB), s.load("vm", 15 * MIB)), (1, 2));
    assert_eq!(s.load("vm", 31 * MIB), 0);
    s.ok(&["check", "vm"]);
    s.ok(&["rollback", "vm", "small"]);
    assert_eq!(s.json(&["info", "vm"])["virtual-size"], 8 * MIB);
}

#[test]
fn what_a_disk_lost_by_shrinking_is_not_there_when_it_grows_again() {
    let s = Sandbox::new();
    raw(&s, "disk", 8 * MIB, &[(0, &[1; 10]), (7 * MIB, &[2; 10])]);
    s.ok(&["create", "vm", "--base", "disk", "--base-format", "raw"]);
    s.store("vm", 6 * MIB, 3);
    s.refused(&["resize", "vm", "4M"], 1, &["--shrink"]);
    s.ok(&["resize", "--shrink", "vm", "-4M"]);
    s.ok(&["resize", "vm", "8M"]);
    assert_eq!(s.load("vm", 0), 1);
    assert_eq!((s.load("vm", 6 * MIB), s.load("vm", 7 * MIB)), (0, 0));
    s.ok(&["check", "vm"]);
    s.refused(&["resize", "vm", "3M"], 64, &["the nearest are 2M and 4M"]);
    s.refused(&["resize", "vm", "-9M"], 64, &["out of range"]);
}

#[test]
fn compact_gives_back_zeros_copies_of_the_base_and_what_is_not_used() {
    let s = Sandbox::new();
    let ones = vec![1; usize::try_from(2 * MIB).unwrap()];
    raw(&s, "disk", 8 * MIB, &[(0, &ones)]);
    s.ok(&["create", "vm", "--base", "disk", "--base-format", "raw"]);
    // The base's bytes, zeros over the base, zeros over nothing, and something new.
    s.run_with_input(&["write", "vm", "0"], &ones[..1 << 20]);
    s.run_with_input(&["write", "vm", "1M"], &vec![0; 1 << 20]);
    s.run_with_input(&["write", "vm", "4M"], &vec![0; 1 << 20]);
    s.run_with_input(&["write", "vm", "6M"], &[5; 65_536]);
    s.ok(&["convert", "vm", "before"]);
    let taken = s.allocated("vm");
    let done = s.json(&["compact", "vm"]);
    assert_eq!(done["dropped-clusters"], 48);
    let freed = done["freed-size"].as_u64().unwrap();
    assert!(freed >= 3 * MIB, "{freed}");
    assert!(s.allocated("vm") + freed <= taken, "{freed}");
    s.ok(&["compare", "vm", "before"]);
    s.ok(&["check", "vm"]);
    assert_eq!(s.json(&["compact", "vm"])["freed-size"], 0);
}

#[test]
fn a_compaction_takes_back_space_that_check_calls_leaked() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "8M"]);
    let data = std::fs::File::options()
        .write(true)
        .open(s.active_data("vm"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&data, &[1; 4096], MIB).unwrap();
    assert_eq!(s.run(&["check", "vm"]).code(), 3);
    s.ok(&["compact", "vm"]);
    s.ok(&["check", "vm"]);
}

#[test]
fn preallocation_takes_the_space_that_it_names_at_once() {
    let s = Sandbox::new();
    s.ok(&["create", "off", "64M"]);
    s.ok(&["create", "map", "64G", "--preallocation", "metadata"]);
    s.ok(&["create", "full", "64M", "--preallocation", "full"]);
    assert!(s.allocated("off") < MIB);
    assert!(
        (256 << 10..MIB).contains(&s.allocated("map")),
        "{}",
        s.allocated("map")
    );
    assert!(s.allocated("full") >= 64 * MIB);
    for image in ["off", "map", "full"] {
        s.ok(&["check", image]);
    }
    raw(&s, "disk", 4 * MIB, &[(MIB, &[7; 100])]);
    s.ok(&[
        "create",
        "vm",
        "--base",
        "disk",
        "--base-format",
        "raw",
        "--preallocation",
        "full",
    ]);
    assert!(s.allocated("vm") >= 4 * MIB);
    s.ok(&["compare", "-F", "raw", "vm", "disk"]);
}
