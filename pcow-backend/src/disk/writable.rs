// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image held for writing, as the fault service sees it.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use pcow_format::medium::{Domain, File};
use pcow_format::ops::{Checksum, Deleted, Prepared};
use pcow_format::root::{Proof, Root};
use pcow_format::{
    Cluster, ClusterRange, ClusterSize, Error, ErrorKind, HandedBack, Image, ImageLock, Result,
    Source,
};
use uuid::Uuid;

use super::maybe_clean::MaybeClean;
use super::turn::{Taken, Turn};
use super::{Access, Answer, Continuation, Disk, FileKey, Scratch};
use crate::service::board::Claim;

/// Read copies are made in pieces of this size, or of a cluster if that is smaller.
const MAX_UNIT_BYTES: u64 = 64 << 10;
/// How far around a fault data is looked for that can be mapped with it.
const RUN_BYTES: u64 = 128 << 20;
/// At most so many clusters on each side: the map is read in one piece of 1 KiB.
const RUN_CLUSTERS: u64 = 2048;
/// What a huge page maps. Storage of existing data is looked after in blocks of this size, too: giving shared blocks an own
/// copy takes time.
const BLOCK_BYTES: u64 = 2 << 20;

/// Clusters that hold what they cover are looked for in pieces of this size.
const CLEAN_BYTES: u64 = 2 << 20;

/// How often it is tried to open a layer again that could not be sealed.
const REOPEN: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 1000 });

/// The image, and what of it never changes while it is served: who reads events must not wait for the rest (F4).
#[derive(Debug)]
pub struct WritableDisk {
    /// Written only to switch to another layer, while nothing is resolved: see [`WritableDisk::exclusive`].
    image: RwLock<Image>,
    /// A flush.
    flushing: Turn,
    uuid: Uuid,
    size: u64,
    cluster: ClusterSize,
    domain: Domain,
    lock: Option<Arc<ImageLock>>,
    maybe_clean: Mutex<MaybeClean>,
}

impl WritableDisk {
    /// Serves `image`.
    pub fn new(image: Image) -> Self {
        Self {
            uuid: image.root().uuid,
            size: image.virtual_size().bytes(),
            cluster: image.cluster_size(),
            domain: image.domain(),
            lock: image.share_lock(),
            image: RwLock::new(image),
            flushing: Turn::default(),
            maybe_clean: Mutex::default(),
        }
    }

    /// UUID of the image.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// What makes stores durable.
    pub fn domain(&self) -> Domain {
        self.domain
    }

    /// The root as it was last committed.
    pub fn root(&self) -> Root {
        self.image().root().clone()
    }

    /// See [`Image::prepare_snapshot`]. A new layer in another persistence domain is refused: frontends have been told.
    ///
    /// # Errors
    /// As there.
    pub fn prepare_snapshot(&self, name: Option<&str>) -> Result<Prepared> {
        // It flushes.
        let _turn = self.flushing.take();
        let image = self.image();
        let prepared = image.prepare_snapshot(name)?;
        if prepared.domain() != self.domain {
            image.abandon_snapshot(prepared);
            let what = "files that are made in the image now are in another persistence domain than those that it has";
            return Err(Error::new(ErrorKind::MixedDomains, what));
        }
        Ok(prepared)
    }

    /// See [`Image::abandon_snapshot`].
    pub fn abandon_snapshot(&self, prepared: Prepared) {
        self.image().abandon_snapshot(prepared);
    }

    /// See [`Image::take_snapshot`]. Nothing is resolved meanwhile. Whatever happens, the disk can be written to afterwards: if
    /// it cannot be opened again this waits, and with it the guest.
    ///
    /// # Errors
    /// As there.
    pub fn take_snapshot(&self, prepared: Prepared) -> Result<Proof> {
        let (_no_flush, mut image) = self.exclusive();
        let active = image.root().active;
        let taken = image.take_snapshot(prepared, Checksum::Later);
        while let Err(e) = image.reopen() {
            log::error!("the guest waits: {e}; trying again");
            std::thread::sleep(REOPEN);
        }
        if image.root().active != active {
            // It was noted of a layer that is sealed now.
            self.forget_maybe_clean();
        }
        taken
    }

    /// See [`Image::write_checksums`].
    ///
    /// # Errors
    /// As there.
    pub fn write_checksums(&self) -> Result<()> {
        let written = self.image().write_checksums()?;
        if let Some(root) = written {
            // Only now, and for a moment: the sync of a root must not keep a fault waiting.
            let (_no_flush, mut image) = self.exclusive();
            image.adopt_root(root);
        }
        Ok(())
    }

    /// See [`Image::prepare_deletion`]; a guest goes on storing.
    ///
    /// # Errors
    /// As there.
    pub fn delete_snapshot(&self, target: &str) -> Result<Deleted> {
        let deletion = {
            let image = self.image();
            let deletion = image.prepare_deletion(target, false)?;
            image.commit_deletion(&deletion)?;
            deletion
        };
        let old = {
            // Only now, and for a moment. The new chain shows what the old one did, so that nothing that was resolved in
            // between is wrong.
            let (_no_flush, mut image) = self.exclusive();
            image.adopt_deletion(deletion)
        };
        self.image().finish_deletion(old)
    }

    /// See [`Image::write_renamed`].
    ///
    /// # Errors
    /// As there.
    pub fn rename_snapshot(&self, target: &str, name: &str) -> Result<()> {
        let root = self.image().write_renamed(target, name)?;
        let (_no_flush, mut image) = self.exclusive();
        image.adopt_root(root);
        Ok(())
    }

    fn image(&self) -> RwLockReadGuard<'_, Image> {
        // A panic in a resolver leaves the image whole: each change of a cluster is one word.
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image, for a moment in which nothing is resolved. A flush that is under way ends before: who waits for the lock keeps
    /// all faults waiting that come later, and a flush, which has the lock, takes as long as the storage does. What else has it
    /// for long is a change of the layer tree, and there is one at a time, or itself a fault: a load from a base that is slow,
    /// or a store over zeros, which syncs.
    fn exclusive(&self) -> (Taken<'_>, RwLockWriteGuard<'_, Image>) {
        let no_flush = self.flushing.take_briefly();
        let image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        (no_flush, image)
    }

    fn cluster_size(&self) -> ClusterSize {
        self.cluster
    }

    fn cluster_count(&self) -> u64 {
        self.cluster.clusters_in(self.size)
    }

    /// `claim` grown over `run` as far as nobody else is at work there, in clusters.
    fn claim_run(&self, claim: &mut Claim, run: ClusterRange) -> ClusterRange {
        let claimed = claim.extend(self.cluster_size().byte_range(run));
        self.cluster_size().covering(&claimed)
    }

    fn map_data(&self, image: &Image, cluster: Cluster, claim: &mut Claim) -> Result<Answer> {
        let reach = (RUN_BYTES >> self.cluster_size().bits()).clamp(1, RUN_CLUSTERS);
        // Whole blocks: one of which a part is mapped and touched gets no huge page, not even if it is mapped whole later.
        let first = self.block_around(Cluster(cluster.0.saturating_sub(reach)));
        let last = self.block_around(Cluster(cluster.0 + reach));
        let bounds = ClusterRange::new(first.start, last.end.min(self.cluster_count()));
        let run = image.active().data_run(cluster, bounds)?;
        let run = self.claim_run(claim, run);
        // Again, now that nobody else is at work there: what was only read may have been given back in between (F1).
        let mut run = image.active().data_run(cluster, run)?;
        if !image.active().has_storage(run) {
            let block = self.block_around(cluster);
            run = ClusterRange::new(run.start.max(block.start), run.end.min(block.end));
            image.active().ensure_storage(run)?;
        }
        Ok(self.mapping(run, false))
    }

    fn block_around(&self, cluster: Cluster) -> ClusterRange {
        let per_block = BLOCK_BYTES >> self.cluster_size().bits();
        let start = cluster.0 / per_block * per_block;
        ClusterRange::new(start, start + per_block)
    }

    /// The clusters of the allocation unit around `cluster` that can be allocated with it.
    fn allocatable(image: &Image, cluster: Cluster) -> Result<ClusterRange> {
        let unit = image.allocation_run(cluster);
        let sources = image.sources(unit)?;
        let free = |c: &Cluster| {
            usize::try_from(c.0 - unit.start).is_ok_and(|i| sources[i] == Source::Nobody)
        };
        let after = (cluster.0..unit.end).map(Cluster).take_while(free).last();
        let before = (unit.start..cluster.0)
            .rev()
            .map(Cluster)
            .take_while(free)
            .last();
        Ok(ClusterRange::new(
            before.unwrap_or(cluster).0,
            after.unwrap_or(cluster).0 + 1,
        ))
    }

    fn make_writable(
        &self,
        image: &Image,
        (cluster, source): (Cluster, Source),
        claim: &mut Claim,
        scratch: &mut Scratch,
    ) -> Result<Answer> {
        let run = if source == Source::Nobody {
            let run = Self::allocatable(image, cluster)?;
            self.claim_run(claim, run)
        } else {
            cluster.only()
        };
        image.make_writable(run, &mut scratch.layer)?;
        Ok(self.mapping(run, true))
    }

    fn mapping(&self, run: ClusterRange, fresh: bool) -> Answer {
        Answer::Map {
            bytes: self.cluster_size().byte_range(run),
            file: FileKey::Active,
            fresh,
        }
    }

    fn maybe_clean(&self) -> MutexGuard<'_, MaybeClean> {
        // The runs are a hint: any value of them is valid.
        self.maybe_clean
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for WritableDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn unit(&self) -> u64 {
        self.cluster_size().bytes().min(MAX_UNIT_BYTES)
    }

    fn read_only(&self) -> bool {
        false
    }

    fn is_dax(&self) -> bool {
        self.domain == Domain::Dax
    }

    fn identity(&self) -> ([u8; 16], [u8; 16]) {
        let active = self.image().root().active;
        (self.uuid.into_bytes(), active.into_bytes())
    }

    fn lock(&self) -> Option<&std::fs::File> {
        self.lock.as_deref().and_then(ImageLock::in_use)
    }

    fn continuation(&self, layer: [u8; 16]) -> Result<Continuation> {
        let image = self.image();
        let layer = Uuid::from_bytes(layer);
        if layer == image.root().active {
            return Ok(Continuation::Same);
        }
        // The backend before this one has sealed it, and died before it could tell. Whatever else changes the tree needs the
        // lock that the frontend has kept, this process included. It has not seen that nothing of the layer is mapped.
        let sealed = image.root().sealed_last().filter(|l| l.uuid == layer);
        match sealed {
            Some(_) => image.prove_sealed(layer).map(Continuation::Sealed),
            None => Ok(Continuation::Changed),
        }
    }

    fn hand_back(&self, kept: OwnedFd) -> Result<Option<HandedBack>> {
        let lock = self.lock.as_deref();
        lock.map(|lock| lock.hand_back(kept)).transpose()
    }

    fn scope(&self, offset: u64) -> Range<u64> {
        let cluster = self.cluster_size().cluster_at(offset);
        self.cluster_size().byte_range(cluster.only())
    }

    fn resolve(
        &self,
        offset: u64,
        access: Access,
        claim: &mut Claim,
        scratch: &mut Scratch,
    ) -> Result<Answer> {
        let cluster = self.cluster_size().cluster_at(offset);
        let image = self.image();
        match (image.source(cluster)?, access) {
            (Source::Active, _) => self.map_data(&image, cluster, claim),
            (source, Access::Write) => {
                self.make_writable(&image, (cluster, source), claim, scratch)
            }
            (_, Access::Read) => {
                let start = offset / self.unit() * self.unit();
                Ok(Answer::Copy(start..start + self.unit()))
            }
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.image().read(offset, buf)
    }

    fn file(&self, _: FileKey) -> Arc<dyn File> {
        self.image().active().share_data_file()
    }

    fn mappable_bytes(&self, _: FileKey) -> u64 {
        self.size()
    }

    fn is_low_on_space(&self) -> bool {
        self.image().active().is_low_on_space()
    }

    fn prepare(&self, bytes: Range<u64>) -> Result<()> {
        let run = self.cluster_size().covering(&bytes);
        let mut start = run.start;
        let image = self.image();
        for group in image.sources(run)?.chunk_by(|a, b| a == b) {
            let end = start + u64::try_from(group.len()).unwrap_or(u64::MAX);
            if group[0] == Source::Nobody {
                image.active().prepare(ClusterRange::new(start, end))?;
            }
            start = end;
        }
        Ok(())
    }

    fn give_back(&self) -> Result<()> {
        self.image().active().give_back_prepared()
    }

    fn note_maybe_clean(&self, bytes: &Range<u64>) {
        self.maybe_clean().insert(bytes);
    }

    fn take_maybe_clean(&self) -> Option<Range<u64>> {
        self.maybe_clean().take(CLEAN_BYTES)
    }

    fn maybe_clean_bytes(&self) -> u64 {
        self.maybe_clean().bytes()
    }

    fn forget_maybe_clean(&self) {
        *self.maybe_clean() = MaybeClean::default();
    }

    fn give_back_clean(&self, bytes: Range<u64>, deadline: Instant) -> Result<Option<u64>> {
        // It syncs words, which waits for a flush otherwise, and holds up nobody who needs the image for itself.
        let Some(_no_flush) = self.flushing.take_briefly_by(deadline) else {
            return Ok(None);
        };
        let run = self.cluster_size().covering(&bytes);
        let clusters = self.image().give_back_clean(run)?;
        Ok(Some(clusters << self.cluster_size().bits()))
    }

    fn flush(&self) -> Result<()> {
        let _turn = self.flushing.take();
        self.image().flush()
    }

    fn waits_for_flush(&self, deadline: Instant) -> bool {
        self.flushing.take_briefly_by(deadline).is_some()
    }
}
