// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of what is cut off: no cell of it is empty without a reason, and none has a reason and is not empty.
#![allow(missing_docs, clippy::unwrap_used)]

use pcow_crash::coverage::{Cells, contradictions, observe, reason};

#[test]
fn every_call_of_every_operation_is_cut_off_or_there_is_a_reason() {
    // Without optimization pairs of operations take too long, and some calls come only in them.
    let length = if cfg!(debug_assertions) { 1 } else { 2 };
    let cells = observe(length).unwrap_or_else(|v| panic!("{v}"));
    let mut wrong = contradictions(&cells);
    if cfg!(debug_assertions) {
        wrong.retain(|text| !text.ends_with("no reason why"));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_table_with_a_cell_too_few_or_too_many_is_noticed() {
    let whole = contradictions(&Cells::new()).len();
    assert!(whole > 300, "{whole} cells that must not be empty");
    let mut cells = Cells::new();
    cells.insert(("flush", "dax", "active.flush.data"), 1);
    assert_eq!(contradictions(&cells).len(), whole - 1);
    cells.insert(("flush", "dax", "root.rename"), 1);
    assert_eq!(contradictions(&cells).len(), whole);
    assert!(reason("flush", "dax", "a.new.site").is_none());
}
