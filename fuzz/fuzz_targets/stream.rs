// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A stream from anywhere, into a new image and into one that has what it continues.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use pcow_fuzz::kept_if;
use pcow_fuzz_targets::stream::run;

fuzz_target!(|data: &[u8]| -> Corpus { kept_if(run(data)) });
