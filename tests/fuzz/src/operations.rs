// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A program of operations on an image, against plain bytes: the model test's oracle, steered by the fuzzer.

#[path = "../../../pcow-format/tests/model/run/mod.rs"]
#[allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    reason = "a module of a test"
)]
mod run;

/// About a dozen operations: three bytes for each choice. Long programs are for chance (`pcow-format/tests/model`); here many
/// short ones are worth more.
const LONGEST: usize = 120;

/// Tries an input; `false` if it is not one for this target.
#[must_use]
pub fn run(data: &[u8]) -> bool {
    if data.len() > LONGEST {
        return false;
    }
    run::Run::follow(data);
    true
}
