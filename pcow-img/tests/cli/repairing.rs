// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `check` with its options: faults of structure are found, and what can be mended is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde_json::Value;

use crate::harness::{MIB, Sandbox, store};

/// An image with a snapshot, data in both layers.
fn image() -> Sandbox {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    s.store("vm", 0, 1);
    s.ok(&["snapshot", "vm", "first"]);
    s.store("vm", MIB, 2);
    s
}

/// The data file of the layer that is active, or of the other one.
fn data(s: &Sandbox, active: bool) -> PathBuf {
    let info = s.json(&["info", "vm"]);
    let layers = info["layers"].as_array().unwrap();
    let layer = layers.iter().find(|l| l["active"] == active).unwrap();
    s.path(layer["filename"].as_str().unwrap())
}

/// Runs `check` with these options, which must end with `code`.
#[track_caller]
fn check(s: &Sandbox, options: &[&str], code: i32) -> Value {
    let finished = s.run(&[&["check", "vm", "--output", "json"], options].concat());
    finished.expect(finished.code() == code, &format!("exit code {code}"));
    finished.json()
}

/// Does damage to an image.
type Break = fn(&Sandbox);

#[test]
fn faults_of_structure_are_found() {
    let faults: [(&str, Break); 9] = [
        ("a data file that is gone", |s| {
            std::fs::remove_file(data(s, false)).unwrap()
        }),
        ("a map that is gone", |s| {
            std::fs::remove_file(data(s, false).with_extension("map")).unwrap();
        }),
        ("the active data file that is gone", |s| {
            std::fs::remove_file(data(s, true)).unwrap()
        }),
        ("a shorter data file", |s| {
            truncate(&data(s, false), 4 * MIB - 4096)
        }),
        ("a shorter active data file", |s| {
            truncate(&data(s, true), 0)
        }),
        ("a longer map", |s| {
            truncate(&data(s, true).with_extension("map"), 1 << 20)
        }),
        ("a map of another layer", |s| {
            let (from, to) = (data(s, true), data(s, false));
            std::fs::copy(from.with_extension("map"), to.with_extension("map")).unwrap();
        }),
        ("another size in the root", |s| {
            s.edit_root("vm", true, |t| {
                t.replace("\"virtual-size\": 4194304", "\"virtual-size\": 6291456")
            });
        }),
        ("a layer that is its own parent", |s| {
            let sealed = data(s, false);
            let name = sealed.file_stem().unwrap().to_str().unwrap();
            s.edit_root("vm", true, |t| {
                t.replace("\"parent\": null", &format!("\"parent\": \"{name}\""))
            });
        }),
    ];
    for (name, break_it) in faults {
        let s = image();
        break_it(&s);
        let before = s.state();
        let finished = s.run(&["check", "vm"]);
        finished.expect(finished.code() == 2, name);
        // A repair that can do nothing does nothing.
        let repaired = s.run(&["check", "--repair", "vm"]);
        repaired.expect(repaired.code() == 2, name);
        assert!(before == s.state(), "{name}: the repair changed something");
    }
}

fn truncate(path: &std::path::Path, len: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

#[test]
fn a_repair_gives_space_back_and_removes_what_is_not_part_of_the_image() {
    let s = image();
    let leftover = s.path("vm/0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a.data");
    std::fs::write(&leftover, "left by a crash").unwrap();
    let active = File::options().write(true).open(data(&s, true)).unwrap();
    active.write_all_at(&[1; 4096], 3 * MIB).unwrap();
    s.ok(&["convert", "vm", "before"]);
    assert_eq!(check(&s, &[], 3)["leaks"], 2);
    let found = check(&s, &["--repair"], 0);
    assert_eq!(found["repaired"].as_array().unwrap().len(), 2, "{found}");
    assert!(!leftover.exists());
    s.ok(&["compare", "vm", "before"]);
    assert_eq!(
        check(&s, &["--repair"], 0)["repaired"],
        Value::from(Vec::<Value>::new())
    );
}

#[test]
fn a_repair_forgets_states_past_the_end_and_a_failed_flush() {
    let s = image();
    let map = File::options()
        .write(true)
        .open(data(&s, true).with_extension("map"))
        .unwrap();
    map.write_all_at(&[1], 4096 + 64).unwrap();
    File::create(s.path("vm/flush-failed")).unwrap();
    assert_eq!(check(&s, &[], 2)["check-errors"], 1);
    s.refused(&["snapshot", "vm"], 1, &["flush"]);
    let problems = || s.json(&["info", "vm"])["problems"].clone();
    let problem = problems()[0].to_string();
    assert!(problem.contains("a flush of this image has failed"));
    let found = check(&s, &["--repair"], 0);
    assert_eq!(problems(), Value::from(Vec::<Value>::new()));
    assert_eq!(found["repaired"].as_array().unwrap().len(), 2, "{found}");
    assert_eq!((s.load("vm", 0), s.load("vm", MIB)), (1, 2));
}

/// The tag of another boot stands in the map, as after a start of the machine.
fn of_another_boot(s: &Sandbox) {
    let image = s.image("vm");
    store(&image, 2 * MIB, 3);
    drop(image);
    let path = data(s, true).with_extension("map");
    let map = File::options().read(true).write(true).open(path).unwrap();
    let mut tag = [0; 40];
    map.read_exact_at(&mut tag, 1024).unwrap();
    tag[0] ^= 1;
    let sum = crc32c::crc32c(&tag[..32]);
    tag[32..36].copy_from_slice(&sum.to_le_bytes());
    map.write_all_at(&tag, 1024).unwrap();
}

#[test]
fn what_was_not_flushed_before_an_orderly_end_can_be_trusted() {
    let s = image();
    of_another_boot(&s);
    let found = check(&s, &["--trust-live"], 0);
    assert!(
        found["repaired"][0]
            .as_str()
            .unwrap()
            .starts_with("1 clusters"),
        "{found}"
    );
    assert_eq!(found["unflushed-clusters"], 0);
    assert_eq!(s.load("vm", 2 * MIB), 3);
    // Without it the next opening gives it up.
    let s = image();
    of_another_boot(&s);
    assert_eq!(s.load("vm", 2 * MIB), 0);
}

#[test]
fn what_was_not_flushed_before_a_forced_shutdown_can_be_given_up() {
    let s = image();
    let image = s.image("vm");
    store(&image, 2 * MIB, 3);
    drop(image);
    let found = check(&s, &["--discard-live"], 3);
    assert!(
        found["repaired"][0]
            .as_str()
            .unwrap()
            .starts_with("1 clusters"),
        "{found}"
    );
    assert_eq!((s.load("vm", MIB), s.load("vm", 2 * MIB)), (2, 0));
    s.refused(
        &["check", "--discard-live", "--trust-live", "vm"],
        64,
        &["cannot be used with"],
    );
}

#[test]
fn a_flush_leaves_nothing_to_lose() {
    let s = image();
    let image = s.image("vm");
    store(&image, 2 * MIB, 3);
    drop(image);
    assert_eq!(check(&s, &[], 0)["unflushed-clusters"], 1);
    assert_eq!(s.json(&["flush", "vm"])["filename"], "vm");
    assert_eq!(check(&s, &[], 0)["unflushed-clusters"], 0);
    s.refused(&["flush", "nowhere"], 1, &["cannot flush"]);
}

#[test]
fn all_data_can_be_read() {
    let s = image();
    check(&s, &["--data"], 0);
    truncate(&data(&s, false), MIB);
    check(&s, &["--data"], 2);
}
