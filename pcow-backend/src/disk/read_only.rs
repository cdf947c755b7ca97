// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image served for reading only: the data of its layers is mapped where it lies; only zeros, and pages that no
//! file has whole, are copied.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use pcow_format::chain::{Chain, Owner};
use pcow_format::medium::{Domain, File};
use pcow_format::{Error, ErrorKind, HandedBack, ImageLock, Result, Stored};

use super::{Access, Answer, Continuation, Disk, FileKey, Scratch};
use crate::service::board::Claim;

const UNIT_BYTES: u64 = 64 << 10;
/// How far around a fault one layer's data is looked for.
const RUN_BYTES: u64 = 4 << 20;
const PAGE_BYTES: u64 = 4096;

/// The image: its whole chain, and the lock that keeps writers out.
#[derive(Debug)]
pub struct ReadOnlyDisk {
    chain: Chain,
    size: u64,
    identity: ([u8; 16], [u8; 16]),
    dax: bool,
    lock: Option<ImageLock>,
}

impl ReadOnlyDisk {
    /// Serves `stored`, which was read under `lock`.
    ///
    /// # Errors
    /// What opening the chain may fail with.
    pub fn new(stored: &Stored, lock: Option<ImageLock>) -> Result<Self> {
        let root = stored.root();
        let chain = stored.chain(root.active)?;
        let mut dax = true;
        for depth in 0..chain.depth() {
            dax &= domain(chain.data_file(depth))? == Domain::Dax;
        }
        Ok(Self {
            size: root.active_layer()?.virtual_size,
            identity: (root.uuid.into_bytes(), root.active.into_bytes()),
            chain,
            dax,
            lock,
        })
    }

    fn extent_around(&self, offset: u64) -> Result<(Range<u64>, Owner)> {
        let start = (offset / RUN_BYTES * RUN_BYTES).min(offset);
        let end = (start + RUN_BYTES).min(self.size);
        let extents = self.chain.extents(start..end)?;
        extents
            .into_iter()
            .find(|e| e.bytes.contains(&offset))
            .map(|e| (e.bytes, e.owner))
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, "a fault past the end of the disk"))
    }
}

fn domain(file: &dyn File) -> Result<Domain> {
    file.domain()
        .map_err(|e| Error::new(ErrorKind::Io, "cannot tell the persistence domain").caused_by(e))
}

impl Disk for ReadOnlyDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn unit(&self) -> u64 {
        UNIT_BYTES
    }

    fn read_only(&self) -> bool {
        true
    }

    fn is_dax(&self) -> bool {
        self.dax
    }

    fn identity(&self) -> ([u8; 16], [u8; 16]) {
        self.identity
    }

    fn lock(&self) -> Option<&std::fs::File> {
        self.lock.as_ref().and_then(ImageLock::in_use)
    }

    fn continuation(&self, layer: [u8; 16]) -> Result<Continuation> {
        Ok(if self.identity.1 == layer {
            Continuation::Same
        } else {
            Continuation::Changed
        })
    }

    fn is_low_on_space(&self) -> bool {
        false
    }

    fn hand_back(&self, _: OwnedFd) -> Result<Option<HandedBack>> {
        Ok(None)
    }

    fn scope(&self, offset: u64) -> Range<u64> {
        let start = offset / UNIT_BYTES * UNIT_BYTES;
        start..start + UNIT_BYTES
    }

    fn resolve(
        &self,
        offset: u64,
        _: Access,
        claim: &mut Claim,
        _: &mut Scratch,
    ) -> Result<Answer> {
        let (bytes, owner) = self.extent_around(offset)?;
        let mut start = bytes.start;
        if let Owner::Layer(depth) = owner {
            let file = FileKey::Layer(depth);
            let end = bytes.end.min(self.mappable_bytes(file));
            if offset < end {
                let bytes = claim.extend(start..end);
                return Ok(Answer::Map {
                    bytes,
                    file,
                    fresh: false,
                });
            }
            start = start.max(end);
        }
        // Only this extent: a copy must not reach into a neighbour that may be mapped.
        let unit = self.scope(offset);
        Ok(Answer::Copy(start.max(unit.start)..bytes.end.min(unit.end)))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.chain.read(offset, buf)
    }

    fn file(&self, key: FileKey) -> Arc<dyn File> {
        match key {
            FileKey::Active => self.chain.share_data_file(0),
            FileKey::Layer(depth) => self.chain.share_data_file(depth),
        }
    }

    fn mappable_bytes(&self, key: FileKey) -> u64 {
        let bytes = match key {
            FileKey::Active => self.chain.data_bytes(0),
            FileKey::Layer(depth) => self.chain.data_bytes(depth),
        };
        bytes / PAGE_BYTES * PAGE_BYTES
    }

    fn prepare(&self, _: Range<u64>) -> Result<()> {
        Ok(())
    }

    fn give_back(&self) -> Result<()> {
        Ok(())
    }

    fn note_maybe_clean(&self, _: &Range<u64>) {}

    fn take_maybe_clean(&self) -> Option<Range<u64>> {
        None
    }

    fn maybe_clean_bytes(&self) -> u64 {
        0
    }

    fn forget_maybe_clean(&self) {}

    fn give_back_clean(&self, _: Range<u64>, _: Instant) -> Result<Option<u64>> {
        Ok(Some(0))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn waits_for_flush(&self, _: Instant) -> bool {
        true
    }
}
