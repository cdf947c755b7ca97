// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clones of one base: each guest changes its own, and nobody sees another's.
//!
//! Every store to a cluster of the base is tried in both ways that there are: by the vCPU, and by QEMU's own I/O, when
//! the guest reads from a virtio disk directly into a DAX mapping.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use pcow_tests::files::checksums;
use pcow_tests::guest::Guest;
use pcow_tests::pattern;
use pcow_tests::qemu::Qemu;
use pcow_tests::scratch::Scratch;

const SIZE: u64 = 1 << 30;
const CLUSTER: u64 = 64 << 10;
/// Each file, and the seed of what stands in it in the base.
const FILES: [(&str, u64); 2] = [("a", 1), ("b", 2)];
/// Files are changed in pieces of whole pages that begin and end inside of clusters: the base shows round them.
const PIECE_KIB: u64 = 1020;
const PIECES: u64 = 7;
/// The seed of what stands on a guest's virtio disk.
const DISK_SEED: u64 = 50;

const MOUNT: &str = "mount -o dax /dev/pmem0 /mnt\n";

/// What a clone's guest changes: in each file one piece by the vCPU and one by the disk.
struct Changes {
    seed: u64,
    stored: u64,
    read: u64,
    /// Whether everything is loaded before, so that the stores meet read copies; else they meet nothing.
    looks_first: bool,
    /// How QEMU opens the disk.
    disk: &'static str,
}

impl Changes {
    fn script(&self) -> String {
        let mut script = String::new();
        let (stored, read) = (place(self.stored), place(self.read));
        for (file, _) in FILES {
            let _ = writeln!(script, "guest_io store /mnt/{file} {stored} {}", self.seed);
            let _ = writeln!(script, "guest_io read /mnt/{file} {read} /dev/vda");
        }
        script
    }

    /// The seed of what stands at `piece` of a file whose seed was `before`.
    fn seed_at(&self, piece: u64, before: u64) -> u64 {
        match piece {
            _ if piece == self.stored => self.seed,
            _ if piece == self.read => DISK_SEED,
            _ => before,
        }
    }
}

/// Offset and length of a piece.
fn place(piece: u64) -> String {
    format!("{}K {PIECE_KIB}K", piece * PIECE_KIB)
}

/// Verifies every piece of every file, after `changes` in this order.
fn verify(changes: &[&Changes]) -> String {
    let mut script = String::new();
    for (file, base) in FILES {
        for piece in 0..PIECES {
            let seed = changes.iter().fold(base, |seed, c| c.seed_at(piece, seed));
            let _ = writeln!(
                script,
                "guest_io verify /mnt/{file} {} {seed}",
                place(piece)
            );
        }
    }
    script
}

fn make_base(scratch: &Scratch) -> PathBuf {
    let base = scratch.image("base", SIZE, CLUSTER);
    let mut script = String::from(
        "ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem\nmkfs.ext4 -q -b 4096 /dev/pmem0\n",
    );
    script.push_str(MOUNT);
    for (file, seed) in FILES {
        let length = PIECES * PIECE_KIB;
        let _ = writeln!(script, "guest_io store /mnt/{file} 0 {length}K {seed}");
    }
    Guest::run_on(&base, Qemu::new(), &script);
    base
}

fn make_disk(scratch: &Scratch) -> PathBuf {
    let mut bytes = vec![0; usize::try_from(PIECES * PIECE_KIB * 1024).unwrap()];
    pattern::fill(DISK_SEED, 0, &mut bytes);
    let disk = scratch.path("disk");
    std::fs::write(&disk, bytes).unwrap();
    disk
}

/// Boots a guest that makes `changes` to what `before` left, and sees both.
fn change(image: &Path, disk: &Path, before: &[&Changes], changes: &Changes) {
    let after: Vec<_> = before.iter().copied().chain([changes]).collect();
    let mut script = MOUNT.to_owned();
    if changes.looks_first {
        script.push_str(&verify(before));
    }
    script.push_str(&changes.script());
    script.push_str(&verify(&after));
    let machine = Qemu::new().disk(disk, &format!("readonly=on,{}", changes.disk));
    Guest::run_on(image, machine, &script);
}

fn check(image: &Path, changes: &[&Changes]) {
    Guest::run_on(image, Qemu::new(), &format!("{MOUNT}{}", verify(changes)));
}

#[test]
fn clones_and_a_clone_of_a_clone_see_their_own_bytes_and_leave_the_base_alone() {
    let of_clone = |seed, looks_first, disk| Changes {
        seed,
        stored: seed - 10,
        read: seed - 10 + 3,
        looks_first,
        disk,
    };
    let own = [
        of_clone(10, true, "aio=threads"),
        of_clone(11, false, "aio=threads,cache=none"),
        of_clone(12, false, "aio=native,cache=none"),
        of_clone(13, false, "aio=io_uring,cache=none"),
    ];
    let scratch = Scratch::new();
    let base = make_base(&scratch);
    let disk = make_disk(&scratch);
    let data = checksums(&base, &[".data"]);
    let clones = [0, 1, 2, 3].map(|i| scratch.clone_of(&format!("clone{i}"), &base, CLUSTER));
    let everything = checksums(&base, &["image.json", ".map", ".data", "lock"]);

    std::thread::scope(|scope| {
        for (clone, own) in clones.iter().zip(&own) {
            scope.spawn(|| change(clone, &disk, &[], own));
        }
    });

    let second = Changes {
        seed: 20,
        // Over what the first clone stored, and over the base.
        stored: own[0].stored,
        read: 6,
        looks_first: true,
        disk: "aio=threads",
    };
    let grandchild = scratch.clone_of("grandchild", &clones[0], CLUSTER);
    change(&grandchild, &disk, &[&own[0]], &second);
    check(&clones[0], &[&own[0]]);

    assert!(
        checksums(&base, &[".data"]).contains(&data),
        "the base's data"
    );
    assert_eq!(
        checksums(&base, &["image.json", ".map", ".data", "lock"]),
        everything
    );
}
