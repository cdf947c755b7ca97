// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations on the layer tree, and the ends of processes and boots.

use std::sync::Arc;

use pcow_format::medium::sim::Sim;
use pcow_format::medium::{Access, Site};
use pcow_format::ops::Checksum;
use pcow_format::root::{Kind, Root};
use pcow_format::{ErrorKind, Image, ROOT_FILE, map, map_name};
use uuid::Uuid;

use super::{Expected, Moved, OlderRoot, Run};
use crate::model::{Contents, Model, Role, Snapshot};
use crate::random::newest;
use crate::setting::{self, Setting, text};

impl Run<'_> {
    pub(super) fn snapshot(&mut self) -> Result<bool, String> {
        let after = self.model().with_snapshot();
        self.change_tree(&[after], |image| image.snapshot(None).map(drop))
    }

    /// As of a running guest: one attempt is given up; then the guest stores once more while the snapshot is prepared. The
    /// checksum follows.
    pub(super) fn live_snapshot(&mut self) -> Result<bool, String> {
        self.unseen(|image| {
            let prepared = image.prepare_snapshot(None)?;
            image.abandon_snapshot(prepared);
            Ok(())
        })?;
        let prepared = self.unseen(|image| image.prepare_snapshot(None))?;
        self.store(Role::Absent)?;
        let after = self.model().with_snapshot();
        let taken = |image: &mut Image| image.take_snapshot(prepared, Checksum::Later).map(drop);
        self.change_tree(&[after], taken)?;
        self.change_tree(&[], |image| {
            if let Some(root) = image.write_checksums()? {
                image.adopt_root(root);
            }
            Ok(())
        })
    }

    /// The oldest snapshot.
    pub(super) fn delete(&mut self) -> Result<bool, String> {
        let Some(number) = self.model().snapshots.first().map(|s| s.number) else {
            return Ok(false);
        };
        self.delete_number(number)
    }

    /// The newest snapshot: what an image was rolled back from has nothing on it.
    pub(super) fn delete_newest(&mut self) -> Result<bool, String> {
        match self.model().snapshots.as_slice() {
            [_, .., newest] => self.delete_number(newest.number),
            _ => Ok(false),
        }
    }

    /// As [`Self::delete_merging`], while a guest stores.
    pub(super) fn delete_beside_a_guest(&mut self) -> Result<bool, String> {
        self.store(Role::Absent)?;
        self.snapshot()?;
        let number = self.model().snapshots.last().map(|s| s.number);
        let number = number.ok_or("no snapshot was taken")?;
        self.store(Role::Zero)?;
        self.snapshot()?;
        let target = number.to_string();
        let deletion = self.unseen(|image| image.prepare_deletion(&target, false))?;
        self.store(Role::Base)?;
        let after = self.model().without_snapshot(number);
        self.transition(&[after], |run| {
            run.image().commit_deletion(&deletion).map_err(text)
        })?;
        self.store(Role::Leftover)?;
        self.change_names(&[], |image| {
            let adopted = image.adopt_deletion(deletion);
            image.finish_deletion(adopted).map(drop)
        })
    }

    fn delete_number(&mut self, number: u64) -> Result<bool, String> {
        let after = self.model().without_snapshot(number);
        self.change_tree(&[after], |image| {
            image.delete_snapshot(&number.to_string()).map(drop)
        })
    }

    /// The oldest snapshot gets another name.
    pub(super) fn rename(&mut self) -> Result<bool, String> {
        let Some(number) = self.model().snapshots.first().map(|s| s.number) else {
            return Ok(false);
        };
        self.renames += 1;
        let name = format!("renamed-{}", self.renames);
        let after = self.model().with_name(number, &name);
        self.change_names(&[after], |image| {
            let root = image.write_renamed(&number.to_string(), &name)?;
            image.adopt_root(root);
            Ok(())
        })
    }

    /// Two layers that both hold something become one.
    pub(super) fn delete_merging(&mut self) -> Result<bool, String> {
        self.store(Role::Absent)?;
        self.snapshot()?;
        let number = self.model().snapshots.last().map(|s| s.number);
        self.store(Role::Zero)?;
        self.snapshot()?;
        self.delete_number(number.ok_or("no snapshot was taken")?)
    }

    /// The same where files can share storage.
    pub(super) fn delete_sharing(&mut self) -> Result<bool, String> {
        self.sim.set_sharing(true);
        let deleted = self.delete_merging();
        self.sim.set_sharing(false);
        deleted
    }

    pub(super) fn rollback(&mut self, discard: bool) -> Result<bool, String> {
        let Some(Snapshot {
            number, contents, ..
        }) = self.model().snapshots.first().cloned()
        else {
            return Ok(false);
        };
        let saved = if discard || self.is_untouched()? {
            self.model().clone()
        } else {
            self.model().with_snapshot()
        };
        let after = saved.with_disk(contents);
        self.change_tree(&[after], |image| {
            image.rollback(&number.to_string(), discard).map(drop)
        })
    }

    pub(super) fn change_tree(
        &mut self,
        steps: &[Model],
        change: impl FnOnce(&mut Image) -> pcow_format::Result<()>,
    ) -> Result<bool, String> {
        self.change_names(steps, change)?;
        self.slot_mut().unflushed.clear();
        Ok(true)
    }

    /// As [`Self::change_tree`], of what flushes nothing.
    fn change_names(
        &mut self,
        steps: &[Model],
        change: impl FnOnce(&mut Image) -> pcow_format::Result<()>,
    ) -> Result<bool, String> {
        self.transition(steps, |run| {
            let image = run.slot_mut().image.as_mut();
            let image = image.and_then(Arc::get_mut);
            change(image.expect("held by nobody else between operations")).map_err(text)
        })?;
        Ok(true)
    }

    /// The next operations are on the other image.
    pub(super) fn switch(&mut self) -> Result<bool, String> {
        self.at = (self.at + 1) % self.slots.len();
        Ok(self.slots.len() > 1)
    }

    /// The process dies and another one opens the image.
    pub(super) fn kill(&mut self) -> Result<bool, String> {
        self.slot_mut().image = None;
        self.reopen()
    }

    pub(super) fn reopen(&mut self) -> Result<bool, String> {
        let name = self.slot().name;
        let image = self.transition(&[], |run| setting::open(&run.sim, name, run.boot))?;
        self.slot_mut().image = Some(Arc::new(image));
        Ok(true)
    }

    /// The machine loses power, or is started anew in order, and another boot opens the images.
    pub(super) fn reboot(&mut self, everything_written_back: bool) -> Result<bool, String> {
        self.slots.iter_mut().for_each(|slot| slot.image = None);
        self.cut_power(everything_written_back);
        let plan = self.setting.plan();
        for slot in &mut self.slots {
            slot.unflushed.clear();
            let image = setting::open(&self.sim, slot.name, self.boot)?;
            let found = setting::read_tracked(plan, |at, buf| image.read(at, buf))?;
            slot.model.disk.check_after_cut(&found)?;
            // What was found must be found again, whatever interrupts this opening.
            slot.model = slot.model.with_disk(found);
            slot.image = Some(Arc::new(image));
        }
        Ok(true)
    }

    /// Another boot, in which nobody has opened anything yet.
    pub(super) fn cut_power(&mut self, everything_written_back: bool) {
        let moment = self.sim.now();
        let choices = moment.choices();
        let picks = if everything_written_back {
            newest(&choices)
        } else {
            self.random.picks(&choices)
        };
        self.sim = moment.power_cut(&choices, &picks);
        self.begin();
        self.boot += 1;
    }

    /// The root of before comes back, out of a backup.
    pub(super) fn older_root(&mut self) -> Result<bool, String> {
        match self.slot().roots.len().checked_sub(2) {
            Some(before) => self.under(before),
            None => Ok(false),
        }
    }

    /// The first root comes back, which is not the one of before.
    pub(super) fn oldest_root(&mut self) -> Result<bool, String> {
        if self.slot().roots.len() < 3 {
            return Ok(false);
        }
        self.under(0)
    }

    /// Somebody opens the image under an older root; then the newest one is put back. What the older root does not name must
    /// still be there.
    fn under(&mut self, number: usize) -> Result<bool, String> {
        let older = self.slot().roots[number].clone();
        let newest = self.slot().roots.last().cloned();
        let newest = newest.ok_or("an image without a root")?;
        let root = Root::decode(&older).map_err(text)?;
        let unnamed = only_in_newest(self.image().root(), &root);
        let untouched = self.is_untouched()?;
        if untouched || !all_hold_words(self.setting, &self.sim, self.slot().name, &unnamed)? {
            // I5: an unnamed layer that holds nothing may go.
            return Ok(false);
        }
        let moved = self.moved_since(&root)?;
        self.slot_mut().image = None;
        let past = self.slot().past.clone();
        self.older = Some(Arc::new(OlderRoot {
            newest,
            unnamed,
            past,
            moved,
        }));
        self.transition(&[], |run| {
            put_root(&run.sim, run.slot().name, &older)?;
            let expected = run.expecting(vec![run.model().clone()]);
            let older = run.older.clone().ok_or("no older root")?;
            put_newest_back(run.setting, &run.sim, &expected, &older, run.boot)
        })?;
        self.older = None;
        self.reopen()
    }

    /// Whether the active layer of `older` is on another one now, and which base it left.
    fn moved_since(&self, older: &Root) -> Result<Option<Moved>, String> {
        let then = older.active_layer().map_err(text)?;
        let now = self.image().root().layer(then.uuid);
        if now.is_none_or(|now| now.parent == then.parent) {
            return Ok(None);
        }
        let mut bases = self.slot().bases.iter();
        let left = bases.find(|b| (b.layer, b.parent) == (then.uuid, then.parent));
        let left = left.map(|b| b.contents.clone());
        Ok(Some(Moved { left }))
    }
}

impl OlderRoot {
    /// Whether the image may show `found` under this root where with the newest one it is one of `models`.
    ///
    /// It is what it showed once. But a rebase, or a deletion, puts the active layer on another one, and what is stored from
    /// then on is there under the older root, too. Where the layer holds nothing any more, as after zeros were written on a
    /// base that holds nothing either, the older root shows what the layer left, beside what was stored since. So then each
    /// cluster was there once or is in the base that was left, and not all are of one time.
    fn may_show(&self, found: &Contents, models: &[Model]) -> bool {
        let may_be_now = |model: &Model| model.disk.check_after_cut(found).is_ok();
        if models.iter().any(may_be_now) || self.past.contains(found) {
            return true;
        }
        let Some(Moved { left }) = &self.moved else {
            return false;
        };
        let mut clusters = found.0.iter().enumerate();
        clusters.all(|(i, cluster)| {
            let is_now = |model: &Model| model.disk.check_cluster_after_cut(i, cluster).is_ok();
            left.as_ref().is_some_and(|left| left.0[i] == *cluster)
                || self.past.iter().any(|past| past.0[i] == *cluster)
                || models.iter().any(is_now)
        })
    }
}

/// Somebody opens the image under a root that may be an older one, which shows what it has shown once, or is refused;
/// then the newest root is put back.
pub fn put_newest_back(
    setting: &Setting,
    sim: &Sim,
    expected: &Expected,
    older: &OlderRoot,
    boot: u128,
) -> Result<(), String> {
    if !all_hold_words(setting, sim, expected.image, &older.unnamed)? {
        // I5: to an older root one that holds nothing is a layer of an operation that was cut off, and goes.
        return put_root(sim, expected.image, &older.newest);
    }
    match setting::try_open(sim, expected.image, boot) {
        Ok(image) => {
            let found = setting::read_tracked(setting.plan(), |at, buf| image.read(at, buf))?;
            if !older.may_show(&found, &expected.possible) {
                return Err("an older root shows what was never there".to_owned());
            }
        }
        Err(e) if matches!(e.kind(), ErrorKind::Linked | ErrorKind::BaseMissing) => {}
        Err(e) if e.kind() == ErrorKind::Corrupt && text_of(&e).contains("No such file") => {}
        Err(e) => return Err(format!("with an older root: {}", text(e))),
    }
    put_root(sim, expected.image, &older.newest)
}

fn text_of(error: &pcow_format::Error) -> String {
    let cause = std::error::Error::source(error);
    format!(
        "{error}: {}",
        cause.map_or_else(String::new, ToString::to_string)
    )
}

/// The text of an image's root.
pub(super) fn root_text(image: &Image) -> Result<Vec<u8>, String> {
    let read = || {
        let file = image.directory().open(ROOT_FILE, Access::Read)?;
        let mut text = vec![0; usize::try_from(file.status()?.len).unwrap_or(0)];
        file.read_at(&mut text, 0)?;
        Ok(text)
    };
    read().map_err(|e: std::io::Error| format!("{ROOT_FILE}: {e}"))
}

/// The layers of the image's own that `newest` names and `older` does not.
fn only_in_newest(newest: &Root, older: &Root) -> Vec<Uuid> {
    let own = newest.layers.iter().filter(|l| l.kind == Kind::Own);
    own.map(|l| l.uuid)
        .filter(|uuid| older.layer(*uuid).is_none())
        .collect()
}

fn all_hold_words(
    setting: &Setting,
    sim: &Sim,
    image: &str,
    layers: &[Uuid],
) -> Result<bool, String> {
    let holds = |layer: &Uuid| {
        let map = sim
            .top()
            .open_dir(image)?
            .open(&map_name(*layer), Access::Read)?;
        let mut held = false;
        for number in &setting.words {
            let mut raw = [0; 8];
            map.read_at(&mut raw, map::word_offset(*number))?;
            held |= raw != [0; 8];
        }
        Ok(held)
    };
    for layer in layers {
        let held = holds(layer);
        if !held.map_err(|e: std::io::Error| format!("the map of layer {layer}: {e}"))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Replaces the root as a careful user does, who restores that file alone.
fn put_root(sim: &Sim, image: &str, text: &[u8]) -> Result<(), String> {
    let put = || {
        let dir = sim.top().open_dir(image)?;
        let site = Site("user.root");
        if dir.names()?.iter().any(|n| n == RESTORED) {
            dir.unlink(site, RESTORED)?;
        }
        let file = dir.create(site, RESTORED)?;
        file.write_at(site, text, 0)?;
        file.sync_data(site)?;
        dir.rename(site, RESTORED, ROOT_FILE)?;
        dir.sync(site)
    };
    put().map_err(|e: std::io::Error| format!("{ROOT_FILE}: {e}"))
}

/// Where a user restores a root to, before it gets its name.
const RESTORED: &str = "image.json.restored";
