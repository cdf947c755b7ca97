// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image whose active map is anything.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use pcow_fuzz::kept_if;
use pcow_fuzz_targets::map_file::run;

fuzz_target!(|data: &[u8]| -> Corpus { kept_if(run(data)) });
