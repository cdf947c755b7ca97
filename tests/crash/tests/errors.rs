// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls that fail, each in every way.
#![allow(missing_docs, clippy::unwrap_used)]

use pcow_crash::errors::{Cases, Medium, Outcome, fail_all};
use pcow_crash::mutants::two_writers;
use pcow_format::medium::{Domain, Site};

/// A search that fails no call must not pass for one in which all is handled.
fn assert_handled(medium: Medium) {
    let cases: Cases = fail_all(medium).unwrap_or_else(|e| panic!("{e}"));
    let refused = |o: &std::collections::BTreeMap<Outcome, u64>| o.contains_key(&Outcome::Refused);
    let kinds = cases.len();
    assert!(kinds >= 100, "only {kinds} kinds of calls");
    assert!(cases.values().filter(|o| refused(o)).count() * 2 >= kinds);
    // A change that is committed does not fail for files of the old state that stay.
    for change in ["rollback, discarding", "resize of what was not written to"] {
        let removals = cases.iter().filter(|((operation, call), _)| {
            *operation == change && call.site == Some(Site("layer.unlink"))
        });
        let outcomes: Vec<_> = removals.flat_map(|(_, outcomes)| outcomes.keys()).collect();
        assert_eq!(outcomes, [&Outcome::Tolerated], "{change}");
    }
}

#[test]
fn a_call_that_fails_in_the_page_cache_harms_nothing() {
    assert_handled(Medium::Sim(Domain::PageCache));
}

#[test]
fn a_call_that_fails_on_dax_harms_nothing() {
    assert_handled(Medium::Sim(Domain::Dax));
}

#[test]
fn a_call_that_fails_on_this_machine_harms_nothing() {
    assert_handled(Medium::Real);
}

/// A frontend can give up the byte of the lock that it shares; the other one still keeps a second writer out.
#[test]
fn two_writers_are_impossible_though_a_frontend_gave_up_its_byte() {
    two_writers(None).unwrap();
}
