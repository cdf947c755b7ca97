// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Judges a filesystem after a crash: what must open, what must be there, what must not have changed.

use std::hash::{DefaultHasher, Hash, Hasher};

use pcow_format::medium::sim::{Moment, Sim};
use pcow_format::medium::{Access, Domain, Site};
use pcow_format::{Cluster, ErrorKind, FLUSH_FAILED_FILE, Image, Source, Stored, map, map_name};
use uuid::Uuid;

use crate::model::{CLUSTER_BYTES, Contents, Model, Place, Role, check_equal};
use crate::setting::{self, BYSTANDERS, Setting, text};
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
    /// A flush had failed, and somebody has removed the mark of it. Within the same boot nothing can be promised for
    /// what was not written since (M14).
    pub marked: bool,
    /// What opening did.
    pub recovery: Vec<Moment>,
    /// A digest of layers, cluster states and contents, with payloads normalised.
    pub digest: u64,
}

impl Survivor {
    /// What must be there from now on.
    pub fn expected(&self) -> Expected {
        Expected {
            image: self.name,
            possible: vec![self.model.clone()],
            other: self.other.clone(),
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
    let mut hasher = DefaultHasher::new();
    setting.scene.name.hash(&mut hasher);
    let mut other = None;
    sim.record();
    if let Some((name, model)) = &expected.other {
        let (_, model, _) = case.judge_image(name, std::slice::from_ref(model), &mut hasher)?;
        other = Some((*name, model));
    }
    let (image, model, marked) =
        case.judge_image(expected.image, &expected.possible, &mut hasher)?;
    let recovery = sim.moments();
    case.check_bystanders()?;
    case.check_names()?;
    Ok(Survivor {
        image,
        name: expected.image,
        model,
        other,
        marked,
        recovery,
        digest: hasher.finish(),
    })
}

impl Case<'_> {
    fn judge_image(
        &self,
        name: &str,
        possible: &[Model],
        hasher: &mut DefaultHasher,
    ) -> Result<(Image, Model, bool), String> {
        let plan = self.setting.plan();
        let (image, marked) = self.open(name)?;
        let stored = setting::stored(self.sim, name, self.boot)?;
        let found = setting::read_tracked(plan, |at, buf| image.read(at, buf))?;
        let data_clusters = check_structure(&stored)?;
        let model = self.find_model(&stored, possible, &found, marked)?;
        let words = self.words(&stored)?;
        let counted: u64 = words.iter().map(|w| u64::from(w.data_count())).sum();
        if counted != data_clusters {
            return Err(format!("{name}: clusters became data by themselves"));
        }
        self.digest(hasher, &stored, &words, &found, model);
        let mut model = match self.end {
            End::Killed => model.clone(),
            End::PowerCut => model.with_disk(found),
        };
        model.failed = false;
        Ok((image, model, marked))
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

    /// The first of `possible` that the image agrees with.
    fn find_model<'m>(
        &self,
        stored: &Stored,
        possible: &'m [Model],
        found: &Contents,
        marked: bool,
    ) -> Result<&'m Model, String> {
        let mut refusals = Vec::new();
        for model in possible {
            match self.agrees(stored, model, found, marked) {
                Ok(()) => return Ok(model),
                Err(refusal) => refusals.push(refusal),
            }
        }
        refusals.dedup();
        Err(refusals.join("; or "))
    }

    fn agrees(
        &self,
        stored: &Stored,
        model: &Model,
        found: &Contents,
        marked: bool,
    ) -> Result<(), String> {
        if model.failed && !marked {
            return Err("opens although a flush has failed".to_owned());
        }
        match self.end {
            End::Killed => check_equal("the disk", found, model.disk.now())?,
            End::PowerCut => model.disk.check_after_cut(found)?,
        }
        self.check_snapshots(stored, model)?;
        for (name, expected) in &model.clones {
            self.check_other(name, expected)?;
        }
        if let Some((name, expected)) = &model.receiving {
            self.check_partial(name, expected)?;
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

    fn check_snapshots(&self, stored: &Stored, model: &Model) -> Result<(), String> {
        let snapshots = &stored.root().snapshots;
        if snapshots.len() != model.snapshots.len() {
            let (found, expected) = (snapshots.len(), model.snapshots.len());
            return Err(format!("{found} snapshots, not {expected}"));
        }
        for (snapshot, (number, contents)) in snapshots.iter().zip(&model.snapshots) {
            if snapshot.number != *number {
                return Err(format!("snapshot {}, not {number}", snapshot.number));
            }
            let found = setting::layer_contents(self.setting.plan(), stored, snapshot.layer)?;
            check_equal(&format!("snapshot {number}"), &found, contents)?;
        }
        Ok(())
    }

    /// I6: what is called like an image is one, promised or not.
    fn check_names(&self) -> Result<(), String> {
        let names = self.sim.top().names().map_err(|e| e.to_string())?;
        for name in names
            .iter()
            .filter(|n| n.starts_with("clone") && !n.ends_with(".part"))
        {
            setting::stored(self.sim, name, self.boot)?;
        }
        Ok(())
    }

    fn check_bystanders(&self) -> Result<(), String> {
        for (name, contents) in BYSTANDERS.iter().zip(&self.setting.bystanders) {
            self.check_other(name, contents)?;
        }
        Ok(())
    }

    /// Compares an image that is not worked on.
    fn check_other(&self, name: &str, expected: &Contents) -> Result<(), String> {
        let fingerprint = self.sim.fingerprint_of(name);
        // The very same files show the very same bytes. A clone's are made once for one content.
        if fingerprint.is_some_and(|f| self.setting.is_sound(f)) {
            return Ok(());
        }
        let found = setting::contents(self.setting.plan(), self.sim, name, self.boot)?;
        check_equal(name, &found, expected)?;
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

    fn digest(
        &self,
        hasher: &mut DefaultHasher,
        stored: &Stored,
        words: &[map::Word],
        found: &Contents,
        model: &Model,
    ) {
        let root = stored.root();
        let place = |wanted: Option<Uuid>| {
            let of = |uuid| root.layers.iter().position(|l| l.uuid == uuid);
            wanted.map(of)
        };
        place(Some(root.active)).hash(hasher);
        for layer in &root.layers {
            (place(layer.parent), layer.sealed, layer.clip).hash(hasher);
        }
        for snapshot in &root.snapshots {
            (snapshot.number, place(Some(snapshot.layer))).hash(hasher);
        }
        words.iter().for_each(|word| word.0.hash(hasher));
        let first = &self.setting.first;
        model.disk.kinds(found, first).hash(hasher);
        for (_, contents) in &model.snapshots {
            model.disk.kinds(contents, first).hash(hasher);
        }
        model.clones.len().hash(hasher);
    }
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
            Use::All | Use::Tree => *role != Role::Late,
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
