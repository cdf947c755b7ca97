// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `snapshot`, `rollback`, `rebase`: what the disk shows afterwards, and what they say.

use serde_json::Value;

use crate::harness::{MIB, Sandbox};

fn with_two_states() -> Sandbox {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    s.store("vm", 0, 1);
    s.ok(&["snapshot", "vm", "old"]);
    s.store("vm", 0, 2);
    s
}

#[test]
fn a_snapshot_gets_the_next_number_and_the_name_that_was_given_or_one_of_its_own() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    assert_eq!(
        s.ok(&["snapshot", "vm"]),
        "vm: took snapshot 1 'snapshot-1'\n"
    );
    let taken = s.json(&["snapshot", "vm", "before upgrade"]);
    assert_eq!(
        (&taken["snapshot"]["id"], &taken["snapshot"]["name"]),
        (&"2".into(), &"before upgrade".into())
    );
    assert!(taken["snapshot"]["date-sec"].as_u64() > Some(0));
    s.refused(
        &["snapshot", "vm", "snapshot-1"],
        1,
        &["already has a snapshot"],
    );
    s.refused(&["snapshot", "vm", "2024"], 1, &["digits only"]);
    s.refused(&["snapshot", "vm", "a/b"], 1, &["must not contain"]);
}

#[test]
fn a_rollback_shows_the_old_bytes_and_a_roll_forward_the_changed_ones() {
    let s = with_two_states();
    let done = s.json(&["rollback", "vm", "old"]);
    assert_eq!(s.load("vm", 0), 1);
    assert_eq!(done["snapshot"]["id"], "1");
    let saved = done["saved-as"]["name"].as_str().unwrap();
    assert!(saved.starts_with("before-rollback-"), "{saved}");
    s.ok(&["rollback", "vm", saved]);
    assert_eq!(s.load("vm", 0), 2);
    assert_eq!(
        s.ok(&["rollback", "vm", "1"]),
        "vm: rolled back to snapshot 1 'old'\n"
    );
    assert_eq!(s.load("vm", 0), 1);
    s.ok(&["check", "vm"]);
}

#[test]
fn only_discard_throws_changes_away() {
    let s = with_two_states();
    let done = s.json(&["rollback", "--discard", "vm", "old"]);
    assert_eq!(done["saved-as"], Value::Null);
    assert_eq!(s.load("vm", 0), 1);
    assert_eq!(
        s.json(&["list", "vm"])["snapshots"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    s.ok(&["check", "vm"]);
}

#[test]
fn a_rollback_to_a_snapshot_that_is_not_there_names_those_that_are() {
    let s = with_two_states();
    let parts = ["no snapshot 'new'", "it has old"];
    s.refused(&["rollback", "vm", "new"], 1, &parts);
    s.refused(&["rollback", "vm", "2"], 1, &["no snapshot '2'"]);
}

/// `clone` on `a`, and `b`, which differs from `a` in the second MiB.
fn with_two_bases() -> Sandbox {
    let s = Sandbox::new();
    for (name, byte) in [("a", 1), ("b", 2)] {
        s.ok(&["create", name, "8M"]);
        s.store(name, MIB, byte);
    }
    s.ok(&["create", "clone", "--base", "a"]);
    s.store("clone", 2 * MIB, 3);
    s
}

#[test]
fn a_rebase_keeps_what_the_disk_shows() {
    let s = with_two_bases();
    let done = s.json(&["rebase", "clone", "b"]);
    assert_eq!((&done["base"], &done["safe"]), (&"b".into(), &true.into()));
    assert_eq!(done["written-size"], 64 << 10);
    assert_eq!(done["sealed-base-as"], "base-of-clone");
    assert_eq!((s.load("clone", MIB), s.load("clone", 2 * MIB)), (1, 3));
    s.ok(&["check", "clone"]);
}

#[test]
fn an_unsafe_rebase_shows_the_new_base() {
    let s = with_two_bases();
    let done = s.json(&["rebase", "--unsafe", "clone", "b"]);
    assert_eq!(done["safe"], false, "{done}");
    assert_eq!((s.load("clone", MIB), s.load("clone", 2 * MIB)), (2, 3));
}

#[test]
fn a_rebase_on_nothing_makes_the_image_independent() {
    for none in ["none", ""] {
        let s = with_two_bases();
        let said = s.ok(&["rebase", "clone", none]);
        assert!(said.contains("independent of any base"), "{said}");
        assert_eq!((s.load("clone", MIB), s.load("clone", 2 * MIB)), (1, 3));
        let info = s.json(&["info", "clone"]);
        assert_eq!(info["bases"].as_array().unwrap().len(), 0);
        assert_eq!(info["layers"].as_array().unwrap().len(), 1);
        s.ok(&["check", "clone"]);
    }
}

#[test]
fn a_rebase_on_a_raw_file_needs_its_format() {
    let s = with_two_bases();
    std::fs::write(s.path("disk.raw"), vec![4; 4096]).unwrap();
    s.refused(&["rebase", "clone", "disk.raw"], 1, &["--base-format raw"]);
    s.ok(&["rebase", "clone", "disk.raw", "--base-format", "raw"]);
    assert_eq!((s.load("clone", 0), s.load("clone", MIB)), (0, 1));
}

#[test]
fn a_rebase_that_cannot_be_is_refused() {
    let s = with_two_bases();
    s.refused(
        &["rebase", "clone", "clone"],
        64,
        &["cannot be its own base"],
    );
    s.refused(
        &["rebase", "clone", "./clone/"],
        64,
        &["cannot be its own base"],
    );
    s.refused(&["rebase", "clone", "b@nix"], 1, &["no snapshot 'nix'"]);
    s.refused(&["rebase", "clone", "nix"], 1, &["cannot use the base nix"]);
    s.refused(&["rebase", "clone", "b@"], 64, &["IMAGE@SNAPSHOT"]);
    s.refused(&["rebase", "nix", "b"], 1, &["cannot rebase nix"]);
}

#[test]
fn quiet_commands_say_nothing_and_json_is_said_all_the_same() {
    let s = with_two_states();
    assert_eq!(s.ok(&["snapshot", "-q", "vm"]), "");
    assert_eq!(s.ok(&["create", "--quiet", "b", "4M"]), "");
    assert_eq!(s.ok(&["check", "-q", "vm"]), "");
    assert_eq!(s.json(&["-q", "rollback", "vm", "old"])["filename"], "vm");
    assert_ne!(s.ok(&["list", "-q", "vm"]), "");
}
