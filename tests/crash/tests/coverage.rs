// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of what is cut off: a fault of it is noticed.
#![allow(missing_docs, clippy::unwrap_used)]

use pcow_crash::coverage::{Cells, contradictions, reason};

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
