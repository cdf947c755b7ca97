// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Judges a filesystem after a crash: what must open, what must be there, what must not have changed.

use std::hash::{DefaultHasher, Hash, Hasher};

use pcow_format::medium::Domain;
use pcow_format::medium::sim::{Moment, Sim};
use pcow_format::{Cluster, ClusterRange, Image, Source};

use crate::model::{Contents, Model, Place, TRACKED, check_equal};
use crate::setting::{self, BYSTANDERS, IMAGE, Setting, text};
use crate::workload::{other_base, store_word, write_back};

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
    pub image: Image,
    /// What it must show from now on.
    pub model: Model,
    /// What opening it did.
    pub recovery: Vec<Moment>,
    /// A digest of layers, cluster states and contents.
    pub digest: u64,
}

/// Opens the image as after `end` in boot number `boot`, and compares it with `possible`.
pub fn judge(
    setting: &Setting,
    sim: &Sim,
    boot: u128,
    possible: &[Model],
    end: End,
) -> Result<Survivor, String> {
    sim.record();
    let image = setting::open(sim, IMAGE, boot)?;
    let recovery = sim.moments();
    let found = setting::read_tracked(|at, buf| image.read(at, buf))?;
    check_structure(sim, boot)?;
    let model = find_model(sim, boot, possible, &found, end)?;
    check_bystanders(setting, sim, boot)?;
    let digest = digest(setting, &image, &found, model)?;
    let model = match end {
        End::Killed => model.clone(),
        End::PowerCut => model.with_disk(found),
    };
    Ok(Survivor {
        model,
        image,
        recovery,
        digest,
    })
}

fn check_structure(sim: &Sim, boot: u128) -> Result<(), String> {
    let report = pcow_format::check::check(&setting::stored(sim, IMAGE, boot)?).map_err(text)?;
    if !report.corruptions.is_empty() {
        return Err(format!("check: {}", report.corruptions.join("; ")));
    }
    Ok(())
}

/// The first of `possible` that the image agrees with.
fn find_model<'a>(
    sim: &Sim,
    boot: u128,
    possible: &'a [Model],
    found: &Contents,
    end: End,
) -> Result<&'a Model, String> {
    let mut refusals = Vec::new();
    for model in possible {
        match agrees(sim, boot, model, found, end) {
            Ok(()) => return Ok(model),
            Err(refusal) => refusals.push(refusal),
        }
    }
    refusals.dedup();
    Err(refusals.join("; or "))
}

fn agrees(sim: &Sim, boot: u128, model: &Model, found: &Contents, end: End) -> Result<(), String> {
    match end {
        End::Killed => check_equal("the disk", found, model.disk.now())?,
        End::PowerCut => model.disk.check_after_cut(found)?,
    }
    check_snapshots(sim, boot, model)?;
    for (name, contents) in &model.clones {
        check_equal(name, &setting::contents(sim, name, boot)?, contents)?;
    }
    Ok(())
}

fn check_snapshots(sim: &Sim, boot: u128, model: &Model) -> Result<(), String> {
    let stored = setting::stored(sim, IMAGE, boot)?;
    let snapshots = &stored.root().snapshots;
    if snapshots.len() != model.snapshots.len() {
        let (found, expected) = (snapshots.len(), model.snapshots.len());
        return Err(format!("{found} snapshots, not {expected}"));
    }
    for (snapshot, (number, contents)) in snapshots.iter().zip(&model.snapshots) {
        if snapshot.number != *number {
            return Err(format!("snapshot {}, not {number}", snapshot.number));
        }
        let found = setting::layer_contents(&stored, snapshot.layer)?;
        check_equal(&format!("snapshot {number}"), &found, contents)?;
    }
    Ok(())
}

fn check_bystanders(setting: &Setting, sim: &Sim, boot: u128) -> Result<(), String> {
    for (name, contents) in BYSTANDERS.iter().zip(&setting.bystanders) {
        let fingerprint = sim.fingerprint_of(name);
        // The very same files show the very same bytes.
        if fingerprint.is_some_and(|f| setting.is_sound(f)) {
            continue;
        }
        check_equal(name, &setting::contents(sim, name, boot)?, contents)?;
        fingerprint.into_iter().for_each(|f| setting.note_sound(f));
    }
    Ok(())
}

fn digest(
    setting: &Setting,
    image: &Image,
    found: &Contents,
    model: &Model,
) -> Result<u64, String> {
    let size = image.virtual_size().bytes();
    let all = ClusterRange::new(0, image.cluster_size().clusters_in(size));
    let mut hasher = DefaultHasher::new();
    for (number, state) in image.active().states(all).map_err(text)?.iter().enumerate() {
        std::mem::discriminant(state).hash(&mut hasher);
        let tracked = TRACKED.iter().any(|c| u64::try_from(number) == Ok(*c));
        if !tracked && state.is_data() {
            return Err(format!("cluster {number} became data by itself"));
        }
    }
    let changed = found.0.iter().zip(&setting.image.0).enumerate();
    for (index, (cluster, _)) in changed.filter(|(_, (now, at_first))| now != at_first) {
        (index, cluster).hash(&mut hasher);
    }
    image.root().layers.len().hash(&mut hasher);
    image.below().depth().hash(&mut hasher);
    model.snapshots.len().hash(&mut hasher);
    model.clones.len().hash(&mut hasher);
    Ok(hasher.finish())
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
        return use_tree(survivor);
    }
    let places = store_to_all(setting, survivor, which)?;
    let disk = &mut survivor.model.disk;
    match setting.domain {
        Domain::PageCache => {
            survivor.image.flush().map_err(text)?;
            disk.promise_all();
        }
        Domain::Dax => {
            write_back(&survivor.image, &places)?;
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
    for (index, cluster) in TRACKED.iter().enumerate() {
        let cluster = Cluster(*cluster);
        let image = &survivor.image;
        let source = image.source(cluster).map_err(text)?;
        let used = match which {
            Use::Data => source == Source::Active,
            Use::Nobodys => matches!(source, Source::Active | Source::Nobody),
            Use::All | Use::Tree => true,
        };
        if !used {
            continue;
        }
        let made = image.make_writable(cluster.only(), &mut Vec::new());
        made.map_err(text)?;
        let place = (index, 8);
        store_word(image, setting.domain, place, 0x700d)?;
        survivor.model.disk.store(place, 0x700d);
        places.push(place);
    }
    check_running(survivor, "after new stores")?;
    Ok(places)
}

fn use_tree(survivor: &mut Survivor) -> Result<(), String> {
    let rebased = survivor.image.rebase(Some(&other_base()), IMAGE);
    rebased.map_err(|e| format!("rebase: {}", text(e)))?;
    check_running(survivor, "after a rebase")?;
    let snapshot = survivor.image.snapshot(None);
    snapshot.map_err(|e| format!("snapshot: {}", text(e)))?;
    check_running(survivor, "after a snapshot")?;
    survivor.model = survivor.model.with_snapshot();
    Ok(())
}

fn check_running(survivor: &Survivor, when: &str) -> Result<(), String> {
    let found = setting::read_tracked(|at, buf| survivor.image.read(at, buf))?;
    check_equal(when, &found, survivor.model.disk.now())
}
