// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshots of a guest that goes on writing: each is what a power failure at that moment would have left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pcow_tests::backend::Backend;
use pcow_tests::guest::Guest;
use pcow_tests::qemu::{PATIENCE, Qemu};
use pcow_tests::qmp::Qmp;
use pcow_tests::records::{PERIOD, told};
use pcow_tests::scratch::Scratch;
use pcow_tests::waiting::wait_until;
use pcow_tests::{pattern, program};
use serde_json::json;

const SIZE: u64 = 4 << 30;
const CLUSTER: u64 = 64 << 10;

/// How each writer writes, its file, and the seed of what it writes. The last one's is on the disk that it reads from.
const WRITERS: [(&str, &str, u64); 4] = [
    ("append", "first", 1),
    ("append", "second", 2),
    ("store", "third", 3),
    ("load", "fourth", 4),
];

/// How many snapshots are taken; `PCOW_GUEST_SNAPSHOTS` for the long form.
fn snapshots() -> usize {
    let count = std::env::var("PCOW_GUEST_SNAPSHOTS");
    count.map_or(5, |count| count.parse().unwrap())
}

/// Looks at the filesystem after its journal has been replayed, and counts every writer's records.
fn look() -> String {
    let mut script = String::from(
        "
mount -o dax /dev/pmem0 /mnt
umount /mnt
e2fsck -f -n /dev/pmem0
mount -o dax /dev/pmem0 /mnt
",
    );
    for (_, file, seed) in WRITERS {
        script += &format!("guest_io records count /mnt/{file} {seed}\n");
    }
    // A filesystem goes on after some errors, and only says so.
    script
        + "umount /mnt\n! dmesg | grep -E 'EXT4-fs (error|warning)|I/O error|[Hh]ardware [Ee]rror|BUG:|Oops'\n"
}

/// Has all writers write until there is a line on the console.
fn load() -> String {
    let mut script = String::from(
        "
ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem
mkfs.ext4 -q -b 4096 -J size=16 /dev/pmem0
mount -o dax /dev/pmem0 /mnt
writers=
",
    );
    for (how, file, seed) in WRITERS {
        let source = match how {
            "load" => "/dev/vda".to_owned(),
            _ => seed.to_string(),
        };
        script += &format!("guest_io records {how} /mnt/{file} {source} &\n");
        script += "writers=\"$writers $!\"\n";
    }
    script
        + "
read -r line
touch /tmp/stop
for writer in $writers; do wait $writer; done
umount /mnt
" + &look()
}

fn disk(scratch: &Scratch) -> PathBuf {
    let (_, _, seed) = WRITERS[3];
    let mut bytes = vec![0; usize::try_from(PERIOD).unwrap()];
    pattern::fill(seed, 0, &mut bytes);
    let path = scratch.path("disk");
    fs::write(&path, bytes).unwrap();
    path
}

/// What each writer has told so far.
fn progress(guest: &mut Guest) -> [u64; 4] {
    let console = guest.qemu().serial();
    WRITERS.map(|(_, file, _)| told(&console, file))
}

/// Waits until every writer has told more than `before`.
fn wait_for_more(guest: &mut Guest, before: [u64; 4]) {
    wait_until("every writer goes on", PATIENCE, || {
        assert!(!guest.qemu().has_ended(), "the guest ended before");
        let now = progress(guest);
        before.iter().zip(now).all(|(before, now)| *before < now)
    });
}

fn img(arguments: &[&str]) {
    let mut command = Command::new(program("pcow-img"));
    let output = command.args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
}

/// As an operator, or as a program that knows QMP and nothing else.
fn snapshot(image: &Path, name: &str, with_img: bool) {
    if with_img {
        return img(&["snapshot", image.to_str().unwrap(), name]);
    }
    let mut qmp = Qmp::connect(&image.join("control.sock"), PATIENCE);
    let taken = qmp.execute("snapshot-create", &json!({ "name": name }));
    assert_eq!(taken.unwrap()["proof"], "lease");
}

/// Boots a clone of a snapshot, and compares with what every writer had told before.
fn check(scratch: &Scratch, image: &Path, name: &str, before: [u64; 4]) {
    let clone = scratch.path(&format!("clone-{name}"));
    let base = format!("{}@{name}", image.display());
    img(&["create", "--base", &base, clone.to_str().unwrap()]);
    let report = Guest::run_on(&clone, Qemu::new(), &look());
    for ((_, file, _), before) in WRITERS.into_iter().zip(before) {
        let found: u64 = report.value(&format!("/mnt/{file}")).parse().unwrap();
        assert!(
            found >= before,
            "{name}: {file} has {found} records, and {before} were durable before"
        );
    }
}

#[test]
fn every_snapshot_of_a_guest_that_writes_is_a_crash_consistent_point_in_time() {
    let scratch = Scratch::new();
    let image = scratch.image("image", SIZE, CLUSTER);
    let mut backend = Backend::start(&image, &[]);
    let machine = Qemu::new().disk(&disk(&scratch), "readonly=on,aio=threads,cache=none");
    let mut guest = Guest::boot(machine.pcow(&backend), &load());
    let mut taken = Vec::new();
    let mut last = [0; 4];
    for number in 0..snapshots() {
        wait_for_more(&mut guest, last);
        let before = progress(&mut guest);
        let name = format!("s{number}");
        snapshot(&image, &name, number % 2 == 0);
        last = progress(&mut guest);
        taken.push((name, before));
    }
    wait_for_more(&mut guest, last);
    // While the guest runs on: what is sealed can be read.
    check(&scratch, &image, &taken[0].0, taken[0].1);
    let last = progress(&mut guest);
    wait_for_more(&mut guest, last);
    guest.qemu().send_line("stop");
    let report = guest.finish();
    for ((_, file, _), told) in WRITERS.into_iter().zip(last) {
        let found: u64 = report.value(&format!("/mnt/{file}")).parse().unwrap();
        assert!(found > told, "{file} has {found} records, told {told}");
    }
    backend.wait_for_log("frontend detached");
    assert!(backend.terminate().success(), "{:#?}", backend.log());
    for (name, before) in &taken[1..] {
        check(&scratch, &image, name, *before);
    }
}
