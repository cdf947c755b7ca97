// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Chains that are much deeper than the number of files a process may open at first.

use std::process::Command;

use crate::harness::{MIB, Sandbox, output, store};

const DEPTH: u64 = 1000;
/// What most systems grant a process at first.
const USUAL_OPEN_FILES: u64 = 1024;

#[test]
fn a_chain_that_needs_more_files_than_allowed_says_so() {
    let s = Sandbox::without_disk();
    s.ok(&["create", "vm", "4M"]);
    let mut image = s.image("vm");
    for number in 1..=20 {
        assert_eq!(image.snapshot(None).unwrap(), number);
    }
    drop(image);
    let program = env!("CARGO_BIN_EXE_pcow-img");
    let script = format!("ulimit -n 24; exec {program} map vm");
    let mut shell = Command::new("sh");
    let limited = output(shell.args(["-c", &script]).current_dir(s.path(".")));
    let line = String::from_utf8(limited.stderr).unwrap();
    assert_eq!(limited.status.code(), Some(1), "{line}");
    assert!(
        line.contains("Too many open files") && line.contains("ulimit -n"),
        "{line}"
    );
}

#[test]
fn a_chain_of_of_a_thousand_snapshots_can_be_made_and_looked_at() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let s = Sandbox::without_disk();
    s.ok(&["create", "vm", "64M"]);
    let given = getrlimit(Resource::Nofile);
    let maximum = given.maximum.unwrap_or(u64::MAX);
    assert!(
        maximum > 2 * DEPTH + 64,
        "the hard limit of open files is {maximum}"
    );
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: given.maximum,
            ..given
        },
    )
    .unwrap();
    let mut image = s.image("vm");
    for number in 1..=DEPTH {
        assert_eq!(image.snapshot(None).unwrap(), number);
    }
    store(&image, MIB, 1);
    drop(image);
    // The tool starts with the usual limit and must raise it itself.
    let usual = Some(USUAL_OPEN_FILES);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: usual,
            ..given
        },
    )
    .unwrap();
    let info = s.json(&["info", "vm"]);
    assert_eq!(info["layers"].as_array().unwrap().len() as u64, DEPTH + 1);
    assert_eq!(
        info["problems"].as_array().unwrap().len(),
        0,
        "{}",
        info["problems"]
    );
    assert_eq!(s.ok(&["list", "vm"]).lines().count() as u64, DEPTH + 1);
    assert_eq!(s.json(&["map", "vm"])[1]["depth"], 0);
    assert_eq!(s.json(&["check", "vm"])["corruptions"], 0);
    s.ok(&["snapshot", "vm"]);
    s.ok(&["create", "clone", "--base", "vm@500"]);
    s.ok(&["rollback", "vm", "500"]);
}
