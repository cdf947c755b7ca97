// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What every target tells libFuzzer. The targets themselves are in `tests/fuzz`, whose tests try the corpus.

use libfuzzer_sys::Corpus;

/// Whether an input is to be kept: it is one for the target.
pub fn kept_if(taken: bool) -> Corpus {
    if taken { Corpus::Keep } else { Corpus::Reject }
}
