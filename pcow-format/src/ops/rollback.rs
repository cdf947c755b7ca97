// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rollback: a new active layer on top of a snapshot. What the old one held becomes a snapshot itself (I8).

use crate::error::Result;
use crate::image::Image;
use crate::ops::snapshot::free_name;

/// What a rollback did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RolledBack {
    /// Number of the snapshot that now holds what was active, if it held anything.
    pub saved_as: Option<(u64, String)>,
}

impl Image {
    /// Makes the disk show the snapshot `target` (name or number) again. Later snapshots stay. Changes since the
    /// last snapshot are kept as one called `before-rollback-<time>`, unless `discard`.
    ///
    /// # Errors
    /// `NotFound` for the snapshot; `NoSpace`, `FlushFailed` or `Io`. Before the commit the image is as it was.
    pub fn rollback(&mut self, target: &str, discard: bool) -> Result<RolledBack> {
        let rolled = self.roll_back_to(target, discard);
        if rolled.is_err() {
            // If this fails, stores do, too.
            let _ = self.reopen();
        }
        rolled
    }

    fn roll_back_to(&mut self, target: &str, discard: bool) -> Result<RolledBack> {
        let mut root = self.root().clone();
        let target = root.snapshot(target)?.layer;
        let old = root.active;
        let keep = !discard && !self.active.is_empty()?;
        let size = root.chain(target)?[0].size()?;
        let new = root.empty_layer(target, size, self.cluster_size())?;
        let (mut saved_as, mut unused) = (None, Vec::new());
        self.with_new_layer(&new, |image| {
            if keep {
                let time = super::now();
                let name = free_name(&root, &format!("before-rollback-{time}"));
                image.seal_active(&mut root)?;
                saved_as = Some((root.add_snapshot(&name, old, time)?, name));
            }
            root.active = new.uuid;
            root.layers.push(new.clone());
            unused = super::drop_unused_layers(&mut root)?;
            image.commit(root)
        })?;
        super::remove_unused(self.directory(), &unused);
        Ok(RolledBack { saved_as })
    }
}
