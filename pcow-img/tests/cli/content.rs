// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `read`, `write`, `compare`, `diff`, and `map` of a large disk: bytes go in and come out as they are.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::json;

use crate::harness::{MIB, Sandbox};

/// A sparse file of `size` bytes with these bytes in it.
pub fn raw(s: &Sandbox, name: &str, size: u64, content: &[(u64, &[u8])]) {
    let file = File::create(s.path(name)).unwrap();
    file.set_len(size).unwrap();
    for (at, bytes) in content {
        file.write_all_at(bytes, *at).unwrap();
    }
}

#[test]
fn what_is_written_is_read_back_and_its_neighbours_stay() {
    let s = Sandbox::new();
    s.ok(&["create", "base", "4M"]);
    let written = s.run_with_input(&["write", "base", "0"], &[7; 200_000]);
    assert_eq!(written.code(), 0, "{}", written.stderr());
    s.ok(&["create", "vm", "--base", "base"]);
    std::fs::write(s.path("patch"), b"hello").unwrap();
    let done = s.json(&["write", "vm", "65534", "patch"]);
    assert_eq!(
        done,
        json!({"filename": "vm", "offset": 65534, "length": 5})
    );
    let read = s.run(&["read", "vm", "65532", "9"]);
    assert_eq!(read.bytes(), b"\x07\x07hello\x07\x07");
    assert_eq!(s.run(&["read", "base", "65534", "5"]).bytes(), [7; 5]);
    let hex = s.json(&["read", "vm", "65534", "2"]);
    assert_eq!(
        hex,
        json!({"filename": "vm", "offset": 65534, "length": 2, "data": "6865"})
    );
    assert_eq!(s.run(&["read", "vm", "3M", "1M"]).bytes(), vec![0; 1 << 20]);
    s.ok(&["check", "vm"]);
}

#[test]
fn holes_of_a_file_are_written_as_zeros_that_hide_the_base() {
    let s = Sandbox::new();
    raw(
        &s,
        "disk",
        4 * MIB,
        &[(0, &[1; 300_000]), (2 * MIB, &[2; 4096])],
    );
    s.ok(&["create", "vm", "--base", "disk", "--base-format", "raw"]);
    raw(&s, "patch", 2 * MIB, &[(MIB, &[9; 10])]);
    s.ok(&["write", "vm", "0", "patch"]);
    raw(
        &s,
        "expected",
        4 * MIB,
        &[(MIB, &[9; 10]), (2 * MIB, &[2; 4096])],
    );
    s.ok(&["compare", "-F", "raw", "vm", "expected"]);
    // Over data of the image itself, too; what was there gives its space back.
    s.ok(&["write", "vm", "0", "patch"]);
    raw(&s, "empty", 4 * MIB, &[]);
    s.ok(&["write", "vm", "0", "empty"]);
    s.ok(&["compare", "-F", "raw", "vm", "empty"]);
    s.ok(&["check", "vm"]);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "2M"]);
    raw(&s, "disk", 2 * MIB, &[]);
    s.refused(
        &["write", "vm", "1", "disk"],
        1,
        &["2097152 bytes at offset 1"],
    );
    s.refused(&["write", "vm", "3M", "disk"], 1, &["at offset 3145728"]);
    s.refused(
        &["read", "vm", "2M", "1"],
        1,
        &["the disk has 2097152 bytes"],
    );
    s.refused(&["read", "vm", "0", "x"], 64, &["is not a size"]);
    let finished = s.run_with_input(&["write", "vm", "2097150"], b"abc");
    finished.expect(finished.code() == 1, "exit code 1");
    assert_eq!(s.run(&["read", "vm", "2097150", "2"]).bytes(), b"ab");
}

#[test]
fn compare_ends_with_the_codes_of_qemu_img() {
    let s = Sandbox::new();
    s.ok(&["create", "a", "4M"]);
    s.store("a", 5000, 1);
    s.ok(&["snapshot", "a", "first"]);
    s.store("a", MIB, 2);
    assert_eq!(s.ok(&["compare", "a", "a"]), "Images are identical.\n");
    let different = s.run(&["compare", "a", "a@first"]);
    assert_eq!(different.code(), 1);
    assert_eq!(different.stdout(), "Content mismatch at offset 1048576!\n");
    let verdict = s.run(&["compare", "a@1", "a", "--output", "json"]).json();
    let expected = json!({
        "filename": "a@1", "other": "a", "identical": false,
        "first-difference": MIB, "sizes": [4 * MIB, 4 * MIB],
    });
    assert_eq!(verdict, expected);
    // A longer disk is the same if the rest of it reads zero.
    raw(&s, "longer", 5 * MIB, &[(5000, &[1])]);
    s.ok(&["compare", "-q", "-F", "raw", "a@first", "longer"]);
    let strict = s.run(&["compare", "--strict", "-F", "raw", "a@first", "longer"]);
    assert_eq!(strict.code(), 1);
    s.refused(&["compare", "a", "nowhere"], 2, &["nowhere"]);
    s.refused(
        &["compare", "a", "longer"],
        2,
        &["formats are never guessed"],
    );
    s.refused(&["compare", "a"], 64, &[]);
}

/// A copy made with `cp -a` has the same layers by name, but its active one goes its own way.
#[test]
fn copies_that_went_different_ways_are_different() {
    let s = Sandbox::new();
    s.ok(&["create", "a", "4M"]);
    s.store("a", 0, 1);
    assert_eq!(s.shell("cp -a a b").code(), 0);
    s.store("b", 0, 2);
    assert_eq!(s.run(&["compare", "a", "b"]).code(), 1);
}

#[test]
fn diff_shows_changed_pages_joined() {
    let s = Sandbox::new();
    s.ok(&["create", "a", "8M"]);
    s.store("a", 0, 1);
    s.ok(&["snapshot", "a", "first"]);
    s.store("a", 4096, 2);
    s.store("a", 8192, 2);
    s.store("a", 5 * MIB + 1, 3);
    let expected = json!([
        {"start": 4096, "length": 8192},
        {"start": 5 * MIB, "length": 4096},
    ]);
    assert_eq!(s.json(&["diff", "a@first", "a"]), expected);
    assert_eq!(s.json(&["diff", "a", "a"]), json!([]));
    assert_eq!(s.ok(&["diff", "a", "a"]), "");
    let text = "Offset          Length\n0x1000          0x2000\n0x500000        0x1000\n";
    assert_eq!(s.ok(&["diff", "a@first", "a"]), text);
}

/// The cost is what the image holds: cluster by cluster this would take two thousand million steps.
#[test]
fn the_largest_disk_is_looked_through_at_once() {
    let s = Sandbox::new();
    let size = "8388606M";
    s.ok(&["create", "vm", size, "--cluster-size", "4K"]);
    s.store("vm", 0, 1);
    s.store("vm", 7 << 40, 1);
    s.ok(&["snapshot", "vm", "first"]);
    s.store("vm", 8 << 30, 1);
    let pieces = s.json(&["map", "vm"]);
    let data = pieces
        .as_array()
        .unwrap()
        .iter()
        .filter(|p| p["data"] == true);
    assert_eq!(data.count(), 3);
    let expected = json!([{"start": 8_u64 << 30, "length": 4096}]);
    assert_eq!(s.json(&["diff", "vm@first", "vm"]), expected);
    assert_eq!(s.run(&["compare", "vm@first", "vm"]).code(), 1);
}
