// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images on the real filesystem of the machine: layers, snapshots, clones, refusals.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use pcow_format::check::check;
use pcow_format::map::{TAG_OFFSET, Tag};
use pcow_format::medium::{Domain, Identity};
use pcow_format::ops::{Base, NewImage, create, rebase_unsafe};
use pcow_format::{
    Cluster, ClusterSize, ErrorKind, FLUSH_FAILED_FILE, Image, Source, Stored, VirtualSize,
    data_name, holder, map_name,
};

const MIB: u64 = 1 << 20;

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn create(&self, name: &str, mib: u64) -> PathBuf {
        self.create_with(name, Some(mib), 64 << 10, None)
    }

    fn create_with(
        &self,
        name: &str,
        mib: Option<u64>,
        cluster: u64,
        base: Option<Base>,
    ) -> PathBuf {
        let new = NewImage {
            size: mib.map(|m| VirtualSize::new(m * MIB).unwrap()),
            cluster: ClusterSize::new(cluster).unwrap(),
            allocation_unit: None,
            base,
        };
        create(&self.path(name), &new, &[]).unwrap();
        self.path(name)
    }

    fn clone_of(&self, name: &str, base: &Path, snapshot: Option<&str>) -> PathBuf {
        let base = Base::Image {
            path: base.to_owned(),
            snapshot: snapshot.map(str::to_owned),
            reference: false,
        };
        self.create_with(name, None, 64 << 10, Some(base))
    }
}

fn open(path: &Path) -> Image {
    Image::open(path, &[]).unwrap()
}

/// Stores `byte` at `offset` the way a guest does: the cluster becomes writable, then its data file is written.
fn store(image: &Image, offset: u64, byte: u8) {
    let cluster = image.cluster_size().cluster_at(offset);
    image
        .make_writable(cluster.only(), &mut Vec::new())
        .unwrap();
    let file = image.active().data_file().as_real().unwrap();
    std::os::unix::fs::FileExt::write_all_at(file, &[byte], offset).unwrap();
}

fn load(image: &Image, offset: u64) -> u8 {
    let mut buf = [0xee];
    image.read(offset, &mut buf).unwrap();
    buf[0]
}

fn assert_clean(path: &Path) {
    let report = check(&Stored::open(path, &[]).unwrap()).unwrap();
    assert_eq!(report.corruptions, Vec::<String>::new());
    assert_eq!(report.leaks, Vec::<String>::new());
}

#[test]
fn a_new_image_of_the_largest_size_takes_next_to_nothing() {
    let s = Scratch::new();
    let path = s.create("a", (8 << 20) - 2);
    let taken = Stored::open(&path, &[])
        .unwrap()
        .total_usage()
        .unwrap()
        .total();
    let image = open(&path);
    // On DAX the map, two bits for each cluster of 64 KiB, is written as a whole.
    let map = match image.domain() {
        Domain::PageCache => 0,
        Domain::Dax => 32 * MIB,
    };
    assert!((map..map + (64 << 10)).contains(&taken), "{taken} bytes");
    assert_eq!(load(&image, (8 << 40) - 3 * MIB), 0);
    store(&image, (8 << 40) - 3 * MIB, 7);
    assert_eq!(load(&image, (8 << 40) - 3 * MIB), 7);
}

#[test]
fn what_was_stored_before_a_clean_end_or_a_kill_is_there_at_the_next_open() {
    let s = Scratch::new();
    let path = s.create("a", 64);
    let image = open(&path);
    store(&image, 5 * MIB, 1);
    image.flush().unwrap();
    store(&image, 9 * MIB, 2);
    drop(image);
    let image = open(&path);
    assert_eq!(image.recovery().discarded_clusters, 0);
    assert_eq!((load(&image, 5 * MIB), load(&image, 9 * MIB)), (1, 2));
    image.flush().unwrap();
    drop(image);
    assert_clean(&path);
}

#[test]
fn a_rollback_keeps_what_it_replaces_and_can_be_taken_back() {
    let s = Scratch::new();
    let path = s.create("a", 64);
    let mut image = open(&path);
    store(&image, MIB, 1);
    assert_eq!(image.snapshot(Some("old")).unwrap(), 1);
    store(&image, MIB, 2);
    assert_eq!(load(&image, MIB), 2);
    let saved = image.rollback("old", false).unwrap().saved_as.unwrap();
    assert_eq!((load(&image, MIB), saved.0), (1, 2));
    assert!(saved.1.starts_with("before-rollback-"), "{}", saved.1);
    assert_eq!(image.rollback(&saved.1, false).unwrap().saved_as, None);
    assert_eq!(load(&image, MIB), 2);
    image.snapshot(None).unwrap();
    assert_eq!(image.root().snapshots.len(), 3);
    drop(image);
    assert_clean(&path);
}

#[test]
fn clones_share_the_files_of_their_base_and_diverge_from_it() {
    let s = Scratch::new();
    let base = s.create("base", 64);
    let image = open(&base);
    store(&image, MIB, 1);
    let layer = image.root().active;
    drop(image);
    let one = s.clone_of("one", &base, None);
    let two = s.clone_of("two", &base, None);
    let three = s.clone_of("three", &one, None);
    let before = std::fs::read(base.join(data_name(layer))).unwrap();
    for (path, byte) in [(&one, 11), (&two, 12), (&three, 13)] {
        let image = open(path);
        assert_eq!(image.source(Cluster(16)).unwrap(), Source::Sealed);
        assert_eq!(load(&image, MIB), 1);
        store(&image, MIB, byte);
        store(&image, 2 * MIB, byte);
    }
    for (path, byte) in [(&one, 11), (&two, 12), (&three, 13)] {
        assert_eq!(load(&open(path), MIB), byte);
        assert_clean(path);
    }
    assert_eq!(std::fs::read(base.join(data_name(layer))).unwrap(), before);
    let sealed = Stored::open(&base, &[]).unwrap();
    assert_eq!(
        sealed.root().snapshots.len(),
        1,
        "two clones of one state need one snapshot"
    );
    assert!(sealed.total_usage().unwrap().shared > 0);
}

#[test]
fn a_clone_outlives_its_base() {
    let s = Scratch::new();
    let base = s.create("base", 16);
    store(&open(&base), MIB, 1);
    let clone = s.clone_of("clone", &base, None);
    std::fs::remove_dir_all(&base).unwrap();
    assert_eq!(load(&open(&clone), MIB), 1);
}

#[test]
fn a_raw_base_shows_its_bytes_and_is_refused_when_it_changed() {
    let s = Scratch::new();
    let raw = s.path("disk.raw");
    std::fs::write(&raw, vec![3; 3 * 4096 + 5]).unwrap();
    let path = s.create_with("a", Some(4), 4096, Some(Base::Raw { path: raw.clone() }));
    let image = open(&path);
    assert_eq!(
        (load(&image, 4096 * 3 + 4), load(&image, 4096 * 3 + 5)),
        (3, 0)
    );
    store(&image, 4096 * 3, 9);
    assert_eq!((load(&image, 4096 * 3), load(&image, 4096 * 3 + 1)), (9, 3));
    assert_eq!(load(&image, 4096 * 3 + 5), 0);
    drop(image);
    std::fs::write(&raw, vec![4; 3 * 4096 + 5]).unwrap();
    let error = Image::open(&path, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BaseChanged, "{error}");
}

#[test]
fn a_safe_rebase_keeps_every_byte_and_an_unsafe_one_shows_the_new_base() {
    let s = Scratch::new();
    let (a, b) = (s.create("a", 16), s.create("b", 16));
    for (path, offsets) in [(&a, [MIB, 2 * MIB]), (&b, [2 * MIB, 3 * MIB])] {
        let image = open(path);
        offsets
            .iter()
            .for_each(|o| store(&image, *o, if path == &a { 1 } else { 2 }));
    }
    let clone = s.clone_of("clone", &a, None);
    let on_b = Base::Image {
        path: b.clone(),
        snapshot: None,
        reference: false,
    };
    let mut image = open(&clone);
    store(&image, 4 * MIB, 9);
    image.rebase(Some(&on_b), "clone").unwrap();
    let bytes = [1, 2, 3, 4].map(|m| load(&image, m * MIB));
    assert_eq!(bytes, [1, 1, 0, 9]);
    drop(image);
    assert_clean(&clone);
    let other = s.clone_of("other", &a, None);
    rebase_unsafe(&other, Some(&on_b), &[]).unwrap();
    let mut image = open(&other);
    assert_eq!([1, 2, 3].map(|m| load(&image, m * MIB)), [0, 2, 2]);
    store(&image, 3 * MIB, 5);
    image.rebase(None, "other").unwrap();
    assert_eq!([1, 2, 3].map(|m| load(&image, m * MIB)), [0, 2, 5]);
    assert_eq!(image.root().layers.len(), 1, "independent");
}

#[test]
fn an_image_in_use_names_its_holder_and_is_free_afterwards() {
    let s = Scratch::new();
    let path = s.create("a", 16);
    let image = open(&path);
    let error = Image::open(&path, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", std::process::id())),
        "{error}"
    );
    drop(image);
    open(&path);
}

#[test]
fn a_copy_by_hard_links_is_refused_and_left_alone() {
    let s = Scratch::new();
    let path = s.create("a", 16);
    let layer = Stored::open(&path, &[]).unwrap().root().active;
    std::fs::hard_link(path.join(data_name(layer)), s.path("second")).unwrap();
    assert_eq!(
        Image::open(&path, &[]).unwrap_err().kind(),
        ErrorKind::Linked
    );
    std::fs::remove_file(s.path("second")).unwrap();
    std::fs::hard_link(path.join("lock"), s.path("second")).unwrap();
    assert_eq!(
        Image::open(&path, &[]).unwrap_err().kind(),
        ErrorKind::Linked
    );
}

#[test]
fn live_words_of_another_file_or_boot_are_discarded_and_counted() {
    let s = Scratch::new();
    let path = s.create("a", 16);
    let image = open(&path);
    store(&image, MIB, 1);
    image.flush().unwrap();
    store(&image, 2 * MIB, 2);
    drop(image);
    // A copied file has another inode: its page cache was never this one's.
    let copy = s.path("copy");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(&path).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let image = open(&copy);
    if image.domain() == Domain::Dax {
        // No word is ever live there: what was stored was durable at once, and was copied.
        assert_eq!(image.recovery().discarded_clusters, 0);
        assert_eq!((load(&image, MIB), load(&image, 2 * MIB)), (1, 2));
        return;
    }
    assert_eq!(image.recovery().discarded_clusters, 1);
    assert_eq!((load(&image, MIB), load(&image, 2 * MIB)), (1, 0));
    // The discarded cluster's bytes are still in the file: they must not come back with a new allocation.
    store(&image, 2 * MIB + 1, 5);
    assert_eq!(load(&image, 2 * MIB), 0);
}

#[test]
fn a_link_or_fifo_in_place_of_a_file_is_refused_without_waiting() {
    let s = Scratch::new();
    let path = s.create("a", 16);
    let layer = Stored::open(&path, &[]).unwrap().root().active;
    let data = path.join(data_name(layer));
    std::fs::rename(&data, s.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink(s.path("elsewhere"), &data).unwrap();
    assert!(Image::open(&path, &[]).is_err());
    std::fs::remove_file(&data).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &data,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    assert!(Image::open(&path, &[]).is_err());
}

/// Creation once worked in `<name>.part` and emptied whatever it found under that name.
#[test]
fn creating_an_image_leaves_alone_what_has_its_name_with_part_behind_it() {
    let s = Scratch::new();
    let other = s.create("a.part", 4);
    s.create("a", 4);
    open(&other);
    std::fs::create_dir(s.path("b.part")).unwrap();
    std::fs::write(s.path("b.part/thesis.tex"), "x").unwrap();
    s.create("b", 4);
    assert!(s.path("b.part/thesis.tex").exists());
}

/// Two creations of one name once shared one unfinished directory.
#[test]
fn of_two_creations_of_one_name_at_once_one_makes_a_whole_image() {
    let s = Scratch::new();
    for round in 0..20 {
        let path = s.path(&format!("image{round}"));
        let sizes = [4, 8].map(|mib| VirtualSize::new(mib * MIB).unwrap());
        let make = |size| {
            let new = NewImage {
                size: Some(size),
                cluster: ClusterSize::new(64 << 10).unwrap(),
                allocation_unit: None,
                base: None,
            };
            create(&path, &new, &[]).is_ok().then_some(size)
        };
        let made: Vec<_> = std::thread::scope(|scope| {
            let threads = sizes.map(|size| scope.spawn(move || make(size)));
            threads
                .into_iter()
                .filter_map(|t| t.join().unwrap())
                .collect()
        });
        assert_eq!(made.len(), 1);
        let root = Stored::open(&path, &[]).unwrap().root().clone();
        assert_eq!(root.active_layer().unwrap().virtual_size, made[0].bytes());
        let left = std::fs::read_dir(s.path(".")).unwrap().count();
        assert_eq!(left, round + 1, "nothing unfinished is left");
    }
}

#[test]
fn a_creation_that_is_refused_leaves_its_base_alone() {
    let s = Scratch::new();
    let base = s.create("a", 4);
    store(&open(&base), 0, 1);
    let new = NewImage {
        size: None,
        cluster: ClusterSize::new(64 << 10).unwrap(),
        allocation_unit: Some(3),
        base: Some(Base::Image {
            path: base.clone(),
            snapshot: None,
            reference: false,
        }),
    };
    assert!(create(&s.path("b"), &new, &[]).is_err());
    assert_eq!(Stored::open(&base, &[]).unwrap().root().snapshots.len(), 0);
}

#[test]
fn the_allowed_directories_hold_for_the_base_of_a_base_too() {
    let (s, elsewhere) = (Scratch::new(), Scratch::new());
    std::fs::write(elsewhere.path("disk.raw"), vec![1; 4096]).unwrap();
    let dirs = [elsewhere.path(".")];
    let new = |base| NewImage {
        size: None,
        cluster: ClusterSize::new(64 << 10).unwrap(),
        allocation_unit: None,
        base: Some(base),
    };
    let raw = Base::Raw {
        path: elsewhere.path("disk.raw"),
    };
    create(&s.path("a"), &new(raw), &dirs).unwrap();
    let a = Base::Image {
        path: s.path("a"),
        snapshot: None,
        reference: false,
    };
    create(&s.path("b"), &new(a), &dirs).unwrap();
    assert_eq!(load(&Image::open(&s.path("b"), &dirs).unwrap(), 0), 1);
    let error = Image::open(&s.path("b"), &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BaseForbidden);
}

/// Asking took a read lock for a moment, and an open at that moment was refused.
#[test]
fn asking_for_the_holder_keeps_nobody_out() {
    let s = Scratch::new();
    let path = s.create("a", 4);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let stored = Stored::open(&path, &[]).unwrap();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                holder(stored.directory()).unwrap();
            }
        });
        let refused = (0..200)
            .filter(|_| Image::open(&path, &[]).is_err())
            .count();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(refused, 0);
    });
}

/// A missing base was said to be mended by a rebase, which first opened the missing base.
#[test]
fn an_image_whose_base_is_gone_can_be_linked_to_another() {
    let s = Scratch::new();
    let raw = |name: &str, byte| {
        std::fs::write(s.path(name), vec![byte; 8192]).unwrap();
        Base::Raw { path: s.path(name) }
    };
    let path = s.create_with("a", Some(4), 4096, Some(raw("old.raw", 1)));
    store(&open(&path), 4096, 9);
    std::fs::remove_file(s.path("old.raw")).unwrap();
    assert_eq!(
        Image::open(&path, &[]).unwrap_err().kind(),
        ErrorKind::BaseMissing
    );
    rebase_unsafe(&path, Some(&raw("new.raw", 2)), &[]).unwrap();
    let image = open(&path);
    assert_eq!((load(&image, 0), load(&image, 4096)), (2, 9));
    assert_eq!(image.root().layers.len(), 2);
}

/// A moved base keeps its layers' names, and those were taken for what the image had already.
#[test]
fn an_image_whose_base_was_moved_can_be_linked_to_its_new_place() {
    let s = Scratch::new();
    let base = s.create("base", 4);
    let mut image = open(&base);
    store(&image, 0, 1);
    image.snapshot(Some("s")).unwrap();
    drop(image);
    let at = |path: &Path, reference| Base::Image {
        path: path.to_owned(),
        snapshot: Some("s".into()),
        reference,
    };
    let path = s.create_with("a", None, 64 << 10, Some(at(&base, true)));
    let moved = s.path("moved");
    std::fs::rename(&base, &moved).unwrap();
    assert_eq!(
        Image::open(&path, &[]).unwrap_err().kind(),
        ErrorKind::BaseMissing
    );
    rebase_unsafe(&path, Some(&at(&moved, true)), &[]).unwrap();
    assert_eq!(load(&open(&path), 0), 1);
    rebase_unsafe(&path, Some(&at(&moved, false)), &[]).unwrap();
    std::fs::remove_dir_all(&moved).unwrap();
    assert_eq!(load(&open(&path), 0), 1, "adopted");
    assert_clean(&path);
}

/// Files of other people in an image's directory were removed, or made it unusable.
#[test]
fn what_is_not_the_images_own_is_left_alone_and_harms_nothing() {
    let s = Scratch::new();
    let path = s.create("a", 4);
    std::fs::write(path.join("notes.part"), "mine").unwrap();
    std::fs::create_dir(path.join("folder.part")).unwrap();
    std::fs::write(path.join("67e5504410b1426f9247bb680e5fe0c8.data"), "").unwrap();
    std::fs::write(path.join("image.json.part"), "cut off").unwrap();
    open(&path);
    assert!(path.join("notes.part").exists());
    assert!(path.join("67e5504410b1426f9247bb680e5fe0c8.data").exists());
    assert!(!path.join("image.json.part").exists());
}

/// I7: after a failed sync the kernel takes the pages for written, so the next one would succeed without them.
#[test]
fn an_image_with_the_mark_of_a_failed_flush_stays_closed_until_somebody_has_checked_it() {
    let s = Scratch::new();
    let path = s.create("a", 4);
    std::fs::write(path.join(FLUSH_FAILED_FILE), "").unwrap();
    let error = Image::open(&path, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FlushFailed, "{error}");
    assert!(error.advice().unwrap().contains("--repair"));
    assert_clean(&path);
    std::fs::remove_file(path.join(FLUSH_FAILED_FILE)).unwrap();
    open(&path);
}

/// The kernel takes what a failed sync did not write for written. What is found afterwards is written again, what was live is
/// given up, and then all is as it was.
#[test]
fn after_a_failed_flush_the_next_opening_keeps_what_was_flushed_before_and_gives_up_the_rest() {
    let s = Scratch::new();
    let path = s.create("a", 4);
    let image = open(&path);
    store(&image, 0, 1);
    store(&image, 1 << 20, 2);
    image.flush().unwrap();
    store(&image, 2 << 20, 3);
    let map = path.join(map_name(image.root().active));
    // On DAX the third is data already, and stays.
    let (given_up, third) = match image.domain() {
        Domain::PageCache => (1, 0),
        Domain::Dax => (0, 3),
    };
    drop(image);
    let identity = Identity {
        device: 0,
        inode: 0,
        birth_ns: 0,
    };
    let tag = Tag::of_failed_flush(identity).encode();
    let map = std::fs::File::options().write(true).open(map).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&map, &tag, TAG_OFFSET).unwrap();
    for discarded in [given_up, 0] {
        let image = open(&path);
        assert_eq!(image.recovery().discarded_clusters, discarded);
        let shown = [0, 1 << 20, 2 << 20].map(|at| load(&image, at));
        assert_eq!(shown, [1, 2, third]);
    }
    // An opening gives no storage back (I3).
    let report = check(&Stored::open(&path, &[]).unwrap()).unwrap();
    assert_eq!(report.corruptions, Vec::<String>::new());
}
