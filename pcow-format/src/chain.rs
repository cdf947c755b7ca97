// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a stack of layers shows: which layer owns each byte, and the bytes themselves. Never writes.
//!
//! Layers may differ in cluster size and length, so ownership is worked out in *granules*, the smallest cluster of the
//! stack. A block of 2,048 granules is resolved at once and remembered: layers of a chain never change (I0), so what
//! is remembered never becomes wrong.

mod walk;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::map::{self, State, Word};
use crate::medium::{File, read_exact_at};
use crate::units::{self, Cluster, ClusterSize, MAX_CLUSTER_BYTES};

pub use walk::{Piece, Walk};

const GRANULES_PER_BLOCK: usize = 2048;
/// Blocks remembered at most: 16,384 of 4 KiB.
const MAX_BLOCKS: usize = 16_384;
/// No layer owns the granule: it reads zero.
const NOBODY: u16 = u16::MAX;

/// One layer of a chain, open for reading.
#[derive(Debug)]
pub struct Layer {
    pub(crate) name: String,
    pub(crate) cluster: ClusterSize,
    pub(crate) virtual_bytes: u64,
    pub(crate) clip: u64,
    pub(crate) content: Content,
}

/// Where a layer's bytes are.
#[derive(Debug)]
pub(crate) enum Content {
    /// A map and a data file.
    Pcow {
        map: Arc<dyn File>,
        data: Arc<dyn File>,
        /// Whether live words count as data (an active layer looked at in its own boot).
        live_is_data: bool,
    },
    /// A file whose every byte is data, zeros after its end.
    Raw { file: Arc<dyn File>, bytes: u64 },
}

impl Layer {
    fn data(&self) -> &dyn File {
        match &self.content {
            Content::Pcow { data, .. } => data.as_ref(),
            Content::Raw { file, .. } => file.as_ref(),
        }
    }

    /// The states of the clusters that cover `range`, the first one included.
    fn states(&self, range: &Range<u64>) -> Result<LayerStates> {
        let Content::Pcow {
            map, live_is_data, ..
        } = &self.content
        else {
            return Ok(LayerStates::AllData);
        };
        let run = self.cluster.covering(range);
        let first = map::word_of(Cluster(run.start));
        let count = map::word_of(Cluster(run.end - 1)) + 1 - first;
        let mut raw = vec![0; units::len(count * 8)];
        read_exact_at(map.as_ref(), &mut raw, map::word_offset(first))
            .context(|| format!("cannot read the map of layer {}", self.name))?;
        if raw.iter().all(|b| *b == 0) {
            return Ok(LayerStates::AllAbsent);
        }
        let words = raw
            .as_chunks::<8>()
            .0
            .iter()
            .map(|c| Word(u64::from_le_bytes(*c)))
            .collect();
        Ok(LayerStates::Words {
            first,
            words,
            live_is_data: *live_is_data,
        })
    }
}

enum LayerStates {
    AllAbsent,
    AllData,
    Words {
        first: u64,
        words: Vec<Word>,
        live_is_data: bool,
    },
}

impl LayerStates {
    fn get(&self, cluster: Cluster) -> State {
        match self {
            LayerStates::AllAbsent => State::Absent,
            LayerStates::AllData => State::Data,
            LayerStates::Words {
                first,
                words,
                live_is_data,
            } => {
                let word = words[units::len(map::word_of(cluster) - first)];
                match word.get(map::slot_of(cluster)) {
                    State::Live if *live_is_data => State::Data,
                    State::Live => State::Absent,
                    state => state,
                }
            }
        }
    }
}

/// Who a piece of the disk belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Reads zero: no layer has it, or one says zero.
    Nobody,
    /// The layer at this depth of the chain, 0 on top.
    Layer(usize),
}

/// A piece of the disk with one owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// The bytes, as offsets on the disk.
    pub bytes: Range<u64>,
    /// Who has them.
    pub owner: Owner,
}

#[derive(Debug, Default)]
struct Remembered {
    blocks: HashMap<u64, Arc<[u16]>>,
    order: VecDeque<u64>,
}

/// A stack of layers open for reading, the top one first. May be empty: then everything reads zero.
#[derive(Debug)]
pub struct Chain {
    /// Shared with the chains that lie on this one.
    layers: Vec<Arc<Layer>>,
    /// How many bytes of each layer show through those above it.
    limits: Vec<u64>,
    granule: ClusterSize,
    remembered: Mutex<Remembered>,
}

impl Chain {
    /// A chain of which `clip` bytes show; `finest` is the smallest unit in which it will be asked.
    pub(crate) fn new(layers: Vec<Layer>, clip: u64, finest: ClusterSize) -> Self {
        Self::of(layers.into_iter().map(Arc::new).collect(), clip, finest)
    }

    /// `top` on the layers of `below`, without opening those again. Remembers nothing yet: what `below` remembers is not
    /// what this chain shows.
    pub(crate) fn stacked(top: Layer, below: &Self, clip: u64, finest: ClusterSize) -> Self {
        let layers = std::iter::once(Arc::new(top)).chain(below.layers.iter().cloned());
        Self::of(layers.collect(), clip, finest)
    }

    fn of(layers: Vec<Arc<Layer>>, clip: u64, finest: ClusterSize) -> Self {
        let mut visible = clip;
        let mut limits = Vec::with_capacity(layers.len());
        for layer in &layers {
            visible = visible.min(layer.virtual_bytes);
            limits.push(visible);
            visible = visible.min(layer.clip);
        }
        let granule = layers.iter().map(|l| l.cluster).fold(finest, Ord::min);
        Self {
            layers,
            limits,
            granule,
            remembered: Mutex::default(),
        }
    }

    /// How many layers there are.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// The data file of the layer at `depth`, to be mapped for reading.
    pub fn data_file(&self, depth: usize) -> &dyn File {
        self.layers[depth].data()
    }

    /// As [`Chain::data_file`], to be kept.
    pub fn share_data_file(&self, depth: usize) -> Arc<dyn File> {
        match &self.layers[depth].content {
            Content::Pcow { data, .. } => Arc::clone(data),
            Content::Raw { file, .. } => Arc::clone(file),
        }
    }

    /// How many bytes of the data file at `depth` exist for mapping.
    pub fn data_bytes(&self, depth: usize) -> u64 {
        match &self.layers[depth].content {
            Content::Pcow { .. } => self.layers[depth].virtual_bytes,
            Content::Raw { bytes, .. } => *bytes,
        }
    }

    /// The owners of `range`, in order, neighbours with one owner joined.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if a map cannot be read.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let block = self.granule.cluster_at(at).0 / units::bytes(GRANULES_PER_BLOCK);
            let first = block * units::bytes(GRANULES_PER_BLOCK);
            let end = self
                .granule
                .offset_of(Cluster(first + units::bytes(GRANULES_PER_BLOCK)));
            let piece = at..end.min(range.end);
            self.block_extents(block, &piece, &mut extents)?;
            at = piece.end;
        }
        Ok(extents)
    }

    /// Appends the owners of `piece`, which lies in one block.
    fn block_extents(
        &self,
        block: u64,
        piece: &Range<u64>,
        extents: &mut Vec<Extent>,
    ) -> Result<()> {
        let owners = (!self.layers.is_empty())
            .then(|| self.block(block))
            .transpose()?;
        let first = block * units::bytes(GRANULES_PER_BLOCK);
        let mut at = piece.start;
        while at < piece.end {
            let granule = self.granule.cluster_at(at).0;
            let (owner, end) = owners
                .as_deref()
                .map_or((Owner::Nobody, piece.end), |owners| {
                    let (owner, count) = run_at(owners, units::len(granule - first));
                    (
                        owner,
                        self.granule
                            .offset_of(Cluster(granule + count))
                            .min(piece.end),
                    )
                });
            match extents.last_mut() {
                Some(last) if last.owner == owner => last.bytes.end = end,
                _ => extents.push(Extent {
                    bytes: at..end,
                    owner,
                }),
            }
            at = end;
        }
        Ok(())
    }

    /// Whether every byte of `range` reads zero without any layer holding it.
    ///
    /// # Errors
    /// As [`Chain::extents`].
    pub fn is_nobodys(&self, range: Range<u64>) -> Result<bool> {
        if self.layers.is_empty() {
            return Ok(true);
        }
        Ok(self
            .extents(range)?
            .iter()
            .all(|e| e.owner == Owner::Nobody))
    }

    /// Reads what the chain shows at `offset`.
    ///
    /// # Errors
    /// `Io` if a file cannot be read, `Corrupt` if one is too short.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = offset..offset + units::bytes(buf.len());
        for extent in self.extents(range)? {
            let piece =
                units::len(extent.bytes.start - offset)..units::len(extent.bytes.end - offset);
            self.read_extent(&extent, &mut buf[piece])?;
        }
        Ok(())
    }

    fn read_extent(&self, extent: &Extent, buf: &mut [u8]) -> Result<()> {
        let Owner::Layer(depth) = extent.owner else {
            buf.fill(0);
            return Ok(());
        };
        let layer = &self.layers[depth];
        let context = || format!("cannot read the data of layer {}", layer.name);
        let done = layer
            .data()
            .read_at(buf, extent.bytes.start)
            .context(context)?;
        if done < buf.len() && !matches!(layer.content, Content::Raw { .. }) {
            let what = format!("the data file of layer {} is too short", layer.name);
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        buf[done..].fill(0);
        Ok(())
    }

    fn block(&self, number: u64) -> Result<Arc<[u16]>> {
        if let Some(known) = self.lock().blocks.get(&number) {
            return Ok(Arc::clone(known));
        }
        // Two threads may resolve the same block at once; both come to the same answer.
        let resolved: Arc<[u16]> = self.resolve_block(number)?.into();
        let mut remembered = self.lock();
        if remembered
            .blocks
            .insert(number, Arc::clone(&resolved))
            .is_none()
        {
            remembered.order.push_back(number);
        }
        if remembered.order.len() > MAX_BLOCKS
            && let Some(oldest) = remembered.order.pop_front()
        {
            remembered.blocks.remove(&oldest);
        }
        Ok(resolved)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Remembered> {
        // Each critical section leaves the cache consistent even if a later one panics.
        self.remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn resolve_block(&self, number: u64) -> Result<Vec<u16>> {
        let mut owners = vec![NOBODY; GRANULES_PER_BLOCK];
        let first = number * units::bytes(GRANULES_PER_BLOCK);
        let start = self.granule.offset_of(Cluster(first));
        let block_end = self
            .granule
            .offset_of(Cluster(first + units::bytes(GRANULES_PER_BLOCK)));
        // What does not show through the first layer shows through none.
        let shown = self.limits.first().map_or(start, |l| block_end.min(*l));
        let shown = self.granule.clusters_in(shown.saturating_sub(start));
        let mut open: Vec<usize> = (0..units::len(shown)).collect();
        for (depth, layer) in self.layers.iter().enumerate() {
            let end = block_end.min(self.limits[depth]);
            if open.is_empty() || start >= end {
                break;
            }
            let states = layer.states(&(start..end))?;
            if matches!(states, LayerStates::AllAbsent) {
                continue;
            }
            let depth = u16::try_from(depth)
                .map_err(|_| Error::new(ErrorKind::Corrupt, "the chain has too many layers"))?;
            open.retain(|place| {
                let offset = self
                    .granule
                    .offset_of(Cluster(first + units::bytes(*place)));
                if offset >= end {
                    return false;
                }
                match states.get(layer.cluster.cluster_at(offset)) {
                    State::Absent => return true,
                    State::Zero => {}
                    State::Data | State::Live => owners[*place] = depth,
                }
                false
            });
        }
        Ok(owners)
    }
}

/// The owner at `place`, and for how many granules it goes on.
fn run_at(owners: &[u16], place: usize) -> (Owner, u64) {
    let raw = owners[place];
    let count = owners[place..].iter().take_while(|o| **o == raw).count();
    let owner = match raw {
        NOBODY => Owner::Nobody,
        depth => Owner::Layer(usize::from(depth)),
    };
    (owner, units::bytes(count))
}

// The layer's number must fit beside NOBODY.
const _: () = assert!(crate::root::MAX_DEPTH < NOBODY as usize);
// A block of the coarsest granules stays far below the address space.
const _: () = assert!(
    MAX_CLUSTER_BYTES
        .checked_mul(GRANULES_PER_BLOCK as u64)
        .is_some()
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::medium::{Access, Directory, Site, real::RealDirectory};
    use crate::units::{ClusterRange, VirtualSize};

    const SITE: Site = Site("test");

    /// A layer whose `data` clusters hold the byte `fill` and whose `zero` clusters say zero.
    fn layer(
        dir: &RealDirectory,
        name: &str,
        cluster: u64,
        (size, clip): (u64, u64),
        data: &[u64],
        zero: &[u64],
    ) -> Layer {
        let fill = name.as_bytes()[0];
        let cluster = ClusterSize::new(cluster).unwrap();
        let map = dir.create(SITE, &format!("{name}.map")).unwrap();
        let bytes = map::file_bytes(VirtualSize::new(size).unwrap(), cluster);
        map.set_len(SITE, bytes).unwrap();
        let file = dir.create(SITE, &format!("{name}.data")).unwrap();
        file.set_len(SITE, size).unwrap();
        let marks = data.iter().map(|c| (*c, State::Data));
        for (c, state) in marks.chain(zero.iter().map(|c| (*c, State::Zero))) {
            let at = map::word_offset(map::word_of(Cluster(c)));
            let mut raw = [0; 8];
            map.read_at(&mut raw, at).unwrap();
            let word = Word(u64::from_le_bytes(raw)).with(map::slot_of(Cluster(c)), state);
            map.write_at(SITE, &word.0.to_le_bytes(), at).unwrap();
            if state == State::Data {
                let range = cluster.byte_range(ClusterRange::new(c, c + 1));
                let content = vec![fill; units::len(cluster.bytes())];
                file.write_at(SITE, &content, range.start).unwrap();
            }
        }
        Layer {
            name: name.into(),
            cluster,
            virtual_bytes: size,
            clip,
            content: Content::Pcow {
                map: dir.open(&format!("{name}.map"), Access::Read).unwrap(),
                data: file,
                live_is_data: false,
            },
        }
    }

    fn byte(chain: &Chain, offset: u64) -> u8 {
        let mut buf = [0xee];
        chain.read(offset, &mut buf).unwrap();
        buf[0]
    }

    #[test]
    fn the_topmost_layer_that_speaks_wins_and_zero_hides_what_is_below() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = RealDirectory::open(tmp.path()).unwrap();
        let m4 = (4 << 20, 4 << 20);
        let a = layer(&dir, "a", 65536, m4, &[1], &[2]);
        let b = layer(&dir, "b", 4096, m4, &[16, 32, 33, 64], &[]);
        let chain = Chain::new(vec![a, b], 4 << 20, ClusterSize::new(65536).unwrap());
        assert_eq!(byte(&chain, 65536), b'a');
        assert_eq!(
            byte(&chain, 2 * 65536),
            0,
            "zero hides b's clusters 32 and 33"
        );
        assert_eq!(byte(&chain, 64 * 4096), b'b');
        assert_eq!(byte(&chain, 65 * 4096), 0);
        let extents = chain.extents(0x4_0000..0x4_2000).unwrap();
        assert_eq!(extents.len(), 2, "{extents:?}");
    }

    #[test]
    fn a_clipped_parent_and_a_smaller_base_read_zero_past_their_end() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = RealDirectory::open(tmp.path()).unwrap();
        let top = layer(&dir, "a", 65536, (8 << 20, 2 << 20), &[], &[]);
        let base = layer(&dir, "b", 65536, (4 << 20, 0), &[0, 31, 32, 63], &[]);
        let chain = Chain::new(vec![top, base], 8 << 20, ClusterSize::new(65536).unwrap());
        assert_eq!(byte(&chain, 31 * 65536), b'b');
        assert_eq!(byte(&chain, 32 * 65536), 0, "past the clip");
        assert_eq!(byte(&chain, 6 << 20), 0, "past the base's end");
    }
}
