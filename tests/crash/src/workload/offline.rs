// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a program does to an image that it has to itself: it writes, zeroes, compacts, resizes.

use pcow_format::medium::sim::Sim;
use pcow_format::medium::{Access, Domain, File, Site};
use pcow_format::ops::create_filled_in;
use pcow_format::repair::{Unflushed, repair, settle_unflushed};
use pcow_format::{Error, ErrorKind, FLUSH_FAILED_FILE, Image, Stored, VirtualSize, data_name};

use super::Run;
use crate::model::{CLUSTER_BYTES, Model, Role, WORD_BYTES};
use crate::setting::{self, OTHER, text};

/// What a resize adds or takes away: a step of sizes.
const STEP_BYTES: u64 = 2 << 20;

impl Run<'_> {
    /// Writes to clusters of three kinds, and flushes.
    pub(super) fn write(&mut self) -> Result<bool, String> {
        for role in [Role::Base, Role::Zero, Role::Leftover] {
            let plan = self.setting.plan();
            let index = plan.first(role);
            self.stores += 1;
            let (place, value) = ((index, 192), 0x3717_0000 + self.stores);
            let mut after = self.model().clone();
            after.disk.store(place, value);
            let offset = plan.cluster(index) * CLUSTER_BYTES + 192;
            self.transition(&[after], |run| {
                let bytes = value.to_le_bytes();
                run.image().write(offset, &bytes).map_err(text)
            })?;
        }
        self.flush()
    }

    /// Zeroes clusters of two kinds, and flushes.
    pub(super) fn write_zeros(&mut self) -> Result<bool, String> {
        for role in [Role::Absent, Role::Base] {
            let plan = self.setting.plan();
            let index = plan.first(role);
            let mut after = self.model().clone();
            let words = usize::try_from(CLUSTER_BYTES).unwrap_or(0) / WORD_BYTES;
            (0..words).for_each(|w| after.disk.store((index, w * WORD_BYTES), 0));
            let start = plan.cluster(index) * CLUSTER_BYTES;
            self.transition(&[after], |run| {
                let range = start..start + CLUSTER_BYTES;
                run.image().write_zeros(range).map_err(text)
            })?;
        }
        self.flush()
    }

    pub(super) fn compact(&mut self) -> Result<bool, String> {
        let mut after = self.model().clone();
        after.disk.promise_all();
        self.change_tree(&[after], |image| image.compact(&mut |_| ()).map(drop))
    }

    /// Between two sizes, both of which hold all tracked clusters.
    pub(super) fn resize(&mut self) -> Result<bool, String> {
        let mut after = self.model().clone();
        if !self.is_untouched()? {
            after.disk.promise_all();
        }
        self.change_tree(&[after], |image| {
            let size = image.virtual_size().bytes();
            let larger = size.is_multiple_of(2 * STEP_BYTES);
            let wanted = if larger {
                size + STEP_BYTES
            } else {
                size - STEP_BYTES
            };
            image.resize(VirtualSize::new(wanted)?)
        })
    }

    /// Repairs the image, which must be closed for that.
    pub(super) fn repair(&mut self) -> Result<bool, String> {
        let mut after = self.model().clone();
        after.disk.promise_all();
        self.offline(&[after], |stored| repair(stored).map(drop))?;
        self.slot_mut().unflushed.clear();
        self.reopen()
    }

    /// Repairs it after a flush has failed. From then on flushes mean it again.
    pub(super) fn repair_after_failed_flush(&mut self) -> Result<bool, String> {
        self.failing_flush("active.flush.data")?;
        self.ended = false;
        let after = self.model().with_mark_removed_for_good();
        self.offline(&[after], |stored| repair(stored).map(drop))?;
        self.slot_mut().unflushed.clear();
        self.reopen_in_doubt()
    }

    /// As somebody does who removes the mark by hand, in the same boot, after the words were not written.
    pub(super) fn go_on_after_failed_flush(&mut self) -> Result<bool, String> {
        if !self.failing_flush("active.flush.map")? {
            return Ok(false);
        }
        self.ended = false;
        let after = self.model().with_mark_removed();
        self.offline(&[after], |stored| {
            let removed = stored
                .directory()
                .unlink(Site("user.unlink"), FLUSH_FAILED_FILE);
            removed.map_err(|e| Error::new(ErrorKind::Io, FLUSH_FAILED_FILE).caused_by(e))
        })?;
        self.slot_mut().unflushed.clear();
        self.reopen_in_doubt()
    }

    /// What was not flushed is taken for data in the boot after an orderly end.
    pub(super) fn trust_unflushed(&mut self) -> Result<bool, String> {
        if self.setting.domain() == Domain::Dax || self.slots.len() > 1 {
            return Ok(false);
        }
        self.slot_mut().image = None;
        self.cut_power(true);
        let trusted = self.model().with_disk(self.model().disk.now().clone());
        self.slot_mut().model = self.model().in_doubt();
        self.offline(&[trusted], |s| {
            settle_unflushed(s, Unflushed::Trust).map(drop)
        })?;
        self.slot_mut().unflushed.clear();
        self.reopen()
    }

    /// Somebody copies the image, which is closed, and has what was not flushed taken for data in the copy. The active layer
    /// of that is durable only then.
    pub(super) fn trust_copy(&mut self) -> Result<bool, String> {
        if self.setting.domain() == Domain::Dax {
            return Ok(false);
        }
        self.clones += 1;
        let name = format!("copy-{}", self.clones);
        let active = self.image().root().active.to_string();
        self.slot_mut().image = None;
        let original = self.slot().name;
        self.transition(&[], |run| {
            let copied = copy(&run.sim, original, &name, |file| file.starts_with(&active));
            copied.map_err(|e| format!("a copy: {e}"))
        })?;
        let shown = self.model().disk.now().clone();
        let after = self.model().with_image(&name, shown);
        self.transition(&[after], |run| {
            let copied = setting::stored(&run.sim, &name, run.boot)?;
            settle_unflushed(&copied, Unflushed::Trust)
                .map(drop)
                .map_err(text)
        })?;
        self.reopen()
    }

    /// What was not flushed is given up within its boot.
    pub(super) fn discard_unflushed(&mut self) -> Result<bool, String> {
        if self.setting.domain() == Domain::Dax {
            return Ok(false);
        }
        self.slot_mut().model = self.model().in_doubt();
        self.offline(&[], |s| settle_unflushed(s, Unflushed::Discard).map(drop))?;
        self.slot_mut().unflushed.clear();
        self.reopen_in_doubt()
    }

    /// A piece of an operation on the image while nobody has it open.
    pub(super) fn offline(
        &mut self,
        steps: &[Model],
        piece: impl FnOnce(&Stored) -> pcow_format::Result<()>,
    ) -> Result<(), String> {
        let name = self.slot().name;
        self.slot_mut().image = None;
        self.transition(steps, |run| {
            let stored = setting::stored(&run.sim, name, run.boot)?;
            piece(&stored).map_err(text)
        })
    }

    /// Opens the image, of which that is there what a power cut could have left.
    fn reopen_in_doubt(&mut self) -> Result<bool, String> {
        self.reopen()?;
        let (plan, image) = (self.setting.plan(), self.image().clone());
        let found = setting::read_tracked(plan, |at, buf| image.read(at, buf))?;
        self.model().disk.check_after_cut(&found)?;
        self.slot_mut().model = self.model().with_found(found);
        Ok(true)
    }

    /// Somebody copies the data of the active layer, which holds something, with `cp --reflink` while nobody has the image open.
    pub(super) fn reflink(&mut self) -> Result<bool, String> {
        for role in [Role::Base, Role::Absent, Role::Zero, Role::Leftover] {
            self.store(role)?;
        }
        let (name, image) = (data_name(self.image().root().active), self.slot().name);
        self.slot_mut().image = None;
        self.transition(&[], |run| {
            let shared = reflink(&run.sim, image, &name);
            shared.map_err(|e| format!("a copy by reflink: {e}"))
        })?;
        self.reopen()
    }

    /// A new image takes in the bytes of a file: those of the image that nothing is based on.
    pub(super) fn import(&mut self) -> Result<bool, String> {
        self.clones += 1;
        let name = format!("clone-{}", self.clones);
        let shown = self.setting.bystanders.last().map(|b| b.contents.clone());
        let after = self
            .model()
            .with_image(&name, shown.ok_or("no image to take from")?);
        let plan = self.setting.plan();
        self.transition(&[after], |run| {
            let source = setting::stored(&run.sim, OTHER, run.boot)?;
            // Its present layer is a new one once something was based on it.
            let mut layers = source.root().layers.iter();
            let lowest = layers
                .find(|l| l.parent.is_none())
                .ok_or("no lowest layer")?;
            let file = source
                .directory()
                .open(&data_name(lowest.uuid), Access::Read)
                .map_err(|e| e.to_string())?;
            let fill = &mut |image: &Image| import_all(image, file.as_ref());
            let new = setting::new_image(plan, &name, None);
            let env = setting::environment(&run.sim, run.boot);
            let created = create_filled_in(run.sim.top().as_ref(), &name, &new, &env, fill);
            created.map(drop).map_err(text)
        })?;
        Ok(true)
    }

    /// Whether the active layer holds nothing and is as large as what is below it, so that a clone can do without it.
    pub(super) fn shows_its_parent(&self) -> Result<bool, String> {
        let root = self.image().root();
        let active = root.active_layer().map_err(text)?;
        let parent = active.parent.and_then(|p| root.layer(p));
        let same = parent.is_some_and(|p| {
            p.virtual_size == active.virtual_size && p.virtual_size == active.clip
        });
        Ok(same && self.is_untouched()?)
    }
}

/// Copies the files of an image, as `cp` does, into a directory that gets its name at the end, when all is durable but the
/// contents of files that are `dirty`.
fn copy(sim: &Sim, from: &str, to: &str, dirty: impl Fn(&str) -> bool) -> std::io::Result<()> {
    let site = Site("user.copy");
    let top = sim.top();
    let (from, part) = (top.open_dir(from)?, format!("{to}.part"));
    let into = top.create_dir(site, &part)?;
    for name in from.names()? {
        let (old, new) = (from.open(&name, Access::Read)?, into.create(site, &name)?);
        new.set_len(site, old.status()?.len)?;
        let mut at = 0;
        while let Some(data) = old.next_data(at)? {
            let mut bytes = vec![0; usize::try_from(data.end - data.start).unwrap_or(0)];
            let got = old.read_at(&mut bytes, data.start)?;
            new.write_at(site, &bytes[..got], data.start)?;
            at = data.end;
        }
        if !dirty(&name) {
            new.sync_data(site)?;
        }
    }
    into.sync(site)?;
    top.rename_dir(site, &part, to)?;
    top.sync(site)
}

/// Makes the file [`REFLINKED`], which shares the storage of a file of the image.
fn reflink(sim: &Sim, image: &str, name: &str) -> std::io::Result<()> {
    let (site, top) = (Site("user.copy"), sim.top());
    let source = top.open_dir(image)?.open(name, Access::Read)?;
    if top.names()?.iter().any(|n| n == REFLINKED) {
        top.unlink(site, REFLINKED)?;
    }
    let copy = top.create(site, REFLINKED)?;
    copy.set_len(site, source.status()?.len)?;
    sim.set_sharing(true);
    copy.share_storage(site, source.as_ref())?;
    sim.set_sharing(false);
    copy.sync_data(site)
}

/// What shares its storage with a file of the image.
const REFLINKED: &str = "reflinked";

fn import_all(image: &Image, file: &dyn File) -> pcow_format::Result<()> {
    let mut at = 0;
    let data = |at| {
        let found = file.next_data(at);
        found.map_err(|e| Error::new(ErrorKind::Io, "cannot look for data").caused_by(e))
    };
    while let Some(range) = data(at)? {
        at = range.end;
        image.import(file, range)?;
    }
    Ok(())
}
