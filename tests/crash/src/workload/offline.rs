// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a program does to an image that it has to itself: it writes, zeroes, compacts, resizes.

use pcow_format::VirtualSize;

use super::Run;
use crate::model::{CLUSTER_BYTES, Role, WORD_BYTES};
use crate::setting::text;

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
