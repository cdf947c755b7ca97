// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Deletion of a snapshot. What its layer holds and another one still shows goes into a new layer (I0), or up into the
//! active one, where nobody can see it.
//!
//! | the snapshot's layer | what happens |
//! |---|---|
//! | is needed under another name, or by two layers or more, or is a base's | only the name goes |
//! | is under nothing | its files go |
//! | is under one sealed layer | both are merged into a new layer, which takes their place |
//! | is under the active layer alone | its clusters are copied into those that are absent there |
//!
//! A deletion that is cut off leaves the image as it was or as it will be. The files that are to come or to go have a mark
//! beside them, by which the next opening removes those that the root does not name (I5); then it can be run again.

use uuid::Uuid;

use crate::active::{Active, read_states};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{Image, Written, replace_root};
use crate::layer_files::{self, Pair};
use crate::map::State;
use crate::medium::{Access, Directory, Site, read_exact_at};
use crate::root::{Kind, Layer, Proof, Root};
use crate::units::{self, Cluster, ClusterRange, ClusterSize};

/// Clusters looked at in one step.
const STEP_CLUSTERS: u64 = 32 << 10;
/// Ending of the name of a mark.
pub(crate) const MARK: &str = ".part";

/// What a deletion did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Deleted {
    /// Number of the snapshot.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// Bytes that had to be copied, because another layer shows them.
    pub copied_bytes: u64,
}

/// A deletion that is ready to be committed.
#[derive(Debug)]
pub struct Deletion {
    root: Root,
    below: Chain,
    gone: Vec<Uuid>,
    marked: Vec<Uuid>,
    deleted: Deleted,
}

/// What becomes of the layer of a snapshot whose name goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It stays, or goes because nobody needs it.
    Plain,
    /// It is merged with the sealed layer on top of it.
    Merge(Uuid),
    /// It goes up into the active layer.
    Up,
}

impl Image {
    /// Deletes the snapshot `target` (name or number) of an image that this process has to itself.
    ///
    /// # Errors
    /// `NotFound`; `NoSpace`, saying how much is needed, before anything was changed; `FlushFailed` or `Io`. Before the commit
    /// every snapshot and the disk show what they showed.
    pub fn delete_snapshot(&mut self, target: &str) -> Result<Deleted> {
        let deletion = self.prepare_deletion(target, true)?;
        self.commit_deletion(&deletion)?;
        let finished = self.adopt_deletion(deletion);
        self.finish_deletion(finished)
    }

    /// Does everything before the commit. A guest may go on storing if `alone` is false; a snapshot under the active layer alone
    /// is refused then. Nobody else may change the layer tree until the deletion is finished.
    ///
    /// # Errors
    /// As [`Image::delete_snapshot`].
    pub fn prepare_deletion(&self, target: &str, alone: bool) -> Result<Deletion> {
        let snapshot = self.root().snapshot(target)?.clone();
        let mut root = self.root().clone();
        root.snapshots.retain(|s| s.number != snapshot.number);
        let mut deleted = Deleted {
            number: snapshot.number,
            name: snapshot.name,
            copied_bytes: 0,
        };
        let mut marked = Vec::new();
        match fate(&root, snapshot.layer) {
            Fate::Plain => {}
            Fate::Up if alone => deleted.copied_bytes = self.move_up(&mut root, snapshot.layer)?,
            Fate::Up => {
                let what = "the active layer alone lies on this snapshot, and a guest may be storing into it; take another snapshot first, or delete it when the image is not served";
                return Err(Error::new(ErrorKind::InvalidArgument, what));
            }
            Fate::Merge(upper) => {
                marked = vec![Uuid::new_v4(), snapshot.layer, upper];
                let made = self.mark(&marked);
                let layers = (upper, snapshot.layer);
                let merged = made.and_then(|()| self.merge(&mut root, marked[0], layers));
                deleted.copied_bytes = merged.inspect_err(|_| self.give_up(&marked))?;
            }
        }
        let gone = super::drop_unused_layers(&mut root);
        let left = gone.and_then(|gone| Ok((gone, self.chain_below(&root)?)));
        let (gone, below) = left.inspect_err(|_| self.give_up(&marked))?;
        Ok(Deletion {
            root,
            below,
            gone,
            marked,
            deleted,
        })
    }

    fn chain_below(&self, root: &Root) -> Result<Chain> {
        let records = root.chain(root.active)?;
        let after = self.stored.with_root(root.clone());
        after.chain_of(&records[1..], records[0].clip, self.cluster_size())
    }

    /// Commits a deletion.
    ///
    /// # Errors
    /// `NoSpace` or `Io`.
    pub fn commit_deletion(&self, deletion: &Deletion) -> Result<()> {
        match replace_root(self.directory(), &deletion.root) {
            Ok(Written::Durable) => Ok(()),
            // This goes on with the old root, the next opening with either: what both name stays.
            Ok(Written::Visible(e)) => Err(e),
            Err(e) => {
                self.give_up(&deletion.marked);
                Err(e)
            }
        }
    }

    /// Goes on without what was deleted. The disk shows what it showed. Takes no time.
    pub fn adopt_deletion(&mut self, mut deletion: Deletion) -> Deletion {
        self.stored = self.stored.with_root(deletion.root.clone());
        // What is left of the old chain is closed with the result.
        std::mem::swap(&mut self.below, &mut deletion.below);
        deletion
    }

    /// Removes the files that are not needed any more.
    ///
    /// # Errors
    /// `Io`; the deletion is done, and the next opening tries again.
    pub fn finish_deletion(&self, deletion: Deletion) -> Result<Deleted> {
        for layer in &deletion.gone {
            super::remove_layer_files(self.directory(), *layer)?;
        }
        remove_marks(self.directory(), &deletion.marked)?;
        Ok(deletion.deleted)
    }

    /// Durable before the first file that it speaks of holds anything: the creation of that layer syncs the directory.
    fn mark(&self, layers: &[Uuid]) -> Result<()> {
        let context = || "cannot begin to delete".to_owned();
        for layer in layers {
            let name = mark_name(*layer);
            match self.directory().create(Site("delete.mark.create"), &name) {
                Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(e).context(context);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Best effort: the next opening removes what stays (I5).
    fn give_up(&self, marked: &[Uuid]) {
        let Some(merged) = marked.first() else {
            return;
        };
        let removed = super::remove_layer_files(self.directory(), *merged);
        if let Err(e) = removed.and_then(|()| remove_marks(self.directory(), marked)) {
            log::debug!("{e}");
        }
    }

    /// Puts the content of `lower` and of `upper`, which lies on it, into the new layer `merged`; `root` names that instead of
    /// `upper` afterwards. Returns how many bytes were copied.
    fn merge(&self, root: &mut Root, merged: Uuid, (upper, lower): (Uuid, Uuid)) -> Result<u64> {
        let layers = Layers {
            upper: self.open_layer(upper)?,
            lower: self.open_layer(lower)?,
        };
        let mut row = layers.merged_row(merged);
        let boot = self.stored.environment().boot;
        let pair = layer_files::create(self.directory(), &row, self.root().uuid, boot)?;
        let shared = layers.share_upper(&pair)?;
        let files = (pair.map, pair.data);
        let geometry = (row.size()?, row.cluster()?);
        let (target, _) = Active::open(merged.to_string(), geometry, files, boot)?;
        self.refuse_without_space(layers.copy_into(&target, &row, shared, Mode::Count)?)?;
        let copied = layers.copy_into(&target, &row, shared, Mode::Copy)?;
        // I7 is about what a guest was promised: nobody uses this layer yet, and it goes.
        let what = "cannot make the new layer durable";
        let flushed = target.flush();
        flushed.map_err(|e| Error::new(ErrorKind::Io, what).caused_by(e))?;
        row.sealed = true;
        row.map_checksum = Some(target.map_checksum()?);
        for snapshot in root.snapshots.iter_mut().filter(|s| s.layer == upper) {
            snapshot.layer = merged;
        }
        for layer in root.layers.iter_mut().filter(|l| l.parent == Some(upper)) {
            layer.parent = Some(merged);
        }
        root.layers.retain(|l| l.uuid != upper);
        root.layers.push(row);
        // Named by nobody any more, but this process removes it, too.
        root.layers.push(layers.upper.0);
        Ok(copied)
    }

    fn open_layer(&self, layer: Uuid) -> Result<(Layer, Pair)> {
        let row = self.root().layer(layer).cloned();
        let row =
            row.ok_or_else(|| Error::new(ErrorKind::Corrupt, "a layer is not in the table"))?;
        let pair = layer_files::open_own(self.directory(), &row, Access::Read)?;
        Ok((row, pair))
    }

    /// Copies what the active layer shows of `lower` into it. Nobody can see that (I0), so it may be done in part and again.
    fn move_up(&self, root: &mut Root, lower: Uuid) -> Result<u64> {
        let (row, pair) = self.open_layer(lower)?;
        let needed = self.move_clusters_up(&row, &pair, Mode::Count)?;
        self.refuse_without_space(needed)?;
        let copied = self.move_clusters_up(&row, &pair, Mode::Copy)?;
        self.flush()?;
        let active = root.row_mut(root.active)?;
        active.parent = row.parent;
        active.clip = merged_clip(active.clip, &row);
        Ok(copied)
    }

    fn move_clusters_up(&self, row: &Layer, pair: &Pair, mode: Mode) -> Result<u64> {
        let (cluster, lower) = (self.cluster_size(), row.cluster()?);
        let clip = self.root().active_layer()?.clip.min(row.virtual_size);
        let mut buf = vec![0; units::len(cluster.bytes())];
        let mut copied = 0;
        for step in steps(cluster.clusters_in(clip)) {
            let states = self.active.states(step)?;
            let absent = step.iter().zip(states).filter(|(_, s)| *s == State::Absent);
            for (at, _) in absent {
                let bytes = cluster.byte_range(at.only());
                let below = read_states(pair.map.as_ref(), lower.covering(&bytes));
                let below =
                    below.context(|| format!("cannot read the map of layer {}", row.uuid))?;
                if below.iter().all(|s| *s == State::Absent) {
                    continue;
                }
                copied += cluster.bytes();
                if mode == Mode::Copy {
                    self.below.read(bytes.start, &mut buf)?;
                    self.active.fill(at.only(), &buf)?;
                }
            }
        }
        Ok(copied)
    }

    fn refuse_without_space(&self, needed: u64) -> Result<()> {
        let Some(dir) = self.directory().as_real() else {
            return Ok(());
        };
        let stat = rustix::fs::fstatvfs(dir.as_fd()).map_err(std::io::Error::from);
        let stat = stat.context(|| "cannot ask for free space".to_owned())?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if needed <= free || stat.f_blocks == 0 {
            return Ok(());
        }
        let what = format!(
            "what other layers show of this snapshot takes {needed} bytes, and {free} are free"
        );
        Err(Error::new(ErrorKind::NoSpace, what))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Count,
    Copy,
}

/// Two layers, one on the other.
struct Layers {
    upper: (Layer, Pair),
    lower: (Layer, Pair),
}

impl Layers {
    fn merged_row(&self, uuid: Uuid) -> Layer {
        let (upper, lower) = (&self.upper.0, &self.lower.0);
        let proven = |l: &Layer| l.proof == Some(Proof::Lease);
        Layer {
            uuid,
            parent: lower.parent,
            virtual_size: upper.virtual_size,
            // So that no cluster of either has to be completed from below.
            cluster_size: upper.cluster_size.min(lower.cluster_size),
            clip: merged_clip(upper.clip, lower),
            sealed: false,
            map_checksum: None,
            proof: Some(if proven(upper) && proven(lower) {
                Proof::Lease
            } else {
                Proof::None
            }),
            kind: Kind::Own,
        }
    }

    /// Shares the upper layer's storage with the new data file, where the filesystem can. What is not data there means
    /// nothing (I3).
    fn share_upper(&self, pair: &Pair) -> Result<bool> {
        let context = || "cannot share storage between layers".to_owned();
        let upper = self.upper.1.data.as_ref();
        let shared = pair.data.share_storage(Site("delete.clone"), upper);
        // I1 needs no sync here: no root names the layer before it is flushed.
        shared.context(context)
    }

    /// Makes `target` show what the two show. Returns how many bytes are copied for that.
    fn copy_into(&self, target: &Active, row: &Layer, shared: bool, mode: Mode) -> Result<u64> {
        let cluster = row.cluster()?;
        let mut buf = vec![0; units::len(cluster.bytes())];
        let mut copied = 0;
        for step in steps(cluster.clusters_in(row.virtual_size)) {
            let upper = states_in(&self.upper, step, cluster)?;
            let lower = states_in(&self.lower, step, cluster)?;
            for ((at, upper), lower) in step.iter().zip(upper).zip(lower) {
                let bytes = cluster.byte_range(at.only());
                let shown = bytes.start < self.upper.0.clip.min(self.lower.0.virtual_size);
                let (state, from) = match upper {
                    State::Absent if shown => (lower, &self.lower.1),
                    state => (state, &self.upper.1),
                };
                let is_shared = shared && upper.is_data();
                copied += if state.is_data() && !is_shared {
                    cluster.bytes()
                } else {
                    0
                };
                if mode == Mode::Count {
                    continue;
                }
                match state {
                    State::Data | State::Live if is_shared => target.mark_shared(at.only())?,
                    State::Data | State::Live => {
                        let read = read_exact_at(from.data.as_ref(), &mut buf, bytes.start);
                        read.context(|| "cannot read a layer's data".to_owned())?;
                        target.fill(at.only(), &buf)?;
                    }
                    State::Zero if row.parent.is_some() => target.mark_zero(at.only())?,
                    State::Zero | State::Absent => {}
                }
            }
        }
        Ok(copied)
    }
}

/// The states that a layer gives to the clusters of `step`, which are of size `cluster` and not larger than its own.
fn states_in(
    (row, pair): &(Layer, Pair),
    step: ClusterRange,
    cluster: ClusterSize,
) -> Result<Vec<State>> {
    let own = row.cluster()?;
    let last = own.clusters_in(row.virtual_size);
    let covering = own.covering(&cluster.byte_range(step));
    let inside = ClusterRange::new(covering.start.min(last), covering.end.min(last));
    let states = if inside.start < inside.end {
        read_states(pair.map.as_ref(), inside)
            .context(|| format!("cannot read the map of layer {}", row.uuid))?
    } else {
        Vec::new()
    };
    let state = |at: Cluster| {
        let at = own.cluster_at(cluster.offset_of(at)).0;
        let index = at.checked_sub(inside.start).map(units::len);
        index
            .and_then(|i| states.get(i).copied())
            .unwrap_or(State::Absent)
    };
    Ok(step.iter().map(state).collect())
}

fn steps(clusters: u64) -> impl Iterator<Item = ClusterRange> {
    let step = units::len(STEP_CLUSTERS);
    (0..clusters)
        .step_by(step)
        .map(move |start| ClusterRange::new(start, clusters.min(start + STEP_CLUSTERS)))
}

/// How much of what lies under `lower` shows through it and a layer on it that lets `clip` bytes show.
fn merged_clip(clip: u64, lower: &Layer) -> u64 {
    clip.min(lower.virtual_size).min(lower.clip)
}

/// What becomes of `layer`, of which a name has gone.
fn fate(root: &Root, layer: Uuid) -> Fate {
    let own = root.layer(layer).is_some_and(|l| l.kind == Kind::Own);
    let named = root.snapshots.iter().any(|s| s.layer == layer);
    let mut on_it = root.layers.iter().filter(|l| l.parent == Some(layer));
    match (on_it.next(), on_it.next()) {
        (Some(only), None) if own && !named && only.uuid == root.active => Fate::Up,
        (Some(only), None) if own && !named && only.kind == Kind::Own => Fate::Merge(only.uuid),
        _ => Fate::Plain,
    }
}

fn mark_name(layer: Uuid) -> String {
    format!("{layer}{MARK}")
}

/// Removes the marks of a deletion that is over, for good: if a power cut brought one back and then somebody put an older
/// root back, the opening under that would remove a layer which the newest root names.
pub(crate) fn remove_marks(dir: &dyn Directory, layers: &[Uuid]) -> Result<()> {
    let context = || "cannot end a deletion".to_owned();
    if layers.is_empty() {
        return Ok(());
    }
    for layer in layers {
        match dir.unlink(Site("delete.mark.unlink"), &mark_name(*layer)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).context(context),
            _ => {}
        }
    }
    dir.sync(Site("delete.unmark.sync")).context(context)
}
