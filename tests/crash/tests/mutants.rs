// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A short form of the trial of mutants: those with a name. `cargo xtask crash --mutants` tries all.
#![allow(missing_docs, clippy::unwrap_used)]

use pcow_crash::mutants::{Verdict, try_named};
use pcow_crash::sites;

#[test]
fn every_fault_with_a_name_is_found() {
    let tried = try_named();
    assert!(tried.len() >= 7, "{tried:?}");
    for (mutant, verdict) in tried {
        println!("{mutant}: {verdict}");
        assert!(matches!(verdict, Verdict::Caught(_)), "{mutant}: {verdict}");
    }
}

#[test]
fn the_call_sites_are_read_from_the_source() {
    let sites = sites::all();
    assert!(sites.len() >= 50, "{sites:?}");
    assert!(sites.contains("active.word") && !sites.contains("test"));
}
