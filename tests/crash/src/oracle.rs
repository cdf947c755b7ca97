// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Judges a filesystem after a crash: what must open, what must be there, what must not have changed.

use std::hash::{Hash, Hasher};

use pcow_format::medium::sim::{Moment, Sim};
use pcow_format::medium::{Access, Domain, Site};
use pcow_format::{
    Cluster, ErrorKind, FLUSH_FAILED_FILE, Image, Source, Stored, data_name, map, map_name,
};
use uuid::Uuid;

use crate::digest::Digest;
use crate::model::{CLUSTER_BYTES, Contents, Model, Place, Role, Snapshot, check_equal};
use crate::setting::{self, Bystander, Setting, text};
use crate::workload::{Expected, other_base, store_word, write_back};

/// How the process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It died: nothing at all is lost.
    Killed,
    /// The machine lost power.
    PowerCut,
}

/// An image that stood the test.
#[derive(Debug)]
pub struct Survivor {
    /// The image, open.
    pub image: Image,
    /// Its name.
    pub name: &'static str,
    /// What it must show from now on.
    pub model: Model,
    /// The other image, and what it must show from now on.
    pub other: Option<(&'static str, Model)>,
    /// What opening did, if that was to be recorded.
    pub recovery: Vec<Moment>,
    /// Whether everything that was found so far, other than the bytes of the disk, was found without any byte of the
    /// active layer's data file.
    pub untouched: bool,
    /// The models that agree with snapshots and clones: indices of those that were possible, and digests of what they show
    /// beside the disk.
    agreeing: Vec<(usize, u64)>,
    /// A digest of layers and cluster states: of all by which the images find the bytes that they show.
    pub shape: Digest,
    /// The same, and of what the other image shows.
    before_contents: Digest,
    /// The same, and of contents with payloads normalised.
    pub digest: u64,
}

impl Survivor {
    /// What must be there from now on.
    pub fn expected(&self) -> Expected {
        Expected {
            image: self.name,
            possible: vec![self.model.clone()],
            other: self.other.clone(),
            older: None,
        }
    }
}

/// A filesystem after a crash, and what it is compared with.
#[derive(Debug, Clone, Copy)]
struct Case<'a> {
    setting: &'a Setting,
    sim: &'a Sim,
    boot: u128,
    end: End,
}

/// An image that was opened, and what was found in it.
struct Opened<'m> {
    image: Image,
    found: Contents,
    /// Those of the possible models that agree with all but the disk, and the first that agrees with that, too.
    agreeing: Vec<usize>,
    model: &'m Model,
    untouched: bool,
}

impl Opened<'_> {
    /// What disk and snapshots show, whatever the values are.
    fn hash_contents(&self, setting: &Setting, digest: &mut Digest) {
        let disk = &self.model.disk;
        disk.hash_kinds(&self.found, &setting.first, digest);
        digest.write_u64(digest_beside(setting, self.model));
    }
}

/// Opens the images as after `end` in boot number `boot`, and compares them with what is expected.
pub fn judge(
    setting: &Setting,
    sim: &Sim,
    boot: u128,
    expected: &Expected,
    end: End,
) -> Result<Survivor, String> {
    let case = Case {
        setting,
        sim,
        boot,
        end,
    };
    let (mut shape, mut beside) = (Digest::default(), Digest::default());
    let mut other = None;
    if let Some((name, model)) = &expected.other {
        let opened = case.open_and_compare(name, std::slice::from_ref(model), &mut shape)?;
        opened.hash_contents(setting, &mut beside);
        other = Some((*name, case.model_after(&opened)));
    }
    let opened = case.open_and_compare(expected.image, &expected.possible, &mut shape)?;
    let mut before_contents = shape;
    before_contents.write_u64(beside.finish());
    let mut digest = before_contents;
    opened.hash_contents(setting, &mut digest);
    let with_digest = |i: &usize| (*i, digest_beside(setting, &expected.possible[*i]));
    let recovery = sim.moments();
    case.check_bystanders()?;
    case.check_names(&expected.possible)?;
    Ok(Survivor {
        name: expected.image,
        model: case.model_after(&opened),
        other,
        recovery,
        digest: digest.finish(),
        agreeing: opened.agreeing.iter().map(with_digest).collect(),
        untouched: opened.untouched,
        shape,
        before_contents,
        image: opened.image,
    })
}

/// Reads the image again after bytes of its active data file were decided anew, and compares it with what is expected
/// after a power cut. Everything that rests on no byte of that file is as [`judge`] found it. Returns the digest.
pub fn judge_contents(
    setting: &Setting,
    survivor: &Survivor,
    expected: &Expected,
    found: &mut Contents,
) -> Result<u64, String> {
    let plan = setting.plan();
    setting::read_again(plan, found, |at, buf| survivor.image.read(at, buf))?;
    let mut refusals = Vec::new();
    for (index, beside) in &survivor.agreeing {
        let disk = &expected.possible[*index].disk;
        match disk.check_after_cut(found) {
            Ok(()) => {
                let mut digest = survivor.before_contents;
                disk.hash_kinds(found, &setting.first, &mut digest);
                digest.write_u64(*beside);
                return Ok(digest.finish());
            }
            Err(refusal) => refusals.push(refusal),
        }
    }
    Err(refusals.join("; or "))
}

impl Case<'_> {
    fn open_and_compare<'m>(
        &self,
        name: &str,
        possible: &'m [Model],
        shape: &mut Digest,
    ) -> Result<Opened<'m>, String> {
        let plan = self.setting.plan();
        let (image, marked) = self.open(name)?;
        let stored = setting::stored(self.sim, name, self.boot)?;
        let data_clusters = check_structure(&stored)?;
        let agreeing = self.agreeing(&stored, possible, marked)?;
        let words = self.words(&stored)?;
        let counted: u64 = words.iter().map(|w| u64::from(w.data_count())).sum();
        if counted != data_clusters {
            return Err(format!("{name}: clusters became data by themselves"));
        }
        hash_shape(shape, &stored, &words);
        let untouched = !self.sim.was_touched(data_inode(&image)?);
        let found = setting::read_tracked(plan, |at, buf| image.read(at, buf))?;
        let model = self.find_model(possible, &agreeing, &found)?;
        Ok(Opened {
            image,
            found,
            agreeing,
            model,
            untouched,
        })
    }

    /// What must be there from now on.
    fn model_after(&self, opened: &Opened<'_>) -> Model {
        let found = opened.found.clone();
        match self.end {
            End::Killed if !opened.model.doubtful => opened.model.clone(),
            End::Killed => opened.model.with_found(found),
            End::PowerCut => opened.model.with_disk(found),
        }
    }

    /// Opens an image; after a failed flush only once somebody has removed the mark of it (I7). Returns whether there
    /// was one.
    fn open(&self, name: &str) -> Result<(Image, bool), String> {
        let dir = self.sim.top().open_dir(name);
        let dir = dir.map_err(|e| format!("{name}: {e}"))?;
        let marked = dir.open(FLUSH_FAILED_FILE, Access::Read).is_ok();
        if marked {
            match setting::try_open(self.sim, name, self.boot) {
                Err(e) if e.kind() == ErrorKind::FlushFailed => {}
                Err(e) => return Err(format!("{name}: {}", text(e))),
                Ok(_) => return Err(format!("{name}: opens although a flush has failed")),
            }
            let removed = dir.unlink(Site("user.unlink"), FLUSH_FAILED_FILE);
            removed.map_err(|e| format!("{name}: {e}"))?;
        }
        Ok((setting::open(self.sim, name, self.boot)?, marked))
    }

    /// Those of `possible` whose snapshots and clones are there.
    fn agreeing(
        &self,
        stored: &Stored,
        possible: &[Model],
        marked: bool,
    ) -> Result<Vec<usize>, String> {
        let (mut agreeing, mut refusals) = (Vec::new(), Vec::new());
        for (index, model) in possible.iter().enumerate() {
            match self.agrees(stored, model, marked) {
                Ok(()) => agreeing.push(index),
                Err(refusal) => refusals.push(refusal),
            }
        }
        if agreeing.is_empty() {
            refusals.dedup();
            return Err(refusals.join("; or "));
        }
        Ok(agreeing)
    }

    fn agrees(&self, stored: &Stored, model: &Model, marked: bool) -> Result<(), String> {
        if model.failed && !marked {
            return Err("opens although a flush has failed".to_owned());
        }
        if model.mended && marked {
            return Err("the mark of a failed flush is there again after a repair".to_owned());
        }
        self.check_snapshots(stored, model)?;
        for (name, expected) in &model.clones {
            self.check_other(name, expected)?;
        }
        if let Some(receiving) = &model.receiving {
            self.check_partial(&receiving.name, &receiving.contents)?;
        }
        Ok(())
    }

    /// What a partial image says that it has received, it shows.
    fn check_partial(&self, name: &str, expected: &Contents) -> Result<(), String> {
        let Some(position) = setting::received(self.sim, name, self.boot)? else {
            return Ok(());
        };
        let plan = self.setting.plan();
        let part = format!("{name}.receive.part");
        let mut found = setting::contents(plan, self.sim, &part, self.boot)?;
        let missing = plan
            .clusters
            .iter()
            .enumerate()
            .filter(|(_, (cluster, _))| cluster * CLUSTER_BYTES + CLUSTER_BYTES > position);
        for (index, _) in missing {
            found.0[index] = expected.0[index].clone();
        }
        check_equal("what was received", &found, expected)
    }

    /// The first of the `agreeing` ones of `possible` whose disk may show `found`.
    fn find_model<'m>(
        &self,
        possible: &'m [Model],
        agreeing: &[usize],
        found: &Contents,
    ) -> Result<&'m Model, String> {
        let mut refusals = Vec::new();
        for model in agreeing.iter().map(|i| &possible[*i]) {
            let checked = match self.end {
                End::Killed if !model.doubtful => check_equal("the disk", found, model.disk.now()),
                _ => model.disk.check_after_cut(found),
            };
            match checked {
                Ok(()) => return Ok(model),
                Err(refusal) => refusals.push(refusal),
            }
        }
        refusals.dedup();
        Err(refusals.join("; or "))
    }

    fn check_snapshots(&self, stored: &Stored, model: &Model) -> Result<(), String> {
        let snapshots = &stored.root().snapshots;
        if snapshots.len() != model.snapshots.len() {
            let (found, expected) = (snapshots.len(), model.snapshots.len());
            return Err(format!("{found} snapshots, not {expected}"));
        }
        for (snapshot, expected) in snapshots.iter().zip(&model.snapshots) {
            let number = snapshot.number;
            if number != expected.number {
                return Err(format!("snapshot {number}, not {}", expected.number));
            }
            if expected.name.as_ref().is_some_and(|n| *n != snapshot.name) {
                return Err(format!("snapshot {number} is called {}", snapshot.name));
            }
            let fingerprint = self.snapshot_fingerprint(stored, snapshot.layer, expected)?;
            if fingerprint.is_some_and(|f| self.setting.is_sound(f)) {
                continue;
            }
            let found = setting::layer_contents(self.setting.plan(), stored, snapshot.layer)?;
            check_equal(&format!("snapshot {number}"), &found, &expected.contents)?;
            fingerprint
                .into_iter()
                .for_each(|f| self.setting.note_sound(f));
        }
        Ok(())
    }

    /// A digest of all that decides what the snapshot shows, and of what it must: the same files under the same rows of the
    /// layer table show the same bytes. `None` for what changes while the image is used.
    fn snapshot_fingerprint(
        &self,
        stored: &Stored,
        layer: Uuid,
        expected: &Snapshot,
    ) -> Result<Option<u64>, String> {
        let mut digest = Digest::default();
        (stored.root().uuid, expected.digest).hash(&mut digest);
        for row in stored.root().chain(layer).map_err(text)? {
            if !row.sealed {
                return Ok(None);
            }
            (row.uuid, row.clip, row.virtual_size, row.cluster_size).hash(&mut digest);
            for name in [map_name(row.uuid), data_name(row.uuid)] {
                match self.sim.fingerprint_at(stored.directory(), &name) {
                    Some(file) => file.hash(&mut digest),
                    None => return Ok(None),
                }
            }
        }
        Ok(Some(digest.finish()))
    }

    /// I6: what is called like an image is one, promised or not, and complete.
    fn check_names(&self, possible: &[Model]) -> Result<(), String> {
        let names = self.sim.top().names().map_err(|e| e.to_string())?;
        for name in names
            .iter()
            .filter(|n| n.starts_with("clone") && !n.ends_with(".part"))
        {
            let mut clones = possible.iter().flat_map(|m| &m.clones);
            match clones.find(|(n, _)| n == name) {
                Some((_, contents)) => self.check_other(name, contents)?,
                None => {
                    check_structure(&setting::stored(self.sim, name, self.boot)?)?;
                }
            }
        }
        Ok(())
    }

    fn check_bystanders(&self) -> Result<(), String> {
        for bystander in &self.setting.bystanders {
            let check = |stored: &Stored| self.check_snapshots_of(bystander, stored);
            self.check_beside(bystander.name, &bystander.contents, check)?;
        }
        Ok(())
    }

    fn check_snapshots_of(&self, bystander: &Bystander, stored: &Stored) -> Result<(), String> {
        let (name, snapshots) = (bystander.name, &stored.root().snapshots);
        for number in &bystander.snapshots {
            if !snapshots.iter().any(|s| s.number == *number) {
                return Err(format!("{name}: snapshot {number} is gone"));
            }
        }
        for snapshot in snapshots {
            let found = setting::layer_contents(self.setting.plan(), stored, snapshot.layer)?;
            let what = format!("{name}, snapshot {}", snapshot.number);
            check_equal(&what, &found, &bystander.contents)?;
        }
        Ok(())
    }

    /// Checks an image that was made from the one that is worked on.
    fn check_other(&self, name: &str, expected: &Contents) -> Result<(), String> {
        self.check_beside(name, expected, |_| Ok(()))
    }

    /// Checks an image that is not worked on; `more` sees it, too.
    fn check_beside(
        &self,
        name: &str,
        expected: &Contents,
        more: impl FnOnce(&Stored) -> Result<(), String>,
    ) -> Result<(), String> {
        let fingerprint = self.sim.fingerprint_of(name);
        // The very same files show the very same bytes and pass the same checks. A clone's are made once for one content.
        if fingerprint.is_some_and(|f| self.setting.is_sound(f)) {
            return Ok(());
        }
        let stored = setting::stored(self.sim, name, self.boot)?;
        check_structure(&stored).map_err(|e| format!("{name}: {e}"))?;
        let top = stored.root().active;
        let found = setting::layer_contents(self.setting.plan(), &stored, top)?;
        check_equal(name, &found, expected)?;
        more(&stored)?;
        fingerprint
            .into_iter()
            .for_each(|f| self.setting.note_sound(f));
        Ok(())
    }

    /// The words that may hold something, of every layer of the image.
    fn words(&self, stored: &Stored) -> Result<Vec<map::Word>, String> {
        let mut words = Vec::new();
        for layer in &stored.root().layers {
            let opened = stored.directory().open(&map_name(layer.uuid), Access::Read);
            let map = opened.map_err(|e| format!("a layer's map: {e}"))?;
            for number in &self.setting.words {
                let mut raw = [0; 8];
                let read = map.read_at(&mut raw, map::word_offset(*number));
                read.map_err(|e| format!("a layer's map: {e}"))?;
                words.push(map::Word(u64::from_le_bytes(raw)));
            }
        }
        Ok(words)
    }
}

/// Whether a flush of the image has failed.
pub fn is_marked(sim: &Sim, image: &str) -> bool {
    let dir = sim.top().open_dir(image);
    dir.is_ok_and(|dir| dir.open(FLUSH_FAILED_FILE, Access::Read).is_ok())
}

/// The number of the active layer's data file.
pub fn data_inode(image: &Image) -> Result<u64, String> {
    let status = image.active().data_file().status();
    status
        .map(|s| s.identity.inode)
        .map_err(|e| format!("the active data file: {e}"))
}

/// Layers, snapshots and words: whatever names they have.
fn hash_shape(digest: &mut Digest, stored: &Stored, words: &[map::Word]) {
    let root = stored.root();
    let place = |wanted: Option<Uuid>| {
        let of = |uuid| root.layers.iter().position(|l| l.uuid == uuid);
        wanted.map(of)
    };
    place(Some(root.active)).hash(digest);
    for layer in &root.layers {
        (place(layer.parent), layer.sealed, layer.clip).hash(digest);
    }
    for snapshot in &root.snapshots {
        (snapshot.number, place(Some(snapshot.layer))).hash(digest);
    }
    words.iter().for_each(|word| word.0.hash(digest));
}

/// What snapshots show, whatever the values are, and how many clones there are.
fn digest_beside(setting: &Setting, model: &Model) -> u64 {
    let mut digest = Digest::default();
    for snapshot in &model.snapshots {
        let contents = &snapshot.contents;
        model.disk.hash_kinds(contents, &setting.first, &mut digest);
    }
    model.clones.len().hash(&mut digest);
    digest.finish()
}

/// Checks the image; returns how many clusters are data.
fn check_structure(stored: &Stored) -> Result<u64, String> {
    let report = pcow_format::check::check(stored).map_err(text)?;
    if !report.corruptions.is_empty() || !report.unchecked.is_empty() {
        let all = [report.corruptions, report.unchecked].concat();
        return Err(format!("check: {}", all.join("; ")));
    }
    Ok(report.data_clusters)
}

/// What a survivor is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Stores to clusters that are data already: nothing but the store itself happens.
    Data,
    /// Stores to clusters that no layer has, too: nothing is synced on the way.
    Nobodys,
    /// Stores to all tracked clusters.
    All,
    /// Operations on the layer tree, one of which may be the one that was cut off.
    Tree,
    /// A clone of its newest snapshot, before anybody opens it.
    Clone,
    /// A stream whose reception was cut off is received, before anybody opens it.
    Again,
}

/// Uses a survivor, and flushes what was stored in the way of the domain.
pub fn use_and_flush(setting: &Setting, survivor: &mut Survivor, which: Use) -> Result<(), String> {
    if which == Use::Tree {
        return use_tree(setting, survivor);
    }
    let places = store_to_all(setting, survivor, which)?;
    let disk = &mut survivor.model.disk;
    match setting.domain() {
        Domain::PageCache => {
            survivor.image.flush().map_err(text)?;
            disk.promise_all();
        }
        Domain::Dax => {
            write_back(setting.plan(), &survivor.image, &places)?;
            places.iter().for_each(|p| disk.promise(*p));
        }
    }
    Ok(())
}

/// Stores must change these words and nothing else. Returns where it stored.
fn store_to_all(
    setting: &Setting,
    survivor: &mut Survivor,
    which: Use,
) -> Result<Vec<Place>, String> {
    let mut places = Vec::new();
    let (plan, domain) = (setting.plan(), setting.domain());
    for (index, (cluster, role)) in plan.clusters.iter().enumerate() {
        let cluster = Cluster(*cluster);
        let image = &survivor.image;
        let source = image.source(cluster).map_err(text)?;
        let used = match which {
            Use::Data => source == Source::Active,
            Use::Nobodys => matches!(source, Source::Active | Source::Nobody),
            _ => *role != Role::Late,
        };
        if !used {
            continue;
        }
        let made = image.make_writable(cluster.only(), &mut Vec::new());
        made.map_err(text)?;
        let place = (index, 8);
        store_word(plan, image, domain, place, 0x700d)?;
        survivor.model.disk.store(place, 0x700d);
        places.push(place);
    }
    check_running(setting, survivor, "after new stores")?;
    Ok(places)
}

fn use_tree(setting: &Setting, survivor: &mut Survivor) -> Result<(), String> {
    if !setting.scene.is_wide() {
        let rebased = survivor.image.rebase(Some(&other_base()), survivor.name);
        rebased.map_err(|e| format!("rebase: {}", text(e)))?;
        check_running(setting, survivor, "after a rebase")?;
    }
    let snapshot = survivor.image.snapshot(None);
    snapshot.map_err(|e| format!("snapshot: {}", text(e)))?;
    check_running(setting, survivor, "after a snapshot")?;
    survivor.model = survivor.model.with_snapshot();
    Ok(())
}

fn check_running(setting: &Setting, survivor: &Survivor, when: &str) -> Result<(), String> {
    let found = setting::read_tracked(setting.plan(), |at, buf| survivor.image.read(at, buf))?;
    check_equal(when, &found, survivor.model.disk.now())
}
