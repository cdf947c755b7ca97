// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The steps that operations are made of, and the calls that each makes.

/// Steps of operations, and the calls that each makes.
pub(super) const STEPS: &[(&str, &[&str])] = &[
    (
        "word",
        &["active.word", "active.word.write_back", "active.word.fence"],
    ),
    (
        "copy",
        &[
            "active.fill.write",
            "active.fill.reserve",
            "active.fill.write_durable",
        ],
    ),
    (
        "allocate",
        &["active.prepare.reserve", "active.prepare.zeros"],
    ),
    ("clear leftovers", &["active.prepare.zero"]),
    (
        "leave zero",
        &["active.over_zero.zero", "active.over_zero.sync"],
    ),
    (
        "ensure storage",
        &["active.ensure.reserve", "active.ensure.write_durable"],
    ),
    ("overwrite", &["active.overwrite"]),
    (
        "flush",
        &["active.flush.data", "active.flush.word", "active.flush.map"],
    ),
    ("fail", &["active.flush.distrust"]),
    ("mark failure", &["flush.mark.create", "flush.mark.sync"]),
    (
        "new layer",
        &[
            "layer.data.create",
            "layer.data.len",
            "layer.data.sync",
            "layer.map.create",
            "layer.map.len",
            "layer.map.header",
            "layer.map.tag",
            "layer.map.zeros",
            "layer.map.sync",
            "layer.dir.sync",
        ],
    ),
    (
        "commit",
        &[
            "root.part.create",
            "root.part.write",
            "root.part.sync",
            "root.rename",
            "root.dir.sync",
        ],
    ),
    ("remove layer", &["layer.unlink"]),
    ("mark deletion", &["delete.mark.create"]),
    (
        "unmark deletion",
        &["delete.mark.unlink", "delete.unmark.sync"],
    ),
    ("link", &["adopt.link"]),
    (
        "copy layers",
        &[
            "adopt.copy.create",
            "adopt.copy.len",
            "adopt.copy.write",
            "adopt.copy.sync",
        ],
    ),
    ("sync adopted names", &["adopt.dir.sync"]),
    ("begin image", &["create.dir", "create.lock"]),
    ("name image", &["create.rename", "create.parent.sync"]),
    (
        "discard image",
        &["create.part.unlink", "create.part.rmdir"],
    ),
    ("open", &["open.dir.sync", "active.open.map_sync"]),
    ("tag", &["active.open.tag", "active.open.tag_sync"]),
    ("discard live", &["active.open.discard"]),
    ("write again", &["active.again.data", "active.again.map"]),
    ("share", &["delete.clone"]),
    ("rest on a base", &["base.dir.sync"]),
    (
        "rest on a raw file",
        &["base.raw.sync", "base.raw.dir.sync"],
    ),
    ("reserve words", &["active.map.reserve"]),
    ("settle live", &["active.open.data_sync"]),
    (
        "make absent",
        &[
            "active.give_back_clean.sync",
            "active.give_back_clean.punch",
        ],
    ),
    ("give prepared back", &["active.give_back.punch"]),
    ("give unused back", &["active.give_back_unused.punch"]),
    ("take in", &["active.import.copy"]),
    (
        "settle unflushed",
        &["repair.live.word", "repair.live.sync"],
    ),
    ("trust", &["repair.trust.data_sync"]),
    ("forget failure", &["repair.flush_failed.unlink"]),
    ("clean up", &["sweep.part.unlink"]),
    (
        "note progress",
        &[
            "receive.progress.create",
            "receive.progress.write",
            "receive.progress.sync",
            "receive.progress.rename",
            "receive.progress.dir.sync",
        ],
    ),
    (
        "name what was received",
        &[
            "receive.rename",
            "receive.parent.sync",
            "receive.done.unlink",
        ],
    ),
    (
        "drop the partial image",
        &["receive.gone.rename", "receive.gone.sync"],
    ),
];
