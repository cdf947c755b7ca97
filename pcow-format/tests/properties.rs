// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images on the real filesystem against plain arrays of bytes, and the simulated filesystem against the real one.
#![allow(missing_docs, clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pcow_format::check::check;
use pcow_format::medium::real::RealDirectory;
use pcow_format::medium::sim::Sim;
use pcow_format::medium::{Access, Directory, Domain, Site};
use pcow_format::ops::{Base, NewImage, create};
use pcow_format::{ClusterSize, Image, Stored, VirtualSize};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

const MIB: usize = 1 << 20;
/// Disks have 1 to 3 steps of 2 MiB.
const STEP: usize = 2 * MIB;
const CLUSTER_SIZES: [u64; 3] = [4 << 10, 64 << 10, 2 << 20];

#[derive(Debug, Clone)]
enum Action {
    Store {
        at: usize,
        len: usize,
        byte: u8,
    },
    Read {
        at: usize,
        len: usize,
    },
    Flush,
    Snapshot,
    /// To the snapshot of this index, modulo their number.
    Rollback {
        to: usize,
        discard: bool,
    },
    Reopen,
    /// Goes on with a clone of this cluster size and number of steps.
    Clone {
        cluster: u64,
        steps: usize,
    },
    /// Onto a bystander, or onto nothing.
    Rebase {
        onto_bystander: bool,
    },
}

fn action() -> impl Strategy<Value = Action> {
    let at = || 0..3 * STEP;
    // Mostly small pieces, some that cover clusters of 64 KiB and more.
    let len = || prop_oneof![4 => 1..9000usize, 1 => 60_000..400_000usize];
    prop_oneof![
        8 => (at(), len(), 1..=255u8).prop_map(|(at, len, byte)| Action::Store { at, len, byte }),
        4 => (at(), len()).prop_map(|(at, len)| Action::Read { at, len }),
        2 => Just(Action::Flush),
        2 => Just(Action::Snapshot),
        2 => (0..8usize, any::<bool>()).prop_map(|(to, discard)| Action::Rollback { to, discard }),
        2 => Just(Action::Reopen),
        2 => (select(&CLUSTER_SIZES), 1..=3usize)
            .prop_map(|(cluster, steps)| Action::Clone { cluster, steps }),
        1 => any::<bool>().prop_map(|onto_bystander| Action::Rebase { onto_bystander }),
    ]
}

/// An image under test, what it must show, and the images that it was cloned from.
struct World {
    scratch: tempfile::TempDir,
    path: PathBuf,
    image: Option<Image>,
    disk: Vec<u8>,
    /// Number of each snapshot, and what it must show.
    snapshots: Vec<(u64, Vec<u8>)>,
    left_behind: Vec<(PathBuf, Vec<u8>)>,
    bystander: PathBuf,
}

impl World {
    fn new(cluster: u64, bystander_cluster: u64) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let bystander = scratch.path().join("bystander");
        create_image(&bystander, bystander_cluster, 2, None);
        let mut world = Self {
            path: bystander.clone(),
            image: Some(open(&bystander)),
            disk: vec![0; 2 * STEP],
            snapshots: Vec::new(),
            left_behind: Vec::new(),
            bystander: bystander.clone(),
            scratch,
        };
        for at in [0, 100_000, STEP - 5000, STEP + MIB] {
            world.store(at, 10_000, 0xbb);
        }
        world.leave();
        world.path = world.scratch.path().join("image-0");
        create_image(&world.path, cluster, 2, None);
        world.disk = vec![0; 2 * STEP];
        world.image = Some(open(&world.path));
        world
    }

    fn image(&mut self) -> &mut Image {
        self.image.as_mut().unwrap()
    }

    /// Closes the image and remembers what it must go on showing.
    fn leave(&mut self) {
        self.image = None;
        let disk = std::mem::take(&mut self.disk);
        self.left_behind.push((self.path.clone(), disk));
    }

    fn perform(&mut self, action: &Action) {
        match *action {
            Action::Store { at, len, byte } => self.store(at, len, byte),
            Action::Read { at, len } => self.read(at, len),
            Action::Flush => self.image().flush().unwrap(),
            Action::Snapshot => self.snapshot(),
            Action::Rollback { to, discard } => self.rollback(to, discard),
            Action::Reopen => self.reopen(),
            Action::Clone { cluster, steps } => self.clone_image(cluster, steps),
            Action::Rebase { onto_bystander } => self.rebase(onto_bystander),
        }
    }

    /// Stores as a guest does: clusters become writable, then the data file changes at the disk's offset.
    fn store(&mut self, at: usize, len: usize, byte: u8) {
        let at = at % self.disk.len();
        let end = (at + len).min(self.disk.len());
        self.disk[at..end].fill(byte);
        let image = self.image.as_ref().unwrap();
        let clusters = image.cluster_size().covering(&(offset(at)..offset(end)));
        image.make_writable(clusters, &mut Vec::new()).unwrap();
        let file = image.active().data_file().as_real().unwrap();
        file.write_all_at(&vec![byte; end - at], offset(at))
            .unwrap();
    }

    fn read(&mut self, at: usize, len: usize) {
        let at = at % self.disk.len();
        let end = (at + len).min(self.disk.len());
        let mut found = vec![0xee; end - at];
        self.image().read(offset(at), &mut found).unwrap();
        assert_same("a read", &found, &self.disk[at..end]);
    }

    fn snapshot(&mut self) {
        let number = self.image().snapshot(None).unwrap();
        self.snapshots.push((number, self.disk.clone()));
    }

    fn rollback(&mut self, to: usize, discard: bool) {
        if self.snapshots.is_empty() {
            return;
        }
        let (number, contents) = self.snapshots[to % self.snapshots.len()].clone();
        let done = self.image().rollback(&number.to_string(), discard).unwrap();
        if let Some((number, _)) = done.saved_as {
            self.snapshots.push((number, self.disk.clone()));
        }
        self.disk = contents;
    }

    fn reopen(&mut self) {
        self.image = None;
        let image = open(&self.path);
        assert_eq!(image.recovery().discarded_clusters, 0);
        self.image = Some(image);
    }

    /// What the clone does not get of the disk reads zero, also when it is longer again.
    fn clone_image(&mut self, cluster: u64, steps: usize) {
        let mut disk = self.disk.clone();
        self.leave();
        let base = self.path.clone();
        let number = self.left_behind.len();
        self.path = self.scratch.path().join(format!("image-{number}"));
        create_image(&self.path, cluster, steps, Some(&base));
        disk.resize(steps * STEP, 0);
        self.disk = disk;
        self.snapshots.clear();
        self.image = Some(open(&self.path));
    }

    fn rebase(&mut self, onto_bystander: bool) {
        let path = self.bystander.clone();
        let base = onto_bystander.then_some(Base::Image {
            path,
            snapshot: None,
            reference: false,
        });
        self.image().rebase(base.as_ref(), "image").unwrap();
    }

    fn check_all(mut self) {
        let len = self.disk.len();
        self.read(0, len);
        self.image = None;
        let stored = check_structure(&self.path);
        let root = stored.root();
        assert_eq!(root.snapshots.len(), self.snapshots.len());
        for (number, expected) in &self.snapshots {
            let snapshot = root.snapshot(&number.to_string()).unwrap();
            assert_layer(&stored, snapshot.layer, expected);
        }
        assert_layer(&stored, root.active, &self.disk);
        for (path, expected) in &self.left_behind {
            let stored = check_structure(path);
            assert_layer(&stored, stored.root().active, expected);
        }
    }
}

fn create_image(path: &Path, cluster: u64, steps: usize, base: Option<&Path>) {
    let new = NewImage {
        size: Some(VirtualSize::new(offset(steps * STEP)).unwrap()),
        cluster: ClusterSize::new(cluster).unwrap(),
        allocation_unit: None,
        base: base.map(|path| Base::Image {
            path: path.to_owned(),
            snapshot: None,
            reference: false,
        }),
    };
    create(path, &new, &[]).unwrap();
}

fn open(path: &Path) -> Image {
    Image::open(path, &[]).unwrap()
}

fn check_structure(path: &Path) -> Stored {
    let stored = Stored::open(path, &[]).unwrap();
    let report = check(&stored).unwrap();
    assert_eq!(report.corruptions, Vec::<String>::new());
    stored
}

fn assert_layer(stored: &Stored, layer: uuid::Uuid, expected: &[u8]) {
    let mut found = vec![0xee; expected.len()];
    stored.chain(layer).unwrap().read(0, &mut found).unwrap();
    assert_same("a layer", &found, expected);
}

/// As `assert_eq`, without millions of numbers on the screen.
fn assert_same(what: &str, found: &[u8], expected: &[u8]) {
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what} differs at this byte");
    assert_eq!(found.len(), expected.len(), "{what} has another length");
}

fn offset(at: usize) -> u64 {
    u64::try_from(at).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn an_image_shows_what_an_array_of_bytes_would(
        cluster in select(&CLUSTER_SIZES),
        bystander_cluster in select(&CLUSTER_SIZES),
        actions in vec(action(), 1..30),
    ) {
        let mut world = World::new(cluster, bystander_cluster);
        for action in &actions {
            world.perform(action);
        }
        world.check_all();
    }
}

/// One call through the seam. Files are `a`, `b` and `c`.
#[derive(Debug, Clone)]
enum Call {
    Create(&'static str),
    Write(&'static str, u64, usize, u8),
    SetLen(&'static str, u64),
    Zero(&'static str, u64, u64),
    Punch(&'static str, u64, u64),
    Reserve(&'static str, u64, u64),
    Rename(&'static str, &'static str),
    Link(&'static str, &'static str),
    Unlink(&'static str),
    Sync,
}

fn call() -> impl Strategy<Value = Call> {
    let name = || select(&["a", "b", "c"]);
    let at = || 0..40_000u64;
    let len = || 1..12_000u64;
    prop_oneof![
        2 => name().prop_map(Call::Create),
        5 => (name(), at(), 1..9000usize, any::<u8>()).prop_map(|(n, at, len, b)| Call::Write(n, at, len, b)),
        1 => (name(), at()).prop_map(|(n, len)| Call::SetLen(n, len)),
        2 => (name(), at(), len()).prop_map(|(n, at, len)| Call::Zero(n, at, len)),
        2 => (name(), at(), len()).prop_map(|(n, at, len)| Call::Punch(n, at, len)),
        1 => (name(), at(), len()).prop_map(|(n, at, len)| Call::Reserve(n, at, len)),
        1 => (name(), name()).prop_map(|(from, to)| Call::Rename(from, to)),
        1 => (name(), name()).prop_map(|(from, to)| Call::Link(from, to)),
        1 => name().prop_map(Call::Unlink),
        1 => Just(Call::Sync),
    ]
}

/// Performs a call; returns the error number if it fails.
fn perform(dir: &dyn Directory, call: &Call) -> Option<i32> {
    let site = Site("test");
    let open = |name| dir.open(name, Access::Write);
    let within = |name, at: u64, len: u64| {
        let file = open(name)?;
        // Past the end of a file the calls may make it longer, which nobody relies on.
        let end = (at + len).min(file.status()?.len);
        Ok::<_, std::io::Error>((file, at.min(end)..end))
    };
    let done = match *call {
        Call::Create(name) => dir.create(site, name).map(drop),
        Call::Write(name, at, len, byte) => {
            open(name).and_then(|f| f.write_at(site, &vec![byte; len], at))
        }
        Call::SetLen(name, len) => open(name).and_then(|f| f.set_len(site, len)),
        Call::Zero(name, at, len) => within(name, at, len).and_then(|(f, range)| {
            if range.is_empty() {
                Ok(())
            } else {
                f.zero(site, range)
            }
        }),
        Call::Punch(name, at, len) => within(name, at, len).and_then(|(f, range)| {
            if range.is_empty() {
                Ok(())
            } else {
                f.punch(site, range)
            }
        }),
        Call::Reserve(name, at, len) => within(name, at, len).and_then(|(f, range)| {
            if range.is_empty() {
                Ok(())
            } else {
                f.reserve(site, range)
            }
        }),
        Call::Rename(from, to) => dir.rename(site, from, to),
        Call::Link(from, to) => dir.link(site, dir, from, to),
        Call::Unlink(name) => dir.unlink(site, name),
        Call::Sync => dir.sync(site),
    };
    done.err().and_then(|e| e.raw_os_error())
}

/// Names, lengths, numbers of names and contents.
fn look(dir: &dyn Directory) -> Vec<(String, u64, u64, Vec<u8>)> {
    let mut names = dir.names().unwrap();
    names.sort();
    let one = |name: String| {
        let file = dir.open(&name, Access::Read).unwrap();
        let status = file.status().unwrap();
        let mut contents = vec![0; usize::try_from(status.len).unwrap() + 10];
        let got = file.read_at(&mut contents, 0).unwrap();
        contents.truncate(got);
        assert_hints(file.as_ref(), &contents);
        (name, status.len, status.links, contents)
    };
    names.into_iter().map(one).collect()
}

/// What is outside of the ranges that may hold data reads zero.
fn assert_hints(file: &dyn pcow_format::medium::File, contents: &[u8]) {
    let mut at = 0;
    loop {
        let data = file.next_data(at).unwrap();
        let hole_end = data.as_ref().map_or(offset(contents.len()), |d| d.start);
        let hole = usize::try_from(at).unwrap()..usize::try_from(hole_end).unwrap();
        assert!(contents[hole].iter().all(|b| *b == 0));
        match data {
            Some(data) => at = data.end,
            None => return,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn while_nothing_crashes_the_simulation_is_a_filesystem(calls in vec(call(), 1..40)) {
        let scratch = tempfile::tempdir().unwrap();
        let real = RealDirectory::open(scratch.path()).unwrap();
        let sims = [Domain::PageCache, Domain::Dax].map(|d| Sim::new(d).top());
        for call in &calls {
            let expected = perform(real.as_ref(), call);
            for sim in &sims {
                prop_assert_eq!(perform(sim.as_ref(), call), expected, "{:?}", call);
            }
        }
        let expected = look(real.as_ref());
        for sim in sims {
            let sim: Arc<dyn Directory> = sim;
            prop_assert!(look(sim.as_ref()) == expected, "the directories differ");
        }
    }
}
