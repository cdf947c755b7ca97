// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rebase: the active layer gets another parent. The safe form first writes into it, cluster by cluster, what the new
//! parent would show differently. Nobody can see those writes, so a rebase that is cut off is simply run again.

use crate::error::Result;
use crate::image::{Image, Source};
use crate::ops::create::{Base, BaseLayers};
use crate::units::{self, Cluster, ClusterRange};

/// Whether the content is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RebaseMode {
    /// The disk shows the same bytes afterwards.
    Safe,
    /// Only the link is changed; the disk shows the new base's bytes where it has none of its own.
    Unsafe,
}

/// Where to rebase to.
#[derive(Debug, Clone)]
pub struct NewBase {
    /// The new base; `None` makes the image independent.
    pub base: Option<Base>,
    /// Whether the content is kept.
    pub mode: RebaseMode,
}

/// What a rebase did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rebased {
    /// Bytes written into the active layer because the new base shows something else there.
    pub written_bytes: u64,
    /// Bytes of the new base's files that had to be copied, because they could not be linked.
    pub copied_bytes: u64,
    /// Snapshot of the new base that was made to fix its present state.
    pub sealed_base_as: Option<String>,
}

impl Image {
    /// Puts the active layer on another base. Snapshots keep the layers that they have.
    ///
    /// # Errors
    /// What opening a base may fail with; `NoSpace`, `FlushFailed` or `Io`. Before the commit the disk shows what it showed.
    pub fn rebase(&mut self, new: &NewBase, image_name: &str) -> Result<Rebased> {
        let env = self.stored.environment().clone();
        let open = |b: &Base| BaseLayers::open(b, image_name, &env);
        let base = new.base.as_ref().map(open).transpose()?;
        let mut report = Rebased::default();
        let mut root = self.root().clone();
        let mut parent = None;
        let mut clip = 0;
        if let Some(base) = &base {
            report.sealed_base_as = base.sealed_as().map(str::to_owned);
            let missing = base.without(&root);
            report.copied_bytes = missing.adopt_into(self.directory())?.1;
            let top = &base.layers()[0];
            parent = Some(top.uuid);
            clip = top.virtual_size.min(self.virtual_size().bytes());
            root.layers.extend(missing.layers().iter().cloned());
        }
        let active = root.active;
        if let Some(row) = root.layers.iter_mut().find(|l| l.uuid == active) {
            row.parent = parent;
            row.clip = clip;
        }
        if new.mode == RebaseMode::Safe {
            report.written_bytes = self.keep_content(&root)?;
        }
        self.flush()?;
        let unused = super::drop_unused_layers(&mut root)?;
        self.commit(root)?;
        for layer in unused {
            super::remove_layer_files(self.directory(), layer)?;
        }
        Ok(report)
    }

    /// Writes into absent clusters what they show now, where `root` would show something else.
    fn keep_content(&self, root: &crate::root::Root) -> Result<u64> {
        let records = root.chain(root.active)?;
        let cluster = self.cluster_size();
        let after = self
            .stored
            .chain_of(&records[1..], records[0].clip, cluster)?;
        let bytes = units::len(cluster.bytes());
        let (mut old, mut new) = (vec![0; bytes], vec![0; bytes]);
        let mut written = 0;
        for number in 0..cluster.clusters_in(self.virtual_size().bytes()) {
            let at = Cluster(number);
            let range = cluster.byte_range(at.only());
            let source = self.source(at)?;
            let settled = matches!(source, Source::Active | Source::Zero);
            if settled || (source == Source::Nobody && after.is_nobodys(range.clone())?) {
                continue;
            }
            self.below.read(range.start, &mut old)?;
            after.read(range.start, &mut new)?;
            if old != new {
                written += self.keep_cluster(at.only(), &old)?;
            }
        }
        Ok(written)
    }

    fn keep_cluster(&self, run: ClusterRange, content: &[u8]) -> Result<u64> {
        if content.iter().all(|b| *b == 0) {
            self.active.mark_zero(run)?;
            return Ok(0);
        }
        self.active.fill(run, content)?;
        Ok(units::bytes(content.len()))
    }
}
