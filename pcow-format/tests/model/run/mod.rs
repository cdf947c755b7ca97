// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image under a sequence of operations, beside plain bytes that tell what it and its snapshots must show. Where the
//! operations come from is a matter of [`Random`]: chance, or the bytes of a fuzzer, which includes this file.

mod disk;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pcow_format::check::check;
use pcow_format::medium::real::RealFile;
use pcow_format::ops::{Base, NewImage, create, create_filled, receive, unfinished};
use pcow_format::root::Root;
use pcow_format::stream::Sending;
use pcow_format::{ClusterRange, ClusterSize, ErrorKind, Image, Stored, View, VirtualSize};

use disk::Disk;

const MIB: u64 = 1 << 20;
/// Snapshots above this number are deleted again.
const MAX_SNAPSHOTS: usize = 6;
/// Choices of [`Run::step`].
pub const OPERATIONS: u64 = 44;

/// What is chosen next.
enum Random {
    /// By chance: xorshift64*.
    Seeded(u64),
    /// By these bytes, in reverse order; zeros when they are used up.
    Given(Vec<u8>),
}

impl Random {
    fn next(&mut self) -> u64 {
        match self {
            Random::Seeded(state) => {
                *state ^= *state >> 12;
                *state ^= *state << 25;
                *state ^= *state >> 27;
                state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
            }
            Random::Given(bytes) => {
                let mut raw = [0; 8];
                raw[..3].fill_with(|| bytes.pop().unwrap_or(0));
                u64::from_le_bytes(raw)
            }
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn any(&mut self, numbers: &[u64]) -> Option<u64> {
        let count = u64::try_from(numbers.len()).unwrap();
        let index = usize::try_from(self.below(count.max(1))).unwrap();
        numbers.get(index).copied()
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    fn is_used_up(&self) -> bool {
        matches!(self, Random::Given(bytes) if bytes.is_empty())
    }
}

/// An image, and what it must show.
pub struct Run {
    dir: tempfile::TempDir,
    random: Random,
    image: Option<Image>,
    path: PathBuf,
    disk: Disk,
    snapshots: BTreeMap<u64, Disk>,
    /// Images and raw files that can be bases, and what they show.
    bases: Vec<(Base, Disk)>,
    log: Vec<String>,
    /// Images that were gone on with.
    clones: u64,
    /// Where snapshots are sent to.
    replica: Option<Replica>,
}

/// An image that was received, on which nothing was written since.
struct Replica {
    path: PathBuf,
    disk: Disk,
    snapshots: BTreeMap<u64, Disk>,
}

fn new_image(size: Option<u64>, cluster: u64, base: Option<Base>) -> NewImage {
    NewImage {
        size: size.map(|s| VirtualSize::new(s).unwrap()),
        cluster: ClusterSize::new(cluster).unwrap(),
        allocation_unit: None,
        base,
    }
}

fn size(random: &mut Random) -> u64 {
    (1 + random.below(3)) * 2 * MIB
}

fn cluster(random: &mut Random) -> u64 {
    [4096, 16_384, 65_536, 1 << 20][usize::try_from(random.below(4)).unwrap()]
}

impl Run {
    /// Operations by chance.
    pub fn by_chance(seed: u64) -> Self {
        let random = Random::Seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Self::new(random, format!("seed {seed}"))
    }

    /// Does what `program` says, and looks at everything after each operation.
    ///
    /// # Panics
    /// If the image shows something else than it must, or is not sound.
    pub fn follow(program: &[u8]) {
        let bytes = program.iter().rev().copied().collect();
        let mut run = Self::new(Random::Given(bytes), "a program".to_owned());
        while !run.random.is_used_up() {
            run.step();
            if let Err(what) = run.verify() {
                panic!("{what}");
            }
        }
    }

    fn new(random: Random, origin: String) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let mut run = Self {
            dir: dir.unwrap(),
            random,
            image: None,
            path: PathBuf::new(),
            disk: Disk::empty(0),
            snapshots: BTreeMap::new(),
            bases: Vec::new(),
            log: vec![origin],
            clones: 0,
            replica: None,
        };
        run.make_bases();
        let (base, disk) = run.bases[0].clone();
        let wanted = size(&mut run.random);
        run.path = run.dir.path().join("vm");
        let cluster = cluster(&mut run.random);
        run.note(format!("an image of {wanted} bytes, clusters of {cluster}"));
        create(
            &run.path,
            &new_image(Some(wanted), cluster, Some(base)),
            &[],
        )
        .unwrap();
        run.disk = disk;
        run.disk.resize(wanted);
        run
    }

    fn note(&mut self, what: String) {
        self.log.push(what);
    }

    /// A raw file of an odd length, and an image with a cluster size of its own.
    fn make_bases(&mut self) {
        let mut disk = Disk::empty(4 * MIB);
        let path = self.dir.path().join("raw");
        let file = File::create(&path).unwrap();
        file.set_len(3 * MIB + 700).unwrap();
        for n in 0..6 {
            let (at, bytes) = (n * 600_000, vec![0x40; 9000]);
            let bytes = &bytes[..9000.min(usize::try_from(3 * MIB + 700 - at).unwrap())];
            file.write_all_at(bytes, at).unwrap();
            disk.write(at, bytes);
        }
        self.bases.push((Base::Raw { path }, disk));
        let path = self.dir.path().join("golden");
        create(&path, &new_image(Some(6 * MIB), 16_384, None), &[]).unwrap();
        let mut image = Image::open(&path, &[]).unwrap();
        let mut disk = Disk::empty(6 * MIB);
        for n in 0..9 {
            image.write(n * 700_000, &[0x50; 5000]).unwrap();
            disk.write(n * 700_000, &[0x50; 5000]);
        }
        image.snapshot(Some("s")).unwrap();
        let base = Base::Image {
            path,
            snapshot: Some("s".into()),
            reference: false,
        };
        self.bases.push((base, disk));
    }

    /// The image, opened if it is not.
    fn image(&mut self) -> &mut Image {
        let path = &self.path;
        self.image
            .get_or_insert_with(|| Image::open(path, &[]).unwrap())
    }

    fn range(&mut self) -> (u64, u64) {
        let start = self.random.below(self.disk.size);
        let longest = [10, 5000, 300_000][usize::try_from(self.random.below(3)).unwrap()];
        let length = 1 + self.random.below(longest);
        (start, (start + length).min(self.disk.size))
    }

    /// Performs an operation.
    pub fn step(&mut self) {
        match self.random.below(OPERATIONS) {
            0..=7 => self.write(),
            8..=11 => self.write_zeros(),
            12..=17 => self.store(),
            18..=19 => self.image().flush().unwrap(),
            20..=21 => self.image = None,
            22..=25 => self.snapshot(),
            26..=28 => self.delete(),
            29..=30 => self.rollback(),
            31..=33 => self.resize(),
            34 => self.compact(),
            35 => self.give_back_clean(),
            36..=37 => self.rebase(),
            38 => self.clone_image(),
            39 => self.convert(),
            40 => self.rename(),
            _ => self.replicate(),
        }
    }

    fn write(&mut self) {
        let (start, end) = self.range();
        let byte = self.random.next().to_le_bytes()[0] & 3;
        self.note(format!("write {byte} to {start}..{end}"));
        let bytes = vec![byte; usize::try_from(end - start).unwrap()];
        self.image().write(start, &bytes).unwrap();
        self.disk.write(start, &bytes);
    }

    fn write_zeros(&mut self) {
        let (start, end) = self.range();
        self.note(format!("write zeros to {start}..{end}"));
        self.image().write_zeros(start..end).unwrap();
        self.disk.zero(start, end);
    }

    /// As a guest does.
    fn store(&mut self) {
        let (start, end) = self.range();
        self.note(format!("store to {start}..{end}"));
        let image = self.image();
        let run = image.cluster_size().covering(&(start..end));
        image.make_writable(run, &mut Vec::new()).unwrap();
        let bytes = vec![0xa5; usize::try_from(end - start).unwrap()];
        let file = image.active().data_file().as_real().unwrap();
        file.write_all_at(&bytes, start).unwrap();
        self.disk.write(start, &bytes);
    }

    fn snapshot(&mut self) {
        let number = self.image().snapshot(None).unwrap();
        self.note(format!("snapshot {number}"));
        self.snapshots.insert(number, self.disk.clone());
        if self.snapshots.len() > MAX_SNAPSHOTS {
            self.delete();
        }
    }

    fn any_snapshot(&mut self) -> Option<u64> {
        let numbers: Vec<_> = self.snapshots.keys().copied().collect();
        self.random.any(&numbers)
    }

    fn delete(&mut self) {
        let Some(number) = self.any_snapshot() else {
            return;
        };
        self.note(format!("delete snapshot {number}"));
        self.image().delete_snapshot(&number.to_string()).unwrap();
        self.snapshots.remove(&number);
    }

    fn rollback(&mut self) {
        let Some(number) = self.any_snapshot() else {
            return;
        };
        let discard = self.random.chance(2);
        self.note(format!("rollback to {number}, discard: {discard}"));
        let rolled = self.image().rollback(&number.to_string(), discard).unwrap();
        if let Some((saved, _)) = rolled.saved_as {
            self.snapshots.insert(saved, self.disk.clone());
        }
        self.disk = self.snapshots[&number].clone();
    }

    fn resize(&mut self) {
        let size = size(&mut self.random);
        self.note(format!("resize to {size}"));
        let new = VirtualSize::new(size).unwrap();
        self.image().resize(new).unwrap();
        self.disk.resize(size);
    }

    fn compact(&mut self) {
        self.note("compact".to_owned());
        self.image().compact(&mut |_| ()).unwrap();
    }

    fn give_back_clean(&mut self) {
        self.note("give back clean clusters".to_owned());
        let image = self.image();
        let all = image
            .cluster_size()
            .clusters_in(image.virtual_size().bytes());
        image.give_back_clean(ClusterRange::new(0, all)).unwrap();
    }

    fn rebase(&mut self) {
        let choice = usize::try_from(self.random.below(3)).unwrap();
        self.note(format!("rebase on base {choice}"));
        let base = self.bases.get(choice).map(|(base, _)| base.clone());
        self.image().rebase(base.as_ref(), "vm").unwrap();
    }

    /// Goes on with a clone of a snapshot, or of what the disk shows.
    fn clone_image(&mut self) {
        let number = self.any_snapshot().filter(|_| self.random.chance(2));
        self.image = None;
        self.clones += 1;
        let path = self.dir.path().join(format!("clone-{}", self.clones));
        self.note(format!("go on with a clone of {number:?}"));
        let base = Base::Image {
            path: self.path.clone(),
            snapshot: number.map(|n| n.to_string()),
            reference: false,
        };
        let cluster = cluster(&mut self.random);
        create(&path, &new_image(None, cluster, Some(base)), &[]).unwrap();
        self.leave_for(path);
        if let Some(number) = number {
            self.disk = self.snapshots[&number].clone();
        }
        self.snapshots.clear();
    }

    /// Goes on with a copy that came by way of a raw file.
    fn convert(&mut self) {
        self.image = None;
        self.clones += 1;
        self.note("go on with a copy by way of a raw file".to_owned());
        let raw = self.dir.path().join("converted");
        let file = File::create(&raw).unwrap();
        file.set_len(self.disk.size).unwrap();
        let view = now(&self.path);
        let mut walk = view.walk();
        let mut at = 0;
        while at < view.size() {
            let piece = walk.piece(at).unwrap();
            if piece.depth.is_some() {
                let mut buf = vec![0; usize::try_from(piece.bytes.end - at).unwrap()];
                view.read(at, &mut buf).unwrap();
                file.write_all_at(&buf, at).unwrap();
            }
            at = piece.bytes.end;
        }
        let source = RealFile::open_raw(&raw).unwrap();
        let path = self.dir.path().join(format!("copy-{}", self.clones));
        let new = new_image(Some(self.disk.size), cluster(&mut self.random), None);
        create_filled(&path, &new, &[], &mut |image| {
            let mut at = 0;
            while let Some(data) = source.next_data(at).unwrap() {
                image.import(source.as_ref(), data.clone())?;
                at = data.end;
            }
            Ok(())
        })
        .unwrap();
        self.leave_for(path);
        self.snapshots.clear();
    }

    fn rename(&mut self) {
        let Some(number) = self.any_snapshot() else {
            return;
        };
        let name = format!("n{number}-{}", self.random.below(1000));
        self.note(format!("call snapshot {number} {name}"));
        let image = self.image();
        let root = image.write_renamed(&number.to_string(), &name).unwrap();
        image.adopt_root(root);
    }

    /// Sends up to three snapshots to the replica, which may take the image's place then.
    fn replicate(&mut self) {
        let stored = Stored::open(&self.path, &[]).unwrap();
        for _ in 0..1 + self.random.below(3) {
            self.send_to_replica(&stored);
        }
        if self.random.chance(3)
            && let Some(replica) = self.replica.take()
        {
            self.note("go on with the replica".to_owned());
            self.image = None;
            self.leave_for(replica.path);
            self.snapshots = replica.snapshots;
            self.disk = replica.disk;
        }
    }

    /// Sends any snapshot that continues what the replica has, or else any one to a new replica.
    fn send_to_replica(&mut self, stored: &Stored) {
        let newest = self.newest_on_replica(stored);
        let first = newest.map_or(0, |newest| newest + 1);
        let numbers: Vec<_> = self.snapshots.range(first..).map(|s| *s.0).collect();
        let Some(number) = self.random.any(&numbers) else {
            return;
        };
        self.note(format!("send {number}, which continues {newest:?}"));
        if newest.is_none() {
            self.new_replica();
        }
        let disk = self.snapshots[&number].clone();
        let path = self.replica.as_ref().unwrap().path.clone();
        let from = newest.map(|n| n.to_string());
        let sending = Sending::of(stored, &number.to_string(), from.as_deref()).unwrap();
        let received = self.send(stored, &sending, &path);
        let replica = self.replica.as_mut().unwrap();
        replica.snapshots.insert(received, disk.clone());
        replica.disk = disk;
        let stored = Stored::open(&path, &[]).unwrap();
        all_is_so(&stored, &replica.disk, &replica.snapshots, same_pieces).unwrap();
    }

    fn new_replica(&mut self) {
        self.clones += 1;
        let new = Replica {
            path: self.dir.path().join(format!("replica-{}", self.clones)),
            disk: Disk::empty(0),
            snapshots: BTreeMap::new(),
        };
        if let Some(old) = self.replica.replace(new) {
            std::fs::remove_dir_all(old.path).unwrap();
        }
    }

    /// The number here of the newest snapshot that the replica has, if it is here.
    fn newest_on_replica(&self, stored: &Stored) -> Option<u64> {
        let uuid = self.replica_root()?.snapshots.last()?.uuid;
        let here = stored.root().snapshots.iter().find(|s| s.uuid == uuid)?;
        Some(here.number)
    }

    fn replica_has(&self, name: &str) -> bool {
        let root = self.replica_root();
        root.is_some_and(|root| root.snapshots.iter().any(|s| s.name == name))
    }

    /// `None` if there is none, or nothing was received yet.
    fn replica_root(&self) -> Option<Root> {
        let replica = Stored::open(&self.replica.as_ref()?.path, &[]);
        Some(replica.ok()?.root().clone())
    }

    /// Sends to `path`; the stream may be cut off and go on. The number of the snapshot there is returned.
    fn send(&mut self, stored: &Stored, sending: &Sending, path: &Path) -> u64 {
        // A name that the snapshot got here later may be another one's there.
        let header = sending.header();
        let number = header.snapshot.number;
        let other = self.replica_has(&header.snapshot.name);
        let name = other.then(|| format!("sent-{number}"));
        let into =
            |stream: &[u8]| receive(path, &mut &*stream, name.as_deref(), &[], &mut |_, _| ());
        let mut stream = Vec::new();
        sending.write(&mut stream, &mut |_| ()).unwrap();
        if self.random.chance(2) {
            let length = u64::try_from(stream.len()).unwrap();
            let cut = self.random.below(length);
            self.note(format!("cut off at {cut} of {length}"));
            let refused = into(&stream[..usize::try_from(cut).unwrap()]).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::StreamCut);
            if let Some(part) = unfinished(path, &[]).unwrap() {
                stream.clear();
                let rest = Sending::rest(stored, &part.token()).unwrap();
                rest.write(&mut stream, &mut |_| ()).unwrap();
            }
        }
        into(&stream).unwrap().snapshot.number
    }

    fn leave_for(&mut self, path: PathBuf) {
        std::fs::remove_dir_all(&self.path).unwrap();
        self.path = path;
    }

    /// The image is sound, and it and all snapshots show what they must.
    pub fn verify(&mut self) -> Result<(), String> {
        let stored = Stored::open(&self.path, &[]).unwrap();
        // Reading all of it takes most of a short program's time: once, at its end.
        let by_chance = matches!(self.random, Random::Seeded(_));
        let whole = by_chance || self.random.is_used_up();
        let compare = if whole { same } else { same_pieces };
        all_is_so(&stored, &self.disk, &self.snapshots, compare)
    }
}

/// A failure of any kind tells what led to it.
impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after\n  {}", self.log.join("\n  "));
        }
    }
}

/// An image is sound, its disk is `disk` in the eyes of `compare`, and its snapshots are `snapshots`.
fn all_is_so(
    stored: &Stored,
    disk: &Disk,
    snapshots: &BTreeMap<u64, Disk>,
    compare: impl Fn(&View, &Disk) -> Result<(), String>,
) -> Result<(), String> {
    let report = check(stored).unwrap();
    if !report.corruptions.is_empty() || !report.unchecked.is_empty() {
        return Err(format!("check: {report:?}"));
    }
    let view = stored.view(stored.root().active).unwrap();
    compare(&view, disk).map_err(|e| format!("the disk: {e}"))?;
    let found: Vec<_> = stored.root().snapshots.iter().map(|s| s.number).collect();
    let expected: Vec<_> = snapshots.keys().copied().collect();
    if found != expected {
        return Err(format!("snapshots {found:?}, not {expected:?}"));
    }
    for snapshot in &stored.root().snapshots {
        let view = stored.view(snapshot.layer).unwrap();
        let number = snapshot.number;
        let same = same_pieces(&view, &snapshots[&number]);
        same.map_err(|e| format!("snapshot {number}: {e}"))?;
    }
    Ok(())
}

fn now(path: &Path) -> View {
    let stored = Stored::open(path, &[]).unwrap();
    stored.view(stored.root().active).unwrap()
}

/// All of it, read at once.
fn same(view: &View, disk: &Disk) -> Result<(), String> {
    same_size(view, disk)?;
    let mut bytes = vec![0xee; usize::try_from(disk.size).unwrap()];
    view.read(0, &mut bytes).unwrap();
    disk.shows(0, &bytes)
}

/// Piece by piece, as those who copy a disk read it: holes cost nothing.
fn same_pieces(view: &View, disk: &Disk) -> Result<(), String> {
    same_size(view, disk)?;
    let mut walk = view.walk();
    let mut at = 0;
    while at < disk.size {
        let piece = walk.piece(at).unwrap();
        let end = piece.bytes.end.min(disk.size);
        if piece.depth.is_some() {
            let mut bytes = vec![0xee; usize::try_from(end - at).unwrap()];
            view.read(at, &mut bytes).unwrap();
            disk.shows(at, &bytes)?;
        } else {
            disk.shows_zeros(at..end)?;
        }
        at = end;
    }
    Ok(())
}

fn same_size(view: &View, disk: &Disk) -> Result<(), String> {
    if view.size() == disk.size {
        return Ok(());
    }
    Err(format!("{} bytes, not {}", view.size(), disk.size))
}
