// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations that put an image on a base: clones, new images on what others made, rebases.

use std::sync::Arc;

use pcow_format::medium::Site;
use pcow_format::medium::sim::Sim;
use pcow_format::ops::{Base, create_in, rebase_unsafe_of};
use pcow_format::{Cluster, Source};

use super::{Expected, LeftBase, Run};
use crate::model::{CLUSTER_BYTES, Contents, Model, Plan, Role};
use crate::setting::{self, OTHER, Setting, text};

const EXDEV: i32 = 18;
const ENOSPC: i32 = 28;
/// Links that an adoption tries, at most.
const MAX_LINKS: usize = 16;

impl Run<'_> {
    /// On another base, or on none.
    pub(super) fn rebase(&mut self, base: Option<&Base>) -> Result<bool, String> {
        if self.setting.scene.is_wide() {
            // It looks at every cluster, which takes too long for a search.
            return Ok(false);
        }
        let mut after = self.model().clone();
        after.disk.promise_all();
        let left = self.base()?;
        self.slot_mut().bases.push(left);
        let name = self.slot().name;
        self.change_tree(&[after], |image| image.rebase(base, name).map(drop))
    }

    /// As it is said to be: where the active layer holds nothing, the disk shows the other base afterwards.
    pub(super) fn rebase_unsafe(&mut self) -> Result<bool, String> {
        self.flush()?;
        let other = self.setting.bystanders.last();
        let other = &other.ok_or("no image to rebase on")?.contents;
        let mut shown = self.model().disk.now().clone();
        for (index, (cluster, _)) in self.setting.plan().clusters.iter().enumerate() {
            let source = self.image().source(Cluster(*cluster)).map_err(text)?;
            if !matches!(source, Source::Active | Source::Zero) {
                shown.0[index] = other.0[index].clone();
            }
        }
        let after = self.model().with_disk(shown);
        let name = self.slot().name;
        self.offline(&[after], |stored| {
            rebase_unsafe_of(stored, Some(&other_base()), name).map(drop)
        })?;
        // Under a root of before, what is stored from now on lies on the old base, as it never did.
        self.slot_mut().roots.clear();
        self.reopen()
    }

    /// What the active layer is on.
    fn base(&self) -> Result<LeftBase, String> {
        let (plan, name) = (self.setting.plan(), self.slot().name);
        let stored = setting::stored(&self.sim, name, self.boot)?;
        let active = stored.root().active_layer().map_err(text)?;
        let contents = match active.parent {
            Some(parent) => setting::layer_contents(plan, &stored, parent)?,
            None => zeros(plan),
        };
        Ok(LeftBase {
            layer: active.uuid,
            parent: active.parent,
            contents,
        })
    }

    /// A rebase onto a base of another filesystem.
    pub(super) fn rebase_by_copy(&mut self) -> Result<bool, String> {
        (0..MAX_LINKS).for_each(|_| self.sim.fail(Site("adopt.link"), EXDEV));
        let done = self.rebase(Some(&other_base()));
        self.sim.forget_plans();
        done
    }

    /// A clone for which there is no space.
    pub(super) fn failing_clone(&mut self) -> Result<bool, String> {
        let sealed = if self.shows_its_parent()? {
            self.model().clone()
        } else {
            self.model().with_snapshot()
        };
        let image = self.slot().name;
        self.slot_mut().image = None;
        let plan = self.setting.plan();
        self.transition(&[sealed], |run| {
            run.sim.fail(Site("create.rename"), ENOSPC);
            match setting::create(plan, &run.sim, "clone-that-fails", Some(image), run.boot) {
                Ok(()) => Err("created without space".to_owned()),
                Err(_) => Ok(()),
            }
        })?;
        self.slot_mut().unflushed.clear();
        self.reopen()
    }

    /// Clones the image, which must be closed for that.
    pub(super) fn clone_image(&mut self) -> Result<bool, String> {
        let sealed = if self.shows_its_parent()? {
            self.model().clone()
        } else {
            self.model().with_snapshot()
        };
        self.clones += 1;
        let name = format!("clone-{}", self.clones);
        let after = sealed.with_clone(&name);
        let image = self.slot().name;
        self.slot_mut().image = None;
        let plan = self.setting.plan();
        self.transition(&[sealed, after], |run| {
            setting::create(plan, &run.sim, &name, Some(image), run.boot)
        })?;
        self.slot_mut().unflushed.clear();
        self.reopen()
    }

    /// A new image that refers to the layers of another one instead of linking them.
    pub(super) fn create_by_reference(&mut self) -> Result<bool, String> {
        let Some(other) = self.setting.bystanders.last() else {
            return Ok(false);
        };
        let base = Base::Image {
            path: OTHER.into(),
            snapshot: None,
            reference: true,
        };
        self.create_on(base, other.contents.clone())
    }

    /// A new image on a raw file that somebody has written just now.
    pub(super) fn create_on_raw(&mut self) -> Result<bool, String> {
        let (plan, name) = (self.setting.plan(), format!("raw-{}", self.clones));
        let written = plan.first(Role::Absent);
        self.transition(&[], |run| {
            let wrote = write_raw(&run.sim, &name, plan, written);
            wrote.map_err(|e| format!("{name}: {e}"))
        })?;
        let mut shown = zeros(plan);
        shown.0[written] = Arc::new(vec![RAW_BYTE; shown.0[written].len()]);
        self.create_on(Base::Raw { path: name.into() }, shown)
    }

    fn create_on(&mut self, base: Base, shown: Contents) -> Result<bool, String> {
        self.clones += 1;
        let name = format!("clone-{}", self.clones);
        let after = self.model().with_image(&name, shown);
        let mut new = setting::new_image(self.setting.plan(), &name, None);
        new.base = Some(base);
        self.transition(&[after], |run| {
            let env = setting::environment(&run.sim, run.boot);
            let created = create_in(run.sim.top().as_ref(), &name, &new, &env);
            created.map(drop).map_err(text)
        })?;
        Ok(true)
    }
}

/// The base that a rebase goes to.
pub fn other_base() -> Base {
    Base::Image {
        path: OTHER.into(),
        snapshot: None,
        reference: false,
    }
}

/// What a disk shows that is on nothing.
fn zeros(plan: &Plan) -> Contents {
    let cluster = Arc::new(vec![0; usize::try_from(CLUSTER_BYTES).unwrap_or(0)]);
    Contents(vec![cluster; plan.clusters.len()])
}

/// A file as large as the disk that has bytes in one tracked cluster. Nothing of it is synced.
fn write_raw(sim: &Sim, name: &str, plan: &Plan, written: usize) -> std::io::Result<()> {
    let site = Site("user.raw");
    let file = sim.top().create(site, name)?;
    file.set_len(site, plan.bytes)?;
    let bytes = vec![RAW_BYTE; usize::try_from(CLUSTER_BYTES).unwrap_or(0)];
    file.write_at(site, &bytes, plan.cluster(written) * CLUSTER_BYTES)
}

/// What a raw base holds.
const RAW_BYTE: u8 = 0xd1;

/// Somebody clones the newest snapshot of an image that nobody has opened since its process died; returns what must be there
/// then. `None` if it has no snapshot.
pub fn clone_of_closed(
    setting: &Setting,
    sim: &Sim,
    expected: &Expected,
    boot: u128,
) -> Result<Option<Expected>, String> {
    let stored = setting::stored(sim, expected.image, boot)?;
    let Some(newest) = stored.root().snapshots.last().map(|s| s.number) else {
        return Ok(None);
    };
    let name = "clone-of-closed";
    let mut new = setting::new_image(setting.plan(), name, Some(expected.image));
    if let Some(Base::Image { snapshot, .. }) = &mut new.base {
        *snapshot = Some(newest.to_string());
    }
    let env = setting::environment(sim, boot);
    let created = create_in(sim.top().as_ref(), name, &new, &env);
    created.map_err(|e| format!("{name}: {}", text(e)))?;
    let with_clone = |model: &Model| {
        let snapshot = model.snapshots.iter().find(|s| s.number == newest)?;
        Some(model.with_image(name, snapshot.contents.clone()))
    };
    let possible: Vec<_> = expected.possible.iter().filter_map(with_clone).collect();
    if possible.is_empty() {
        return Err(format!("snapshot {newest} is none that there may be"));
    }
    Ok(Some(expected.with_possible(possible)))
}
