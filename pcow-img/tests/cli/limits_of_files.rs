// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files that cannot be written to their end: the tool says so in one line, and nothing is left under the name that it was to have.

use std::collections::BTreeSet;

use crate::content::raw;
use crate::harness::{MIB, Sandbox};

/// Runs the tool in a process that may make no file longer than 64 KiB; a disk that is full says so in the same places.
fn refused_for_length(s: &Sandbox, arguments: &str) {
    let names = || s.state().into_keys().collect::<BTreeSet<_>>();
    let before = names();
    let finished = s.shell(&format!(
        "trap '' XFSZ; ulimit -f 128; exec pcow-img {arguments}"
    ));
    finished.expect(finished.code() == 1, "exit code 1");
    finished.expect(finished.stdout().is_empty(), "nothing on standard output");
    let line = finished.stderr();
    finished.expect(line.starts_with("pcow-img: cannot "), "what failed");
    finished.expect(line.contains("File too large"), "why");
    finished.expect(line.trim_end().lines().count() == 1, "one line");
    assert_eq!(before, names(), "{arguments}: the same files as before");
}

#[test]
fn what_is_too_long_for_its_file_leaves_no_file() {
    let s = Sandbox::new();
    raw(
        &s,
        "disk",
        4 * MIB,
        &[(0, &[1; 200_000]), (2 * MIB, &[2; 9])],
    );
    s.ok(&["convert", "-f", "raw", "disk", "vm"]);
    s.ok(&["snapshot", "vm", "one"]);
    s.ok(&["send", "-q", "vm@one", "-o", "stream"]);
    for arguments in [
        "convert -O raw vm copy",
        "convert -f raw disk copy",
        "send vm@one -o copy",
        "receive copy stream",
        "create copy 4M",
        "create copy --base vm@one",
    ] {
        refused_for_length(&s, arguments);
    }
    s.ok(&["check", "vm"]);
    s.ok(&["compare", "-F", "raw", "vm", "disk"]);
}

/// It is there before, and says what became of it: the user writes over it knowingly.
#[test]
fn a_raw_file_that_cannot_be_written_over_to_its_end_is_told_of() {
    let s = Sandbox::new();
    raw(&s, "disk", 4 * MIB, &[(0, &[1; 200_000])]);
    raw(&s, "old", 4 * MIB, &[(0, &[9; 9])]);
    s.ok(&["convert", "-f", "raw", "disk", "vm"]);
    refused_for_length(&s, "convert -n -O raw vm old");
    s.ok(&["convert", "-n", "-O", "raw", "vm", "old"]);
    s.ok(&["compare", "-F", "raw", "vm", "old"]);
}
