// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A program of operations on an image, against plain bytes: the model test's oracle, steered by the fuzzer.
#![no_main]
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

#[path = "../../pcow-format/tests/model/run/mod.rs"]
mod run;

use libfuzzer_sys::{Corpus, fuzz_target};

/// About a dozen operations: three bytes for each choice. Long programs are for chance (`pcow-format/tests/model`); here many
/// short ones are worth more.
const LONGEST: usize = 120;

fuzz_target!(|data: &[u8]| -> Corpus {
    if data.len() > LONGEST {
        return Corpus::Reject;
    }
    run::Run::follow(data);
    Corpus::Keep
});
