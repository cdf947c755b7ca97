// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rebase: the active layer gets another parent. The safe form first writes into it, cluster by cluster, what the new
//! parent would show differently. Nobody can see those writes, so a rebase that is cut off is simply run again.

use std::path::{Path, PathBuf};

use crate::chain::Owner;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{Image, Source, Stored, write_root};
use crate::lock::ImageLock;
use crate::medium::Site;
use crate::ops::create::{Base, BaseLayers};
use crate::root::Root;
use crate::units::{self, Cluster, ClusterRange};

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
    /// Puts the active layer on another base, or on none; the disk shows the same bytes afterwards. Snapshots keep the
    /// layers that they have. `image_name` is what a snapshot of the base is called after.
    ///
    /// # Errors
    /// What opening a base may fail with; `NoSpace`, `FlushFailed` or `Io`. Before the commit the disk shows what it showed.
    pub fn rebase(&mut self, base: Option<&Base>, image_name: &str) -> Result<Rebased> {
        let (mut root, mut report) = relink(&self.stored, base, image_name)?;
        report.written_bytes = self.keep_content(&root)?;
        self.flush()?;
        let unused = super::drop_unused_layers(&mut root)?;
        self.commit(root)?;
        super::remove_unused(self.directory(), &unused);
        Ok(report)
    }

    /// Writes into absent clusters what they show now, where `root` would show something else.
    fn keep_content(&self, root: &Root) -> Result<u64> {
        let records = root.chain(root.active)?;
        let cluster = self.cluster_size();
        let after = self
            .stored
            .chain_of(&records[1..], records[0].clip, cluster)?;
        let bytes = units::len(cluster.bytes());
        let (mut old, mut new) = (vec![0; bytes], vec![0; bytes]);
        let mut written = 0;
        let size = self.virtual_size().bytes();
        let (mut here, mut there) = (self.below.walk(size), after.walk(size));
        let mut number = 0;
        while number < cluster.clusters_in(size) {
            let at = Cluster(number);
            number += 1;
            // Where neither the old nor the new base has anything, nothing can change.
            let offset = cluster.offset_of(at);
            let (old_owner, new_owner) = (here.extent(offset)?, there.extent(offset)?);
            if old_owner.owner == Owner::Nobody && new_owner.owner == Owner::Nobody {
                let end = old_owner.bytes.end.min(new_owner.bytes.end);
                if end >= offset + cluster.bytes() {
                    number = cluster.cluster_at(end).0;
                    continue;
                }
            }
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

/// Only changes the link of the image at `path`: where the active layer holds nothing, the disk shows the new base's bytes.
/// The old base need not be there.
///
/// # Errors
/// What opening the image or a base may fail with; `Io`.
pub fn rebase_unsafe(path: &Path, base: Option<&Base>, base_dirs: &[PathBuf]) -> Result<Rebased> {
    let name = path
        .file_name()
        .map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    rebase_unsafe_of(&Stored::open(path, base_dirs)?, base, &name)
}

/// As [`rebase_unsafe`], of an image that was read already. `image_name` is what a snapshot of the base is called after.
///
/// # Errors
/// As [`rebase_unsafe`].
pub fn rebase_unsafe_of(stored: &Stored, base: Option<&Base>, image_name: &str) -> Result<Rebased> {
    let _lock = ImageLock::exclusive(stored.directory())?;
    let stored = stored.again()?;
    let (mut root, report) = relink(&stored, base, image_name)?;
    let unused = super::drop_unused_layers(&mut root)?;
    write_root(stored.directory(), &root)?;
    super::remove_unused(stored.directory(), &unused);
    Ok(report)
}

/// The root of `stored` with its active layer on `base`, whose files have been given their place.
fn relink(stored: &Stored, base: Option<&Base>, image_name: &str) -> Result<(Root, Rebased)> {
    let mut root = stored.root().clone();
    let mut report = Rebased::default();
    let (mut parent, mut clip) = (None, 0);
    if let Some(base) = base {
        let base = BaseLayers::open(base, image_name, stored.environment())?;
        report.sealed_base_as = base.sealed_as().map(str::to_owned);
        let missing = base.not_held_by(&root, stored.directory())?;
        report.copied_bytes = missing.adopt_into(stored.directory())?.1;
        // I4: before the root that names them.
        stored
            .directory()
            .sync(Site("adopt.dir.sync"))
            .context(|| "cannot sync the image's directory".to_owned())?;
        let top = &base.layers()[0];
        parent = Some(top.uuid);
        clip = top.virtual_size.min(root.active_layer()?.virtual_size);
        for layer in missing.layers() {
            // A layer that is known may be somewhere else now: a base that was moved keeps its layers' names.
            root.layers.retain(|l| l.uuid != layer.uuid);
            root.layers.push(layer.clone());
        }
    }
    let active = root.active;
    let row = root.layers.iter_mut().find(|l| l.uuid == active);
    let row =
        row.ok_or_else(|| Error::new(ErrorKind::Corrupt, "the active layer is not in the table"))?;
    row.parent = parent;
    row.clip = clip;
    Ok((root, report))
}
