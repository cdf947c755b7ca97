// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A program of operations on an image, against plain bytes: the model test's oracle, steered by the fuzzer.
#![no_main]
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

#[path = "../../pcow-format/tests/model/run.rs"]
mod run;

use libfuzzer_sys::fuzz_target;

/// Each operation takes some bytes and some milliseconds.
const LONGEST: usize = 400;

fuzz_target!(|data: &[u8]| run::Run::follow(&data[..data.len().min(LONGEST)]));
