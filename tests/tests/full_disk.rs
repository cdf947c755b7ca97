// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A full filesystem: the guest waits, the log says why, and it goes on when there is space. It is never killed, and never
//! reads wrong bytes.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use pcow_format::check::check;
use pcow_format::{Image, Stored};
use pcow_protocol::control::Client;
use pcow_protocol::frontend::{Frontend, FrontendOptions, StopReason};
use pcow_tests::backend::Backend;
use pcow_tests::loop_mount::LoopMount;
use pcow_tests::memory::Memory;
use pcow_tests::scratch::{Scratch, store};
use pcow_tests::waiting::wait_until;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 256 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);

/// A thread that stores into one cluster after the other and counts how far it came.
struct Writer {
    done: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Writer {
    fn start(memory: Memory, clusters: std::ops::Range<u64>) -> Self {
        let done = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&done);
        let thread = std::thread::spawn(move || {
            for cluster in clusters {
                memory.store(cluster * CLUSTER + 8, cluster + 1);
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { done, thread }
    }

    /// Whether it has made no step for a second, which is a hundred thousand times what a step takes.
    fn wait_until_stuck(&self) {
        let mut last = (0, std::time::Instant::now());
        wait_until("the writer waits", PATIENCE, || {
            let now = self.done.load(Ordering::Relaxed);
            if now != last.0 {
                last = (now, std::time::Instant::now());
            }
            last.1.elapsed() > Duration::from_secs(1)
        });
        assert!(
            !self.thread.is_finished(),
            "the writer waits, it has not ended"
        );
    }
}

/// What the next event of this name says.
fn wait_for_event(operator: &mut Client, name: &str) -> Value {
    loop {
        let event = operator.next_event(PATIENCE).unwrap().expect(name);
        if event.name == name {
            return event.data;
        }
    }
}

/// Serves `image` on the full filesystem `mount`, writes `clusters`, gives `ballast` back, and checks all bytes.
fn waits_and_goes_on(
    mount: &LoopMount,
    image: &Path,
    ballast: &Path,
    clusters: std::ops::Range<u64>,
) {
    let mut backend = Backend::start(image, &[]);
    let mut operator = Client::connect(image, None).unwrap().unwrap();
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let writer = Writer::start(Memory::new(frontend.region()), clusters.clone());
    backend.wait_for_log("the guest waits");
    writer.wait_until_stuck();
    assert_eq!(wait_for_event(&mut operator, "NO_SPACE")["no-space"], true);
    let log = backend.log().join("\n");
    assert!(log.contains("No space left"), "{log}");
    assert!(log.contains("free space on the filesystem"), "{log}");
    let reader = Memory::new(frontend.region());
    let done = writer.done.load(Ordering::Relaxed);
    for cluster in clusters.clone().take(usize::try_from(done).unwrap()) {
        assert_eq!(reader.load(cluster * CLUSTER + 8), cluster + 1);
    }
    // The region holds the image's lock for as long as anybody has it.
    drop(reader);
    std::fs::remove_file(ballast).unwrap();
    writer.thread.join().unwrap();
    backend.wait_for_log("the guest goes on");
    wait_for_event(&mut operator, "SPACE_AGAIN");
    let complaints = backend
        .log()
        .iter()
        .filter(|l| l.contains("the guest waits"))
        .count();
    assert_eq!(complaints, 1, "said once, not with every try");
    frontend.flush().unwrap();
    drop(frontend);
    backend.wait_for_log("frontend detached");
    assert!(backend.terminate().success());
    let image = Image::open(image, &[]).unwrap();
    for cluster in clusters {
        let mut word = [0; 8];
        image.read(cluster * CLUSTER + 8, &mut word).unwrap();
        assert_eq!(u64::from_le_bytes(word), cluster + 1, "cluster {cluster}");
    }
    assert!(mount.path().exists());
}

/// On ext4 a new layer's files would fit into what that keeps back for itself.
#[test]
fn a_snapshot_without_space_for_it_fails_and_the_guest_goes_on() {
    let mount = LoopMount::xfs(400);
    let images = Scratch::below(&mount.path());
    let path = images.image("image", SIZE, CLUSTER);
    let mut backend = Backend::start(&path, &[]);
    let mut operator = Client::connect(&path, None).unwrap().unwrap();
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let memory = Memory::new(frontend.region());
    memory.store(8, 1);
    let ballast = mount.fill_up_to("ballast", 0);
    let mut take = |name| operator.execute("snapshot-create", json!({ "name": name }), PATIENCE);
    let refused = take("refused").unwrap_err().to_string();
    assert!(refused.contains("No space left"), "{refused}");
    assert!(
        refused.contains("free space on the filesystem"),
        "{refused}"
    );
    // The guest goes on with what it has.
    assert_eq!(memory.load(8), 1);
    memory.store(8, 2);
    std::fs::remove_file(ballast).unwrap();
    take("taken").unwrap();
    memory.store(8, 3);
    let reason = wait_for_event(&mut operator, "SNAPSHOT_FAILED")["reason"].to_string();
    assert!(reason.contains("No space left"), "{reason}");
    let created = wait_for_event(&mut operator, "SNAPSHOT_CREATED");
    assert_eq!(
        (&created["number"], &created["name"]),
        (&json!(1), &json!("taken"))
    );
    drop((memory, frontend));
    assert!(backend.terminate().success());
    let stored = Stored::open(&path, &[]).unwrap();
    let report = check(&stored).unwrap();
    assert!(report.corruptions.is_empty(), "{:?}", report.corruptions);
    assert_eq!(stored.root().snapshots.len(), 1);
    let mut word = [0; 8];
    let sealed = stored.chain(stored.root().snapshots[0].layer).unwrap();
    sealed.read(8, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), 2);
}

/// The disk fails as disks do: a loop device whose file finds no space.
#[test]
fn operators_hear_of_a_flush_that_fails() {
    let disk = LoopMount::ext4_on_tmpfs(512, 64);
    let images = Scratch::below(&disk.path());
    let path = images.image("image", SIZE, CLUSTER);
    let backend = Backend::start(&path, &["--flush-interval", "0"]);
    let mut operator = Client::connect(&path, None).unwrap().unwrap();
    let mut other = Client::connect(&path, None).unwrap().unwrap();
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let memory = Memory::new(frontend.region());
    disk.take_space_of_device();
    for at in (0..8 * MIB).step_by(4096) {
        memory.store(at, at + 1);
    }
    let mut flush = || operator.execute("flush", json!({}), PATIENCE);
    let failed = flush().unwrap_err().to_string();
    assert!(failed.contains("cannot flush"), "{failed}");
    let reason = wait_for_event(&mut other, "FLUSH_FAILED")["reason"].to_string();
    assert!(reason.contains("cannot flush"), "{reason}");
    // It stays so (I7), and so does what the guest has stored.
    assert!(flush().is_err());
    assert_eq!(memory.load(4096), 4097);
}

/// With the option the machine is stopped while there is still space: nothing that could keep it from stopping waits yet.
#[test]
fn a_guest_on_a_filesystem_that_is_nearly_full_is_stopped_before_a_store_has_to_wait() {
    let mount = LoopMount::ext4(400);
    let images = Scratch::below(&mount.path());
    let image = images.image("image", SIZE, CLUSTER);
    let backend = Backend::start(&image, &["--stop-on-low-space"]);
    let mut operator = Client::connect(&image, None).unwrap().unwrap();
    let (stop, stops) = channel();
    let options = FrontendOptions {
        stop: Some(stop),
        ..FrontendOptions::default()
    };
    let frontend = Frontend::connect(backend.socket(), &options).unwrap();
    let memory = Memory::new(frontend.region());
    let mut clusters = 0..SIZE / CLUSTER;
    for round in 1..3 {
        let ballast = mount.fill_up_to("ballast", 32 * MIB);
        // The machine stops between two of its stores. If it is not told to, one of them waits for ever.
        let told = clusters.by_ref().find_map(|cluster| {
            memory.store(cluster * CLUSTER + 8, cluster + 1);
            stops.try_recv().ok()
        });
        assert_eq!(told, Some(StopReason::NoSpace), "round {round}");
        wait_until("an operator hears it", PATIENCE, || {
            let event = operator.next_event(PATIENCE).unwrap();
            event.is_some_and(|event| event.name == "SPACE_LOW")
        });
        // Its user continues it all the same: it goes on to the end of the space, and is not told again.
        for cluster in clusters.by_ref().take(8) {
            memory.store(cluster * CLUSTER + 8, cluster + 1);
        }
        assert!(stops.try_recv().is_err());
        std::fs::remove_file(ballast).unwrap();
        let cluster = clusters.next().unwrap();
        memory.store(cluster * CLUSTER + 8, cluster + 1);
    }
    let log = backend.log().join("\n");
    assert!(log.contains("the filesystem is nearly full"), "{log}");
    assert!(!log.contains("the guest waits"), "{log}");
    for cluster in 0..clusters.start {
        assert_eq!(memory.load(cluster * CLUSTER + 8), cluster + 1);
    }
}

#[test]
fn a_frontend_that_cannot_be_stopped_is_told_apart_and_waits() {
    let mount = LoopMount::ext4(192);
    let images = Scratch::below(&mount.path());
    let image = images.image("image", SIZE, CLUSTER);
    let ballast = mount.fill_up_to("ballast", 16 * MIB);
    let backend = Backend::start(&image, &["--stop-on-low-space"]);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    backend.wait_for_log("cannot stop its machine");
    let writer = Writer::start(Memory::new(frontend.region()), 0..64 * MIB / CLUSTER);
    backend.wait_for_log("the guest waits");
    std::fs::remove_file(ballast).unwrap();
    writer.thread.join().unwrap();
}

fn a_guest_that_fills_the_disk(mount: &LoopMount) {
    let images = Scratch::below(&mount.path());
    let image = images.image("image", SIZE, CLUSTER);
    let ballast = mount.fill_up_to("ballast", 16 * MIB);
    waits_and_goes_on(mount, &image, &ballast, 0..64 * MIB / CLUSTER);
}

#[test]
fn a_guest_on_a_full_ext4_waits_and_goes_on() {
    a_guest_that_fills_the_disk(&LoopMount::ext4(192));
}

#[test]
fn a_guest_on_a_full_xfs_waits_and_goes_on() {
    a_guest_that_fills_the_disk(&LoopMount::xfs(400));
}

/// An image with data in its first 64 MiB, not served.
fn written_image(images: &Scratch) -> std::path::PathBuf {
    let path = images.image("image", SIZE, CLUSTER);
    let image = Image::open(&path, &[]).unwrap();
    for cluster in 0..64 * MIB / CLUSTER {
        store(
            &image,
            cluster * CLUSTER,
            &vec![0; usize::try_from(CLUSTER).unwrap()],
        );
    }
    image.flush().unwrap();
    path
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

fn data_file(image: &Path) -> std::path::PathBuf {
    let files = std::fs::read_dir(image).unwrap().map(|e| e.unwrap().path());
    files
        .into_iter()
        .find(|p| p.extension().is_some_and(|e| e == "data"))
        .unwrap()
}

/// A restored copy may have holes where the map says data: the first store to one must not meet a full disk.
fn restored_sparse(mount: &LoopMount) {
    let images = Scratch::below(&mount.path());
    let image = written_image(&images);
    let data = data_file(&image);
    let data = data.to_str().unwrap();
    run(
        "cp",
        &[
            "--reflink=never",
            "--sparse=always",
            data,
            &format!("{data}.sparse"),
        ],
    );
    run("mv", &[&format!("{data}.sparse"), data]);
    rustix::fs::sync();
    let ballast = mount.fill_up_to("ballast", 16 * MIB);
    waits_and_goes_on(mount, &image, &ballast, 0..64 * MIB / CLUSTER);
}

#[test]
fn an_active_file_that_was_restored_sparse_gets_its_storage_before_it_is_mapped_on_ext4() {
    restored_sparse(&LoopMount::ext4(192));
}

#[test]
fn an_active_file_that_was_restored_sparse_gets_its_storage_before_it_is_mapped_on_xfs() {
    restored_sparse(&LoopMount::xfs(400));
}

/// Shared blocks count as allocated, but a store to one needs a new block.
#[test]
fn an_active_file_that_shares_blocks_with_a_backup_gets_its_own_before_it_is_mapped() {
    let mount = LoopMount::xfs(400);
    let images = Scratch::below(&mount.path());
    let image = written_image(&images);
    let data = data_file(&image);
    let backup = mount.path().join("backup");
    run(
        "cp",
        &[
            "--reflink=always",
            data.to_str().unwrap(),
            backup.to_str().unwrap(),
        ],
    );
    rustix::fs::sync();
    let ballast = mount.fill_up_to("ballast", 16 * MIB);
    let before = std::fs::read(&backup).unwrap();
    waits_and_goes_on(&mount, &image, &ballast, 0..64 * MIB / CLUSTER);
    assert!(
        std::fs::read(&backup).unwrap() == before,
        "the backup is as it was"
    );
}
