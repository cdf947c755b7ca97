// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Both ends of the control socket: requests that a backend reads, and what a client takes for a backend's answers.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use pcow_fuzz::kept_if;
use pcow_fuzz_targets::control::run;

fuzz_target!(|data: &[u8]| -> Corpus { kept_if(run(data)) });
