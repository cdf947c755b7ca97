// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A program of operations on an image, against plain bytes: the model test's oracle, steered by the fuzzer.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use pcow_fuzz::kept_if;
use pcow_fuzz_targets::operations::run;

fuzz_target!(|data: &[u8]| -> Corpus { kept_if(run(data)) });
