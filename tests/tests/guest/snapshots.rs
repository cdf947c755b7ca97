// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshots and rollbacks between boots.

use std::path::Path;

use pcow_format::Image;
use pcow_tests::guest::{Guest, Report};
use pcow_tests::qemu::Qemu;
use pcow_tests::scratch::Scratch;

const SIZE: u64 = 256 << 20;
const CLUSTER: u64 = 64 << 10;

fn boot(image: &Path, script: &str) -> Report {
    let mount = "mount -o noinit_itable /dev/pmem0 /mnt\n";
    let show = "echo \"text: $(cat /mnt/text)\"\necho \"sum: $(sha256sum < /mnt/random)\"\n";
    Guest::run_on(image, Qemu::new(), &format!("{mount}{script}{show}"))
}

fn rewrite(text: &str) -> String {
    format!(
        "echo {text} > /mnt/text\ndd if=/dev/urandom of=/mnt/random bs=64K count=32 conv=notrunc 2>/dev/null\n"
    )
}

/// The snapshot that a rollback to `target` saved the state before as.
fn roll_back(image: &Path, target: &str) -> String {
    let mut image = Image::open(image, &[]).unwrap();
    let saved = image.rollback(target, false).unwrap().saved_as;
    saved.map(|(_, name)| name).unwrap_or_default()
}

#[test]
fn a_rollback_shows_the_old_bytes_and_one_to_what_it_saved_the_changed_ones() {
    let scratch = Scratch::new();
    let image = scratch.image("image", SIZE, CLUSTER);
    Guest::run_on(&image, Qemu::new(), "mkfs.ext4 -q /dev/pmem0");
    let old = boot(&image, &rewrite("old"));
    Image::open(&image, &[])
        .unwrap()
        .snapshot(Some("kept"))
        .unwrap();
    let new = boot(&image, &rewrite("new"));
    assert_ne!(new.value("sum"), old.value("sum"));

    let saved = roll_back(&image, "kept");
    assert!(saved.starts_with("before-rollback-"), "{saved}");
    let back = boot(&image, "");
    assert_eq!(
        (back.value("text"), back.value("sum")),
        ("old", old.value("sum"))
    );

    roll_back(&image, &saved);
    let forward = boot(&image, "");
    assert_eq!(
        (forward.value("text"), forward.value("sum")),
        ("new", new.value("sum"))
    );
}
