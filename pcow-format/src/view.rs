// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an image shows at a snapshot, or now: a disk to be read from. Never writes.

use std::ops::Range;

use uuid::Uuid;

use crate::chain::{Chain, Owner, Walk};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Stored;
use crate::units;

/// A disk as the layer on top of a chain shows it.
#[derive(Debug)]
pub struct View {
    chain: Chain,
    size: u64,
    /// The layers, and whether they are sealed.
    layers: Vec<(Uuid, bool)>,
}

impl Stored {
    /// What `top` and the layers below it show.
    ///
    /// # Errors
    /// As [`Stored::chain`].
    pub fn view(&self, top: Uuid) -> Result<View> {
        let records = self.root().chain(top)?;
        Ok(View {
            size: records[0].virtual_size,
            layers: records.iter().map(|l| (l.uuid, l.sealed)).collect(),
            chain: self.chain(top)?,
        })
    }

    /// Calls `visit` with the pieces of the disk that `top` shows, neighbours of one owner joined: the bytes, and the depth
    /// of the layer that has them, `None` for zeros. Costs as much as the image holds, however large the disk is.
    ///
    /// # Errors
    /// As [`Stored::chain`], and what `visit` returns.
    pub fn for_each_extent(
        &self,
        top: Uuid,
        visit: &mut dyn FnMut(Range<u64>, Option<usize>) -> Result<()>,
    ) -> Result<()> {
        let view = self.view(top)?;
        let mut walk = view.walk();
        let mut pending: Option<(Range<u64>, Option<usize>)> = None;
        let mut at = 0;
        while at < view.size {
            let extent = walk.extent(at)?;
            at = extent.bytes.end;
            let depth = match extent.owner {
                Owner::Nobody => None,
                Owner::Layer(depth) => Some(depth),
            };
            match &mut pending {
                Some((bytes, owner)) if *owner == depth => bytes.end = at,
                _ => {
                    if let Some((bytes, owner)) = pending.replace((extent.bytes, depth)) {
                        visit(bytes, owner)?;
                    }
                }
            }
        }
        pending.map_or(Ok(()), |(bytes, owner)| visit(bytes, owner))
    }
}

impl View {
    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The layers, the top one first.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// The layer at `depth` if it is sealed: its name is its content then, in any image (I0).
    pub fn sealed_layer(&self, depth: usize) -> Option<Uuid> {
        let (layer, sealed) = self.layers[depth];
        sealed.then_some(layer)
    }

    /// Goes through the disk piece by piece.
    pub fn walk(&self) -> Walk<'_> {
        self.chain.walk(self.size)
    }

    /// Reads what the disk shows at `offset`.
    ///
    /// # Errors
    /// `InvalidArgument` past the end; `Io` or `Corrupt`.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size, offset, units::bytes(buf.len()))?;
        self.chain.read(offset, buf)
    }
}

/// Whether `length` bytes at `offset` lie on a disk of `size` bytes.
pub(crate) fn check_range(size: u64, offset: u64, length: u64) -> Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => {
            let what = format!(
                "{length} bytes at offset {offset} are not on the disk, which has {size} bytes"
            );
            Err(Error::new(ErrorKind::InvalidArgument, what))
        }
    }
}
