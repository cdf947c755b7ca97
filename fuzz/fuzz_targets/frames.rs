// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frames with descriptors, in pieces, as a hostile peer sends them: to a backend, to a frontend, and as replies.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use pcow_fuzz::kept_if;
use pcow_fuzz_targets::frames::run;

fuzz_target!(|data: &[u8]| -> Corpus { kept_if(run(data)) });
