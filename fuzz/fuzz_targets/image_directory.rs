// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image's directory of which the root is anything, and the maps of its layers hold any words.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use pcow_fuzz::kept_if;
use pcow_fuzz_targets::image_directory::run;

fuzz_target!(|data: &[u8]| -> Corpus { kept_if(run(data)) });
