// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A walk over a chain from front to back, at the cost of what it holds: where no layer's map has a page, and where a
//! data file has none, nothing is read. A disk of 8 TiB that holds nothing is one step.

use std::io;
use std::ops::Range;

use super::{Chain, Content, Extent, GRANULES_PER_BLOCK, Owner, run_at};
use crate::error::{IoContext, Result};
use crate::map;
use crate::medium::File;
use crate::units::{self, Cluster};

/// What a file is known to hold around the place that was asked for last.
#[derive(Debug, Clone, Default)]
struct Known {
    from: u64,
    data: Range<u64>,
}

impl Known {
    /// Where the first data at or after `at` is; `None` if there is none.
    fn next_data(&mut self, file: &dyn File, at: u64) -> io::Result<Option<Range<u64>>> {
        if at < self.from || at >= self.data.end {
            self.data = file.next_data(at)?.unwrap_or(u64::MAX..u64::MAX);
            self.from = at;
        }
        Ok((self.data.start < u64::MAX).then(|| self.data.clone()))
    }
}

/// A walk over what a chain shows. Offsets that are asked for may come in any order; ascending ones are cheap.
#[derive(Debug)]
pub struct Walk<'a> {
    chain: &'a Chain,
    end: u64,
    maps: Vec<Known>,
    files: Vec<Known>,
}

/// A piece of the disk, and where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The bytes, as offsets on the disk.
    pub bytes: Range<u64>,
    /// The depth of the layer in whose data file they are; `None` if they are zeros without storage.
    pub depth: Option<usize>,
}

impl Chain {
    /// Walks the first `size` bytes.
    pub fn walk(&self, size: u64) -> Walk<'_> {
        Walk {
            chain: self,
            end: size,
            maps: vec![Known::default(); self.layers.len()],
            files: vec![Known::default(); self.layers.len()],
        }
    }
}

impl Walk<'_> {
    /// Who has the byte at `at`, and how far that is known to go on. Neighbours may have the same owner.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if a map cannot be read.
    pub fn extent(&mut self, at: u64) -> Result<Extent> {
        let mut end = self.end;
        for depth in 0..self.chain.layers.len() {
            let limit = self.chain.limits[depth];
            if at >= limit {
                // Nor does anything below show here: limits only shrink on the way down.
                break;
            }
            let silent = self.silent_until(depth, at)?;
            match silent {
                // A raw file has all of its bytes.
                None => {
                    return Ok(Extent {
                        bytes: at..end.min(limit),
                        owner: Owner::Layer(depth),
                    });
                }
                Some(until) if until <= at => return self.extent_in_block(at),
                Some(until) => end = end.min(until),
            }
        }
        Ok(Extent {
            bytes: at..end,
            owner: Owner::Nobody,
        })
    }

    /// Up to where the layer at `depth` says nothing, from `at` on; `None` for a raw file, which has no map.
    fn silent_until(&mut self, depth: usize, at: u64) -> Result<Option<u64>> {
        let layer = &self.chain.layers[depth];
        let Content::Pcow { map, .. } = &layer.content else {
            return Ok(None);
        };
        let word = map::word_of(layer.cluster.cluster_at(at));
        let data = self.maps[depth]
            .next_data(map.as_ref(), map::word_offset(word))
            .context(|| format!("cannot read the map of layer {}", layer.name))?;
        let Some(data) = data else {
            return Ok(Some(u64::MAX));
        };
        let first = data.start.saturating_sub(map::WORDS_OFFSET) / 8;
        if first <= word {
            return Ok(Some(at));
        }
        let cluster = Cluster(first * map::CLUSTERS_PER_WORD);
        Ok(Some(layer.cluster.offset_of(cluster)))
    }

    fn extent_in_block(&self, at: u64) -> Result<Extent> {
        let granule = self.chain.granule.cluster_at(at).0;
        let per_block = units::bytes(GRANULES_PER_BLOCK);
        let block = granule / per_block;
        let owners = self.chain.block(block)?;
        let (owner, count) = run_at(&owners, units::len(granule - block * per_block));
        let end = self.chain.granule.offset_of(Cluster(granule + count));
        Ok(Extent {
            bytes: at..end.min(self.end),
            owner,
        })
    }

    /// As [`Walk::extent`], with the holes of data files told apart from what they hold.
    ///
    /// # Errors
    /// As [`Walk::extent`], and if a data file cannot be looked at.
    pub fn piece(&mut self, at: u64) -> Result<Piece> {
        let extent = self.extent(at)?;
        let Owner::Layer(depth) = extent.owner else {
            return Ok(Piece {
                bytes: extent.bytes,
                depth: None,
            });
        };
        let layer = &self.chain.layers[depth];
        let data = self.files[depth]
            .next_data(layer.data(), at)
            .context(|| format!("cannot look for data in layer {}", layer.name))?;
        let end = extent.bytes.end;
        Ok(match data {
            Some(data) if data.start <= at => Piece {
                bytes: at..end.min(data.end),
                depth: Some(depth),
            },
            hole => Piece {
                bytes: at..hole.map_or(end, |data| end.min(data.start)),
                depth: None,
            },
        })
    }
}
