// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The operations of `pcow-img`, and the images that they are done on.

use std::path::Path;

use crate::world::{call, disk};

/// What an operation that is done changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing; its output is what it is for.
    Shows,
    /// Something, as a whole or not at all.
    Changes,
    /// Bytes of a disk, in place: one that fails leaves it written in part.
    Writes,
    /// What is received stays beside the image until it is complete.
    Receives,
}

/// One command line, run in the folder of the images.
#[derive(Debug)]
pub struct Operation {
    /// What `pcow-img` is given.
    pub line: &'static str,
    /// A file that is its standard input; none if empty.
    pub input: &'static str,
    /// What was done before in this copy of the images, if anything.
    pub before: &'static str,
    pub effect: Effect,
}

impl Operation {
    const fn new(line: &'static str, effect: Effect) -> Self {
        Self {
            line,
            input: "",
            before: "",
            effect,
        }
    }

    /// `compare` has something to say with 1, and bytes that `check --data` cannot read are a fault that it finds.
    pub fn codes_of_failure(&self) -> &'static [i32] {
        match self.line.split(' ').next() {
            Some("compare") => &[2],
            Some("check") if self.line.contains("--data") => &[1, 2],
            _ => &[1],
        }
    }

    const fn reading(self, input: &'static str) -> Self {
        Self { input, ..self }
    }

    /// A raw base is known by its inode, which no copy has.
    const fn after(self, before: &'static str) -> Self {
        Self { before, ..self }
    }
}

const fn shows(line: &'static str) -> Operation {
    Operation::new(line, Effect::Shows)
}

const fn changes(line: &'static str) -> Operation {
    Operation::new(line, Effect::Changes)
}

const fn writes(line: &'static str) -> Operation {
    Operation::new(line, Effect::Writes)
}

const fn receives(line: &'static str) -> Operation {
    Operation::new(line, Effect::Receives)
}

const ON_RAW: &str = "create --base disk --base-format raw on-raw";

/// All that make, change or read an image. What calls other programs (qcow2, VMDK), and what needs no image, is not there.
pub const OPERATIONS: [Operation; 52] = [
    changes("create new 2M"),
    changes("create --preallocation full new 2M"),
    changes("create --base vm new"),
    changes("create --base vm@first new"),
    changes("create --base vm@first --reference new"),
    changes("create --base disk --base-format raw new"),
    changes("snapshot vm third"),
    changes("rollback vm first"),
    changes("rollback --discard vm first"),
    changes("delete vm first"),
    changes("delete vm second"),
    changes("delete forked leaf"),
    changes("rename vm first other"),
    changes("commit vm"),
    changes("rebase clone none"),
    changes("rebase clone golden"),
    changes("rebase --flatten vm"),
    changes("rebase --unsafe clone golden"),
    changes("rebase on-raw none").after(ON_RAW),
    changes("resize vm 4M"),
    changes("resize --shrink large 2M"),
    changes("compact zeros"),
    changes("flush vm"),
    changes("check --repair littered"),
    changes("check --trust-live vm"),
    changes("check --discard-live vm"),
    writes("write vm 61441 bytes"),
    writes("write vm 61441").reading("bytes"),
    writes("write on-raw 4097 bytes").after(ON_RAW),
    writes("convert -O raw -n vm old-copy"),
    changes("convert -f raw disk new"),
    changes("convert -O raw vm copy"),
    changes("convert vm@first new"),
    changes("convert -O raw on-raw copy").after(ON_RAW),
    changes("send -o sent vm@first"),
    changes("send -o sent --from first vm@second"),
    shows("send --from first vm@second"),
    receives("receive new first.stream"),
    receives("receive new").reading("first.stream"),
    receives("receive replica second.stream"),
    changes("receive --abort cut"),
    shows("receive --token cut"),
    shows("info vm"),
    shows("info --chain clone"),
    shows("info on-raw").after(ON_RAW),
    shows("list vm"),
    shows("map vm"),
    shows("check vm"),
    shows("check --data clone"),
    shows("compare vm clone"),
    shows("diff vm@first vm@second"),
    shows("read on-raw 4097 150000").after(ON_RAW),
];

/// Makes the images.
pub fn make(folder: &Path) {
    std::fs::write(folder.join("disk"), disk(1)).unwrap();
    std::fs::write(folder.join("bytes"), &disk(2)[..150_000]).unwrap();
    std::fs::write(folder.join("old-copy"), disk(3)).unwrap();
    std::fs::write(folder.join("nothing"), vec![0; 128 << 10]).unwrap();
    for line in LINES {
        call(folder, line);
    }
    let first = std::fs::read(folder.join("first.stream")).unwrap();
    let part = folder.join("part.stream");
    std::fs::write(&part, &first[..first.len() / 2]).unwrap();
    crate::world::refused(folder, "receive cut part.stream");
    std::fs::remove_file(part).unwrap();
    // As a crash may leave it.
    let left = "littered/0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a.data";
    std::fs::write(folder.join(left), "left").unwrap();
}

/// How they are made. Clusters are of two sizes, and pieces of each disk are written in no, one and several layers.
const LINES: [&str; 27] = [
    "create -q vm 2M",
    "write -q vm 0 disk",
    "snapshot -q vm first",
    "write -q vm 200000 bytes",
    "snapshot -q vm second",
    "write -q vm 400001 bytes",
    "create -q golden 2M --cluster-size 4K",
    "write -q golden 100000 bytes",
    "snapshot -q golden one",
    "create -q clone --base golden",
    "write -q clone 150000 bytes",
    "create -q forked 2M",
    "write -q forked 0 bytes",
    "snapshot -q forked trunk",
    "write -q forked 70000 bytes",
    "snapshot -q forked leaf",
    "rollback -q --discard forked trunk",
    "write -q forked 1M bytes",
    "create -q large 4M",
    "write -q large 3M bytes",
    "create -q zeros 2M",
    "write -q zeros 500000 bytes",
    "write -q zeros 500000 nothing",
    "create -q littered 2M",
    "send -q -o first.stream vm@first",
    "send -q -o second.stream --from first vm@second",
    "receive -q replica first.stream",
];
