// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a frontend has of its first session for life, and what another backend must agree with (`protocol.md` section 6.1).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::fstat;

use super::attach::Offer;
use crate::error::{Error, ErrorKind, Result};
use crate::wire::{self, FEATURE_RESET, Held, Region};

/// The image behind the region, and its lock.
#[derive(Debug)]
pub(super) struct Kept {
    /// The region as it is offered by the present backend, or was by the last.
    offered: Mutex<Region>,
    lock: Option<OwnedFd>,
}

impl Kept {
    /// From the first offer.
    pub(super) fn new(region: Region, lock: Option<OwnedFd>) -> Self {
        Self {
            offered: Mutex::new(region),
            lock,
        }
    }

    /// The region as it was offered last.
    pub(super) fn region(&self) -> Region {
        *self.offered()
    }

    /// Whether nothing may store into it. Never changes.
    pub(super) fn is_read_only(&self) -> bool {
        self.region().flags & wire::REGION_READ_ONLY != 0
    }

    /// The lock to hand back, with what it is the lock of. What locks a read-only image is shared, and stays here.
    pub(super) fn held(&self) -> Option<(Held, &OwnedFd)> {
        let region = self.region();
        let held = Held {
            image: region.image,
            layer: region.layer,
            ..Held::default()
        };
        let lock = self.lock.as_ref().filter(|_| !self.is_read_only());
        lock.map(|lock| (held, lock))
    }

    /// Another layer is active from now on.
    pub(super) fn note_layer(&self, layer: [u8; 16]) {
        self.offered().layer = layer;
    }

    /// The offer of another backend was taken.
    pub(super) fn note(&self, region: Region) {
        *self.offered() = region;
    }

    /// Whether a backend that offers this can go on with the region.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`], saying in what.
    pub(super) fn check(&self, offer: &Offer, features: u64) -> Result<()> {
        let (old, new) = (self.region(), &offer.region);
        let read_only = |region: &Region| region.flags & wire::REGION_READ_ONLY;
        let mismatch = |what: &str| Err(Error::new(ErrorKind::Mismatch, what));
        if new.image != old.image {
            return mismatch("it serves another image");
        }
        if new.size != old.size || new.alignment != old.alignment {
            return mismatch("its image has another size");
        }
        if read_only(new) != read_only(&old) {
            return mismatch(
                "it serves the image for reading where it was for writing, or the reverse",
            );
        }
        if let (Some(kept), Some(offered)) = (&self.lock, &offer.lock)
            && !is_same_file(kept, offered)?
        {
            return mismatch("it serves a copy of the image");
        }
        if self.held().is_some() && features & FEATURE_RESET == 0 {
            return mismatch("it cannot take the image's lock back");
        }
        Ok(())
    }

    fn offered(&self) -> MutexGuard<'_, Region> {
        // It is replaced as a whole.
        self.offered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_same_file(a: impl AsFd, b: impl AsFd) -> Result<bool> {
    let context = |e| Error::io("look at the image's lock", e);
    let (a, b) = (fstat(a).map_err(context)?, fstat(b).map_err(context)?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}
