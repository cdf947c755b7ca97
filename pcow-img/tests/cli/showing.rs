// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `info`, `list`, `map`, `check`: their fields, their text, their exit codes.

use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{MIB, Sandbox, output, store};

/// The names of an object's fields, sorted.
fn fields(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

/// A clone of `base` with the snapshots 1 `first`, 2 `second`, and 3 that was taken after a rollback to 1.
fn with_branches() -> Sandbox {
    let s = Sandbox::new();
    s.ok(&["create", "base", "8M"]);
    s.store("base", 0, 1);
    s.ok(&["create", "vm", "--base", "base"]);
    s.store("vm", MIB, 2);
    s.ok(&["snapshot", "vm", "first"]);
    s.store("vm", 2 * MIB, 3);
    s.ok(&["snapshot", "vm", "second"]);
    s.ok(&["rollback", "vm", "first"]);
    s.ok(&["snapshot", "vm", "third"]);
    s
}

#[test]
fn info_shows_the_whole_chain_of_files_outside_of_the_image() {
    let s = Sandbox::new();
    std::fs::write(s.path("disk.raw"), vec![1; 4 << 20]).unwrap();
    s.ok(&[
        "create",
        "base",
        "--base",
        "disk.raw",
        "--base-format",
        "raw",
    ]);
    s.store("base", 0, 2);
    s.ok(&["create", "vm", "--base", "base", "--reference"]);
    let chain = s.json(&["info", "--chain", "vm"]);
    let named = |name: &str| s.path(name).canonicalize().unwrap().display().to_string();
    let seen: Vec<_> = chain.as_array().unwrap().iter().collect();
    assert_eq!(seen[0], &s.json(&["info", "vm"]));
    assert_eq!(
        (&seen[1]["filename"], &seen[1]["format"]),
        (&json!(named("base")), &json!("pcow"))
    );
    let raw = json!({ "filename": named("disk.raw"), "format": "raw", "virtual-size": 4 << 20, "actual-size": 4 << 20 });
    assert_eq!((seen[2], seen.len()), (&raw, 3));
    let text = s.ok(&["info", "--backing-chain", "vm"]);
    assert!(
        text.contains("\n\nimage:            ") && text.contains("raw"),
        "{text}"
    );
    std::fs::rename(s.path("base"), s.path("gone")).unwrap();
    s.refused(&["info", "--chain", "vm"], 1, &["base"]);
}

#[test]
fn info_has_the_documented_fields() {
    let s = with_branches();
    let info = s.json(&["info", "vm"]);
    let expected = [
        "actual-size",
        "allocation-unit",
        "backend",
        "bases",
        "cluster-size",
        "exclusive-size",
        "filename",
        "format",
        "format-version",
        "guest-flush-is-durable",
        "in-use-by",
        "layers",
        "persistence-domain",
        "problems",
        "shared-size",
        "snapshots",
        "uuid",
        "virtual-size",
    ];
    assert_eq!(fields(&info), expected);
    assert_eq!(
        (&info["filename"], &info["format"]),
        (&"vm".into(), &"pcow".into())
    );
    assert_eq!(info["problems"], json!([]));
    let sum = info["exclusive-size"].as_u64().unwrap() + info["shared-size"].as_u64().unwrap();
    assert_eq!(info["actual-size"], sum);
    let snapshot = &info["snapshots"][1];
    assert_eq!(
        fields(snapshot),
        ["date-nsec", "date-sec", "id", "layer", "name", "uuid"]
    );
    assert_eq!(
        (&snapshot["id"], &snapshot["name"]),
        (&"2".into(), &"second".into())
    );
    let layer = &info["layers"][0];
    let expected = [
        "active",
        "actual-size",
        "cluster-size",
        "exclusive-size",
        "filename",
        "image",
        "kind",
        "map-checksum",
        "parent",
        "proof",
        "shared-size",
        "snapshots",
        "uuid",
        "virtual-size",
    ];
    assert_eq!(fields(layer), expected);
    let base = &info["bases"][0];
    assert_eq!(
        fields(base),
        ["filename", "format", "image", "layers", "usage"]
    );
    assert_eq!(
        (&base["usage"], &base["layers"]),
        (&"adopted".into(), &1.into())
    );
}

#[test]
fn info_says_what_people_want_to_know() {
    let s = with_branches();
    let held = s.image("vm");
    let text = s.ok(&["info", "vm"]);
    let holder = format!("process {} on", std::process::id());
    let expected = [
        "virtual size:     8 MiB (8388608 bytes)",
        "exclusive",
        "shared",
        "cluster size:     64 KiB",
        "allocation unit:  64 KiB",
        "base:             1 layer of the image",
        "persistence:      page cache",
        "a power loss loses what was written since the last flush",
        "not power-fail safe",
        &holder,
        "● active",
        "│ ○ 2 second",
    ];
    for part in expected {
        assert!(text.contains(part), "no '{part}' in\n{text}");
    }
    drop(held);
    assert!(s.ok(&["info", "vm"]).contains("in use by:        nobody"));
}

#[test]
fn info_works_without_the_base_and_names_the_problem() {
    let s = Sandbox::new();
    std::fs::write(s.path("disk.raw"), vec![1; 4096]).unwrap();
    s.ok(&["create", "vm", "--base", "disk.raw", "--base-format", "raw"]);
    std::fs::remove_file(s.path("disk.raw")).unwrap();
    let info = s.json(&["info", "vm"]);
    let problem = info["problems"][0].as_str().unwrap();
    assert!(problem.contains("disk.raw is not there"), "{problem}");
    let text = s.ok(&["info", "vm"]);
    assert!(text.contains("problem:          the base"), "{text}");
    assert!(text.contains("○ raw base"), "{text}");
}

#[test]
fn list_draws_the_snapshots_as_they_came_from_each_other() {
    let s = with_branches();
    let text = s.ok(&["list", "vm"]);
    let left: Vec<_> = text
        .lines()
        .map(|l| l.split("  ").next().unwrap())
        .collect();
    let expected = ["● active", "○ 3 third", "│ ○ 2 second", "├─╯", "○ 1 first"];
    assert_eq!(left, expected, "{text}");
    let list = s.json(&["list", "vm"]);
    assert_eq!(fields(&list), ["active-parent", "filename", "snapshots"]);
    assert_eq!(list["active-parent"], "3");
    let parents: Vec<_> = list["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["parent"])
        .collect();
    assert_eq!(parents, [&Value::Null, &json!("1"), &json!("1")]);
    let expected = [
        "actual-size",
        "date-nsec",
        "date-sec",
        "id",
        "layer",
        "name",
        "parent",
        "uuid",
        "virtual-size",
    ];
    assert_eq!(fields(&list["snapshots"][0]), expected);
}

#[test]
fn an_image_without_snapshots_lists_its_active_layer() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    assert!(s.ok(&["list", "vm"]).starts_with("● active"));
    assert_eq!(s.json(&["list", "vm"])["snapshots"], json!([]));
}

#[test]
fn map_shows_each_piece_with_its_layer_as_qemu_img_does() {
    let s = with_branches();
    s.store("vm", 3 * MIB, 4);
    let map = s.json(&["map", "vm"]);
    let pieces = map.as_array().unwrap();
    let short: Vec<_> = pieces
        .iter()
        .map(|p| {
            (
                p["start"].as_u64().unwrap(),
                p["length"].as_u64().unwrap(),
                p["data"] == true,
                p["depth"].as_u64().unwrap(),
            )
        })
        .collect();
    let unit = 64 << 10;
    let expected = [
        (0, unit, true, 3),
        (unit, MIB - unit, false, 3),
        (MIB, unit, true, 2),
        (MIB + unit, 2 * MIB - unit, false, 3),
        (3 * MIB, unit, true, 0),
        (3 * MIB + unit, 5 * MIB - unit, false, 3),
    ];
    assert_eq!(short, expected);
    let data = [
        "data", "depth", "filename", "length", "offset", "present", "start", "zero",
    ];
    assert_eq!(fields(&pieces[4]), data);
    assert_eq!(pieces[4]["offset"], pieces[4]["start"]);
    let file = s.path(pieces[4]["filename"].as_str().unwrap());
    assert_eq!(file, s.active_data("vm"));
    assert_eq!(
        fields(&pieces[1]),
        ["data", "depth", "length", "present", "start", "zero"]
    );
    assert_eq!(
        (&pieces[1]["zero"], &pieces[1]["present"]),
        (&true.into(), &false.into())
    );
}

#[test]
fn map_of_a_snapshot_shows_it_and_not_the_present() {
    let s = with_branches();
    let data = |args: &[&str]| -> Vec<u64> {
        let map = s.json(args);
        let pieces = map.as_array().unwrap().iter();
        pieces
            .filter(|p| p["data"] == true)
            .map(|p| p["start"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(data(&["map", "vm"]), [0, MIB]);
    assert_eq!(
        data(&["map", "vm", "--snapshot", "second"]),
        [0, MIB, 2 * MIB]
    );
    assert_eq!(data(&["map", "vm", "--snapshot", "1"]), [0, MIB]);
    s.refused(
        &["map", "vm", "--snapshot", "nix"],
        1,
        &["it has first, second, third"],
    );
}

#[test]
fn map_for_people_lists_data_only() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    assert_eq!(s.ok(&["map", "vm"]).lines().count(), 1);
    s.store("vm", MIB, 1);
    let text = s.ok(&["map", "vm"]);
    let line: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(line[..3], ["0x100000", "0x10000", "0"]);
}

#[test]
fn check_of_a_sound_image_counts_what_is_not_flushed() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    s.store("vm", 0, 1);
    let image = s.image("vm");
    store(&image, MIB, 2);
    drop(image);
    let found = s.json(&["check", "vm"]);
    let expected = json!({
        "filename": "vm", "format": "pcow", "check-errors": 0, "corruptions": 0, "leaks": 0, "leaked-size": 0,
        "allocated-clusters": 2, "unflushed-clusters": 1, "findings": [],
        "repaired": [],
    });
    assert_eq!(found, expected);
    let text = s.ok(&["check", "vm"]);
    assert_eq!(
        text,
        "vm: no fault found\n2 clusters hold data, 1 of them not flushed yet\n"
    );
}

/// Runs `check`, which must end with `code` and leave the image as it was; returns what it found.
#[track_caller]
fn check(s: &Sandbox, code: i32) -> Value {
    let before = s.state();
    let finished = s.run(&["check", "vm", "--output", "json"]);
    finished.expect(finished.code() == code, &format!("exit code {code}"));
    assert!(s.state() == before, "check changed something");
    finished.json()
}

#[test]
fn check_tells_corruption_leaks_and_what_it_could_not_look_at_apart() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    s.store("vm", 0, 1);
    s.ok(&["snapshot", "vm"]);
    let leftover = s.path("vm/0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a.data");
    std::fs::write(&leftover, "left by a crash").unwrap();
    let found = check(&s, 3);
    assert_eq!(
        (&found["leaks"], &found["corruptions"]),
        (&1.into(), &0.into())
    );
    assert_eq!(found["findings"][0]["kind"], "leak");
    // A bit of a sealed map flips.
    let info = s.json(&["info", "vm"]);
    let layers = info["layers"].as_array().unwrap();
    let sealed = layers.iter().find(|l| l["active"] == false).unwrap();
    let map = s
        .path(sealed["filename"].as_str().unwrap())
        .with_extension("map");
    let mut bytes = std::fs::read(&map).unwrap();
    bytes[4097] ^= 1;
    std::fs::write(&map, bytes).unwrap();
    let found = check(&s, 2);
    assert_eq!(found["findings"][0]["kind"], "corruption");
    let text = s.run(&["check", "vm"]).stdout();
    assert!(text.contains("corrupt: layer"), "{text}");
    let quiet = s.run(&["check", "-q", "vm"]);
    quiet.expect(
        quiet.code() == 2 && quiet.stdout().is_empty(),
        "the exit code alone",
    );
}

#[test]
fn check_calls_a_base_that_it_may_not_open_unchecked_and_one_that_is_gone_corruption() {
    let (s, elsewhere) = (Sandbox::new(), Sandbox::new());
    let raw = elsewhere.path("disk.raw");
    std::fs::write(&raw, vec![3; 4096]).unwrap();
    let args = [
        "create",
        "vm",
        "--base-format",
        "raw",
        "--base",
        raw.to_str().unwrap(),
    ];
    let made = s.run(&args);
    made.expect(made.code() == 0, "success");
    let found = check(&s, 1);
    assert_eq!(found["findings"][0]["kind"], "check-error");
    std::fs::remove_file(raw).unwrap();
    assert_eq!(check(&s, 2)["findings"][0]["kind"], "corruption");
}

#[test]
fn check_finds_a_broken_root_and_refuses_one_of_the_future() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "4M"]);
    s.edit_root("vm", false, |text| text.replace("4194304", "6291456"));
    let found = check(&s, 2);
    let text = found["findings"][0]["text"].as_str().unwrap();
    assert!(text.contains("wrong checksum"), "{text}");
    s.edit_root("vm", true, |text| {
        text.replace("\"version\": 1", "\"version\": 2")
    });
    s.refused(
        &["check", "vm"],
        63,
        &["format version 2", "use a newer pcow"],
    );
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "64M"]);
    let image = s.image("vm");
    (0..64).for_each(|i| store(&image, i * MIB, 1));
    drop(image);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_pcow-img"));
    command.args(["map", "--output", "json"]).arg(s.path("vm"));
    let output = output(command.stdout(writer));
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
}
