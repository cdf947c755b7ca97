// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an image on DAX promises of speed and durability, seen in the kernel's own trace events: synchronous mappings, huge
//! pages, no commit of the filesystem's journal on the path of a prepared fault.
//!
//! Needs a DAX filesystem for temporary files, made for huge pages, and the rights of root: `cargo xtask lab` runs it.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pcow_format::check::check;
use pcow_format::medium::Domain;
use pcow_format::ops::{Base, NewImage, create};
use pcow_format::{Cluster, ClusterSize, Image, Stored, VirtualSize, data_name};
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::files::allocated_bytes;
use pcow_tests::memory::Memory;
use pcow_tests::proc::{mappings, thread_state};
use pcow_tests::scratch::Scratch;
use pcow_tests::trace::{Event, Trace};
use pcow_tests::waiting::wait_until;
use rustix::fs::{FallocateFlags, fallocate, fstatfs, ioctl_ficlone};
use rustix::io::Errno;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const PAGE: u64 = 4 * KIB;
const CLUSTER: u64 = 64 * KIB;
const BLOCK: u64 = 2 * MIB;
/// `EXT4_SUPER_MAGIC` of linux/magic.h.
const EXT4_MAGIC: i64 = 0xef53;
/// Longer than anything here takes on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Faults of DAX files, and what makes a filesystem commit its journal, in the thread that waits for that.
const EVENTS: &[&str] = &[
    "fs_dax/dax_pmd_fault_done",
    "fs_dax/dax_pte_fault_done",
    "ext4/ext4_sync_file_enter",
    "xfs/xfs_file_fsync",
    "xfs/xfs_dir_fsync",
];

/// An image on DAX; `unit` as `--allocation-unit`.
fn image(scratch: &Scratch, unit: Option<u64>) -> PathBuf {
    created(&scratch.path("image"), unit, None)
}

fn created(path: &Path, unit: Option<u64>, base: Option<Base>) -> PathBuf {
    let new = NewImage {
        size: base.is_none().then(|| VirtualSize::new(SIZE).unwrap()),
        cluster: ClusterSize::new(CLUSTER).unwrap(),
        allocation_unit: unit,
        base,
    };
    create(path, &new, &[]).unwrap();
    let domain = Stored::open(path, &[]).unwrap().domain().unwrap();
    let place = path.display();
    assert_eq!(
        domain,
        Domain::Dax,
        "{place}: this test needs DAX, as in 'cargo xtask lab'"
    );
    path.to_owned()
}

fn data_file(image: &Path) -> PathBuf {
    let active = Stored::open(image, &[]).unwrap().root().active;
    image.join(data_name(active))
}

/// A backend and a frontend on an image.
struct Served {
    memory: Memory,
    frontend: Frontend,
    backend: Backend,
    data: PathBuf,
}

impl Served {
    fn new(image: &Path) -> Self {
        let backend = Backend::start(image, &[]);
        let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
        assert!(frontend.is_dax());
        Self {
            memory: Memory::new(frontend.region()),
            frontend,
            backend,
            data: data_file(image),
        }
    }

    /// Stores to every page of `length` bytes.
    fn touch(&self, start: u64, length: u64) {
        for at in (start..start + length).step_by(usize::try_from(PAGE).unwrap()) {
            self.memory.store(at, at + 1);
        }
    }

    /// What the kernel did meanwhile to the image: its data, its map, its other files, its directory.
    fn traced(&self, work: impl FnOnce()) -> Seen {
        let inode = |path: &Path| path.metadata().unwrap().ino();
        let image = self.data.parent().unwrap();
        let entries = image.read_dir().unwrap();
        let mut of_image: Vec<u64> = entries.map(|e| e.unwrap().ino()).collect();
        of_image.push(inode(image));
        let data = inode(&self.data);
        let mut events = Trace::new(EVENTS).during(work);
        // Of the map, too, a page may be touched for the first time; what is promised of faults are those of the data.
        events.retain(|e| {
            e.is_about(data) || is_commit(e) && of_image.iter().any(|inode| e.is_about(*inode))
        });
        Seen(events)
    }

    fn end(mut self) {
        drop((self.memory, self.frontend));
        assert!(self.backend.terminate().success());
    }
}

/// Whether somebody waited for a commit of the filesystem's journal.
fn is_commit(event: &Event) -> bool {
    ["ext4_sync_file_enter", "xfs_file_fsync", "xfs_dir_fsync"].contains(&&*event.name)
}

/// Faults of an image's data, and commits of all its files.
#[derive(Debug)]
struct Seen(Vec<Event>);

impl Seen {
    fn count(&self, name: &str, result: &str) -> usize {
        let wanted = |e: &&Event| e.name == name && e.text.contains(result);
        self.0.iter().filter(wanted).count()
    }

    fn huge_pages(&self) -> usize {
        self.count("dax_pmd_fault_done", "") - self.count("dax_pmd_fault_done", "FALLBACK")
    }

    fn small_faults(&self) -> usize {
        self.count("dax_pte_fault_done", "")
    }

    fn commits(&self) -> usize {
        self.0.iter().filter(|event| is_commit(event)).count()
    }
}

#[test]
fn the_data_of_a_dax_image_is_mapped_synchronously() {
    let scratch = Scratch::new();
    let served = Served::new(&image(&scratch, None));
    served.touch(10 * MIB, PAGE);
    let data = served.data.to_str().unwrap();
    let mut mapped = mappings(served.frontend.region());
    mapped.retain(|m| m.file == data);
    assert_eq!(mapped.len(), 1);
    assert!(mapped[0].flags.iter().any(|f| f == "sf"), "{mapped:?}");
}

/// In random order, so that each has to find an aligned extent by itself.
#[test]
fn each_block_that_is_allocated_whole_is_one_huge_page() {
    let scratch = Scratch::new();
    let served = Served::new(&image(&scratch, None));
    for block in [7, 2, 19, 11, 3] {
        let seen = served.traced(|| served.touch(block * BLOCK, BLOCK));
        assert_eq!((seen.huge_pages(), seen.small_faults()), (1, 0), "{seen:?}");
    }
}

/// The same after a restart, around a touch in the middle of a block, and without a commit: the storage is there.
#[test]
fn blocks_of_data_are_huge_pages_for_the_next_frontend_too() {
    let scratch = Scratch::new();
    let path = image(&scratch, None);
    let served = Served::new(&path);
    served.touch(4 * BLOCK, 3 * BLOCK);
    served.end();
    let served = Served::new(&path);
    // The last session gave back what it had prepared ahead. XFS takes a file for changed until somebody has waited for the
    // commit of that, even if it is committed already: the first touch does, once.
    served.touch(4 * BLOCK + BLOCK / 2, PAGE);
    // Not in sequence, so that nothing is prepared meanwhile.
    let seen = served.traced(|| {
        served.touch(6 * BLOCK + BLOCK / 2, PAGE);
        served.touch(5 * BLOCK + BLOCK / 2, PAGE);
    });
    assert_eq!((seen.huge_pages(), seen.small_faults()), (2, 0), "{seen:?}");
    assert_eq!(seen.commits(), 0, "{seen:?}");
}

/// Why a block is not mapped again when the last of it has become data: the kernel keeps its small pages small even if it
/// is mapped whole, here by the next frontend. If this fails, kernels have learned better, and mapping again pays.
#[test]
fn a_block_that_was_touched_in_small_units_keeps_its_small_pages() {
    let scratch = Scratch::new();
    let path = image(&scratch, Some(CLUSTER));
    let served = Served::new(&path);
    served.touch(4 * BLOCK, BLOCK);
    let maps = served.frontend.mapping_counts().maps;
    assert_eq!(maps, BLOCK / CLUSTER, "each unit is mapped once");
    served.end();
    let served = Served::new(&path);
    let seen = served.traced(|| served.touch(4 * BLOCK, BLOCK));
    assert_eq!(served.frontend.mapping_counts().maps, 1);
    assert_eq!(seen.huge_pages(), 0, "{seen:?}");
    assert!(seen.count("dax_pmd_fault_done", "FALLBACK") > 0, "{seen:?}");
}

/// Storage is prepared two blocks ahead of the third block of a sequence, and not again for the fourth.
#[test]
fn a_fault_in_a_prepared_run_waits_for_no_commit() {
    let scratch = Scratch::new();
    let served = Served::new(&image(&scratch, None));
    for block in 10..13 {
        served.touch(block * BLOCK, PAGE);
    }
    wait_until("two blocks are prepared", PATIENCE, || {
        let blocks = served.data.metadata().unwrap().blocks() * 512;
        blocks >= 5 * BLOCK && thread_state(served.backend.pid(), "prepare") == 'S'
    });
    let seen = served.traced(|| served.touch(13 * BLOCK, BLOCK));
    assert_eq!((seen.huge_pages(), seen.small_faults()), (1, 0), "{seen:?}");
    assert_eq!(seen.commits(), 0, "{seen:?}");
    assert_eq!(seen.count("fault_done", "NEEDDSYNC"), 0, "{seen:?}");
}

/// The control of the test above: the counter sees commits. Data without storage, as in a file that was restored sparse,
/// is reserved at its first mapping and not written.
#[test]
fn a_fault_in_storage_that_is_only_reserved_waits_for_a_commit() {
    let scratch = Scratch::new();
    let path = image(&scratch, None);
    let opened = Image::open(&path, &[]).unwrap();
    let run = opened.cluster_size().covering(&(0..BLOCK));
    opened.make_writable(run, &mut Vec::new()).unwrap();
    drop(opened);
    let file = File::options().write(true).open(data_file(&path)).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 0, BLOCK).unwrap();
    let served = Served::new(&path);
    let seen = served.traced(|| served.touch(0, PAGE));
    assert!(seen.commits() > 0, "{seen:?}");
}

/// The control for the files that a fault of the data would not show: a commit of the map is seen, and one of the directory.
#[test]
fn a_commit_of_any_file_of_an_image_is_seen() {
    let scratch = Scratch::new();
    let path = image(&scratch, None);
    let served = Served::new(&path);
    served.touch(0, PAGE);
    let map = served.data.with_extension("map");
    for file in [&map, &path.join("image.json"), &path] {
        let seen = served.traced(|| File::open(file).unwrap().sync_data().unwrap());
        assert_eq!(seen.commits(), 1, "{}: {seen:?}", file.display());
    }
    let seen = served.traced(|| ());
    assert_eq!(seen.commits(), 0, "{seen:?}");
}

/// I1: the bytes are written durably, which waits for the medium or for the journal, before the word says that they are there.
#[test]
fn a_copy_of_a_base_is_durable_before_it_is_handed_out() {
    let scratch = Scratch::new();
    let path = image(&scratch, Some(CLUSTER));
    let served = Served::new(&path);
    served.touch(0, CLUSTER);
    served.end();
    let base = Base::Image {
        path,
        snapshot: None,
        reference: false,
    };
    let clone = created(&scratch.path("clone"), Some(CLUSTER), Some(base));
    let served = Served::new(&clone);
    let seen = served.traced(|| served.memory.store(0, 7));
    assert!(seen.commits() > 0, "{seen:?}");
    assert_eq!(served.memory.load(0), 7);
    for at in (PAGE..CLUSTER).step_by(usize::try_from(PAGE).unwrap()) {
        assert_eq!(served.memory.load(at), at + 1);
    }
}

#[test]
fn only_written_storage_counts_as_storage() {
    let scratch = Scratch::new();
    let opened = Image::open(&image(&scratch, None), &[]).unwrap();
    let data = opened.active().data_file();
    let file = data.as_real().unwrap();
    file.write_all_at(&[1; 128 << 10], 64 * KIB).unwrap();
    fallocate(file, FallocateFlags::empty(), 256 * KIB, 64 * KIB).unwrap();
    let has = |from: u64, to: u64| data.has_own_storage(from * KIB..to * KIB).unwrap();
    assert!(has(64, 192) && has(68, 100));
    assert!(!has(0, 128), "begins in a hole");
    assert!(!has(128, 256), "ends in a hole");
    assert!(!has(256, 320), "is only reserved");
}

/// M17: the kernel's own copy is left in the CPU's caches by unsharing and by a guest's store.
#[test]
fn what_shares_its_storage_with_a_copy_gets_its_own_durably_before_the_guest_stores() {
    let scratch = Scratch::new();
    let path = image(&scratch, None);
    let served = Served::new(&path);
    served.touch(0, BLOCK);
    served.end();
    let (original, copy) = (data_file(&path), scratch.path("copy"));
    let (original, copy) = (
        File::open(original).unwrap(),
        File::create_new(copy).unwrap(),
    );
    let shared = ioctl_ficlone(&copy, &original);
    // Files of ext4 share no storage, so there is nothing to give.
    if fstatfs(&copy).unwrap().f_type == EXT4_MAGIC {
        assert_eq!(shared, Err(Errno::OPNOTSUPP));
        return;
    }
    shared.unwrap();
    let has_own = || {
        let opened = Image::open(&path, &[]).unwrap();
        let data = opened.active().data_file();
        data.has_own_storage(0..BLOCK).unwrap()
    };
    assert!(!has_own());
    let served = Served::new(&path);
    let seen = served.traced(|| assert_eq!(served.memory.load(0), 1));
    assert!(seen.commits() > 0, "{seen:?}");
    served.memory.store(PAGE, 7);
    served.end();
    assert!(has_own());
    let mut word = [0; 8];
    let content = Image::open(&path, &[]).unwrap();
    for (at, expected) in [(0, 1), (PAGE, 7), (2 * PAGE, 2 * PAGE + 1)] {
        content.read(at, &mut word).unwrap();
        assert_eq!(u64::from_le_bytes(word), expected, "{at}");
    }
    let copy = File::open(scratch.path("copy")).unwrap();
    copy.read_exact_at(&mut word, PAGE).unwrap();
    assert_eq!(u64::from_le_bytes(word), PAGE + 1);
}

#[test]
fn words_and_bytes_are_there_after_the_backend_was_killed() {
    let scratch = Scratch::new();
    let path = image(&scratch, None);
    let mut served = Served::new(&path);
    served.touch(5 * BLOCK, BLOCK);
    served.backend.kill();
    drop((served.memory, served.frontend));
    let stored = Stored::open(&path, &[]).unwrap();
    let report = check(&stored).unwrap();
    assert!(report.corruptions.is_empty(), "{report:?}");
    let image = Image::open(&path, &[]).unwrap();
    let word = image.active().state(Cluster(5 * BLOCK / CLUSTER)).unwrap();
    assert_eq!(word, pcow_format::map::State::Data);
    drop(image);
    let served = Served::new(&path);
    for at in (5 * BLOCK..6 * BLOCK).step_by(usize::try_from(PAGE).unwrap()) {
        assert_eq!(served.memory.load(at), at + 1);
    }
}

/// Touches one page in each of sixteen blocks; returns by how much the image grew.
fn growth(unit: Option<u64>) -> (u64, u64) {
    let scratch = Scratch::new();
    let path = image(&scratch, unit);
    let unit = Stored::open(&path, &[]).unwrap().root().allocation_unit;
    let before = allocated_bytes(&path);
    let served = Served::new(&path);
    // Every other block: no sequence.
    (0..16).for_each(|i| served.touch((2 * i + 1) % 32 * BLOCK, PAGE));
    served.end();
    (unit, allocated_bytes(&path) - before)
}

#[test]
fn an_image_grows_by_its_allocation_unit() {
    for (asked, expected) in [(None, BLOCK), (Some(CLUSTER), CLUSTER)] {
        let (unit, grown) = growth(asked);
        println!(
            "unit {} KiB: 16 touches take {} KiB",
            unit / KIB,
            grown / KIB
        );
        assert_eq!(unit, expected);
        // And what the filesystem needs to find them.
        assert!(
            (16 * unit..=16 * unit + 128 * KIB).contains(&grown),
            "{grown}"
        );
    }
}

/// A part of the last session's storage was prepared and not used.
#[test]
fn what_was_prepared_and_not_used_is_given_back() {
    let scratch = Scratch::new();
    let path = image(&scratch, None);
    let served = Served::new(&path);
    let data = served.data.clone();
    served.touch(10 * BLOCK, 3 * BLOCK);
    wait_until("more is prepared", PATIENCE, || {
        data.metadata().unwrap().blocks() * 512 >= 5 * BLOCK
    });
    served.end();
    let taken = allocated_bytes(&data);
    assert!(taken <= 3 * BLOCK + 128 * KIB, "{taken}");
}
