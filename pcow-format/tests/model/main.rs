// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random sequences of all operations that change content, against an oracle: plain bytes, one array for each snapshot.
//! After each operation the image is checked, and what it shows is compared.
//!
//! `PCOW_MODEL_OPERATIONS` says how many operations (the long form has 100,000), `PCOW_MODEL_SEED` where to begin. A failure
//! names its seed and the operations that led to it.
#![allow(missing_docs, clippy::unwrap_used)]

mod run;

use run::{OPERATIONS, Run};

/// Operations of one image; then there is another one.
const SEQUENCE: u64 = 250;

fn number(variable: &str, default: u64) -> u64 {
    let text = std::env::var(variable).ok();
    text.map_or(default, |t| t.parse().unwrap())
}

#[test]
fn an_image_shows_what_a_plain_array_of_bytes_would() {
    let operations = number("PCOW_MODEL_OPERATIONS", 1000);
    let first = number("PCOW_MODEL_SEED", 1);
    for seed in first..first + operations.div_ceil(SEQUENCE) {
        let mut run = Run::by_chance(seed);
        for _ in 0..SEQUENCE.min(operations) {
            run.step();
            if let Err(what) = run.verify() {
                panic!("{what}");
            }
        }
    }
}

/// As a fuzzer gives them: each operation once, and some of its choices.
#[test]
fn operations_that_are_given_as_bytes_are_followed() {
    let all = (0..OPERATIONS).map(|o| u8::try_from(o).unwrap());
    let all = all.flat_map(|operation| [operation, 0, 0, operation, 7, 1, 2, 0, 3]);
    Run::follow(&all.collect::<Vec<u8>>());
}
