// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The operations that workloads are made of. A new one joins by an entry in [`OPERATIONS`].

use std::fmt;

use pcow_format::medium::sim::When;

use super::{Run, other_base};
use crate::model::Role;

/// Something that changes an image, or ends its process.
pub struct Operation {
    /// What it is called in output and in traces.
    pub name: &'static str,
    /// How often it comes in long random workloads; those with 0 come in short ones only.
    pub weight: usize,
    /// Whether it is part of the exhaustive search of short workloads.
    pub in_short: bool,
    /// Performs it; `false` if it cannot be done in this state.
    pub(super) run: fn(&mut Run<'_>) -> Result<bool, String>,
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// All operations.
pub static OPERATIONS: &[Operation] = &[
    operation("store to absent", 1, |r| r.store(Role::Absent)),
    operation("store to base", 1, |r| r.store(Role::Base)),
    operation("store to zero", 1, |r| r.store(Role::Zero)),
    operation("store to leftover", 1, |r| r.store(Role::Leftover)),
    operation("guest flush", 2, |r| r.guest_flush()),
    operation("flush", 2, |r| r.flush()),
    operation("flush, store before its sync", 1, |r| {
        r.flush_with_store(When::Before)
    }),
    operation("flush, store after its sync", 1, |r| {
        r.flush_with_store(When::After)
    }),
    operation("flush of data that fails", 0, |r| {
        r.failing_flush("active.flush.data")
    }),
    operation("flush of the map that fails", 0, |r| {
        r.failing_flush("active.flush.map")
    }),
    operation("prepare", 1, |r| r.prepare()),
    operation("give back", 1, |r| r.give_back()),
    operation("touch", 1, |r| r.touch()),
    operation("give back clean", 1, |r| r.give_back_clean()),
    operation("snapshot", 1, |r| r.snapshot()),
    operation("live snapshot", 1, |r| r.live_snapshot()),
    operation("rename", 1, |r| r.rename()),
    operation("delete", 1, |r| r.delete()),
    operation("delete below a sealed layer", 1, |r| r.delete_merging()),
    operation("delete below a sealed layer, sharing", 1, |r| {
        r.delete_sharing()
    }),
    operation("rollback", 1, |r| r.rollback(false)),
    operation("rollback, discarding", 1, |r| r.rollback(true)),
    operation("delete the newest", 1, |r| r.delete_newest()),
    operation("delete below a sealed layer, beside a guest", 1, |r| {
        r.delete_beside_a_guest()
    }),
    operation("rebase", 1, |r| r.rebase(Some(&other_base()))),
    operation("rebase on nothing", 1, |r| r.rebase(None)),
    operation("rebase, unsafe", 1, |r| r.rebase_unsafe()),
    operation("rebase, copying", 1, |r| r.rebase_by_copy()),
    operation("clone that fails", 1, |r| r.failing_clone()),
    operation("clone", 1, |r| r.clone_image()),
    operation("create by reference", 1, |r| r.create_by_reference()),
    operation("create on a raw file", 1, |r| r.create_on_raw()),
    operation("receive", 1, |r| r.receive()),
    operation("receive, and give up", 1, |r| r.give_up_receiving()),
    operation("receive a new image", 1, |r| r.receive_new()),
    operation("write", 1, |r| r.write()),
    operation("write zeros", 1, |r| r.write_zeros()),
    operation("compact", 1, |r| r.compact()),
    operation("resize", 1, |r| r.resize()),
    operation("repair", 1, |r| r.repair()),
    operation("flush that fails, and repair", 0, |r| {
        r.repair_after_failed_flush()
    }),
    operation("flush of the map that fails, going on", 0, |r| {
        r.go_on_after_failed_flush()
    }),
    operation("trust after a reboot", 1, |r| r.trust_unflushed()),
    operation("trust a copy", 1, |r| r.trust_copy()),
    operation("give up", 1, |r| r.discard_unflushed()),
    operation("import", 1, |r| r.import()),
    operation("copy by reflink", 1, |r| r.reflink()),
    operation("kill", 1, |r| r.kill()),
    operation("power cut", 1, |r| r.reboot(false)),
    operation("reboot", 1, |r| r.reboot(true)),
    operation("older root", 1, |r| r.older_root()),
    operation("oldest root", 1, |r| r.oldest_root()),
    operation("switch images", 2, |r| r.switch()),
    Operation {
        in_short: false,
        ..operation("store anywhere", 60, |r| r.store_anywhere())
    },
];

const fn operation(
    name: &'static str,
    weight: usize,
    run: fn(&mut Run<'_>) -> Result<bool, String>,
) -> Operation {
    Operation {
        name,
        weight,
        in_short: true,
        run,
    }
}

impl Operation {
    /// The operation of that name.
    pub fn named(name: &str) -> Option<&'static Operation> {
        OPERATIONS.iter().find(|o| o.name == name)
    }
}
