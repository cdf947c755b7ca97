// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The layout of a `.map` file: header, boot tag and two bits per cluster. Pure: bytes in, values out.
//!
//! ```text
//! 0     header   what was true when the layer was made, with a checksum; never changes
//! 1024  tag      which boot, and which file, the live words belong to, with a checksum
//! 4096  words    little-endian u64; word w speaks of clusters 32w to 32w+31, the lowest two bits of the first
//! ```

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::medium::Identity;
use crate::units::{Cluster, ClusterRange, ClusterSize, VirtualSize};

/// First bytes of every map file.
pub const MAGIC: [u8; 8] = *b"PCOWMAP\0";
/// Version of this layout.
pub const VERSION: u32 = 1;
/// Offset of the version (u32).
pub const VERSION_OFFSET: usize = MAGIC_OFFSET + 8;
/// Offset of the magic.
pub const MAGIC_OFFSET: usize = 0;
/// Offset of the header's checksum (u32): CRC-32C of bytes 0 to 1023 with this field zero.
pub const CHECKSUM_OFFSET: usize = VERSION_OFFSET + 4;
/// Offset of the layer's UUID.
pub const LAYER_OFFSET: usize = CHECKSUM_OFFSET + 4;
/// Offset of the parent's UUID; all zero where there is none.
pub const PARENT_OFFSET: usize = LAYER_OFFSET + 16;
/// Offset of the UUID of the image in which the layer was made.
pub const IMAGE_OFFSET: usize = PARENT_OFFSET + 16;
/// Offset of the virtual size in bytes (u64).
pub const SIZE_OFFSET: usize = IMAGE_OFFSET + 16;
/// Offset of the cluster size in bytes (u64).
pub const CLUSTER_SIZE_OFFSET: usize = SIZE_OFFSET + 8;
/// Offset of the clip in bytes (u64).
pub const CLIP_OFFSET: usize = CLUSTER_SIZE_OFFSET + 8;
/// Bytes that the header's checksum covers.
pub const HEADER_BYTES: usize = 1024;
/// Offset of the boot tag in the file.
pub const TAG_OFFSET: u64 = 1024;
/// Size of the boot tag: boot id (16), inode (u64), birth time in ns (u64), CRC-32C of those (u32), zero (u32).
pub const TAG_BYTES: usize = 40;
/// Offset of the first word in the file.
pub const WORDS_OFFSET: u64 = 4096;
/// Clusters per word.
pub const CLUSTERS_PER_WORD: u64 = 32;

const _: () = assert!(CLIP_OFFSET + 8 == 88 && CLIP_OFFSET + 8 <= HEADER_BYTES);
const _: () = assert!(
    HEADER_BYTES + TAG_BYTES <= 4096
        && TAG_OFFSET == 1024
        && HEADER_BYTES == 1024
        && WORDS_OFFSET == 4096
);

/// What a layer says of one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// 00: look in the parent.
    Absent,
    /// 01: the bytes are in this layer's data file, durable.
    Data,
    /// 10: reads zero, whatever the parent holds.
    Zero,
    /// 11: data, but only for as long as this boot lasts.
    Live,
}

impl State {
    fn from_bits(bits: u64) -> Self {
        match bits & 0b11 {
            0b00 => State::Absent,
            0b01 => State::Data,
            0b10 => State::Zero,
            _ => State::Live,
        }
    }

    fn bits(self) -> u64 {
        match self {
            State::Absent => 0b00,
            State::Data => 0b01,
            State::Zero => 0b10,
            State::Live => 0b11,
        }
    }

    /// Whether the bytes are in this layer's data file.
    pub fn is_data(self) -> bool {
        matches!(self, State::Data | State::Live)
    }
}

/// The states of 32 neighbouring clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Word(pub u64);

impl Word {
    /// State of the cluster at `slot` (0 to 31).
    pub fn get(self, slot: u64) -> State {
        State::from_bits(self.0 >> (2 * slot))
    }

    /// The word with the cluster at `slot` in another state.
    #[must_use]
    pub fn with(self, slot: u64, state: State) -> Self {
        Self(self.0 & !(0b11 << (2 * slot)) | state.bits() << (2 * slot))
    }

    /// The low bit of each live (11) cluster.
    fn live_mask(self) -> u64 {
        const LOW: u64 = 0x5555_5555_5555_5555;
        self.0 & (self.0 >> 1) & LOW
    }

    /// Whether any cluster is live.
    pub fn has_live(self) -> bool {
        self.live_mask() != 0
    }

    /// The word with those clusters that are live both here and in `noted` turned into durable data.
    #[must_use]
    pub fn settle(self, noted: Word) -> Self {
        Self(self.0 & !((self.live_mask() & noted.live_mask()) << 1))
    }

    /// The word with live clusters turned into absent ones, and how many those were.
    pub fn discard_live(self) -> (Self, u32) {
        let live = self.live_mask();
        (Self(self.0 & !(live | live << 1)), live.count_ones())
    }

    /// How many clusters are data, durable or live.
    pub fn data_count(self) -> u32 {
        const LOW: u64 = 0x5555_5555_5555_5555;
        (self.0 & LOW).count_ones()
    }
}

/// Which word speaks of `cluster`.
pub fn word_of(cluster: Cluster) -> u64 {
    cluster.0 / CLUSTERS_PER_WORD
}

/// Place of `cluster` within its word.
pub fn slot_of(cluster: Cluster) -> u64 {
    cluster.0 % CLUSTERS_PER_WORD
}

/// Offset in the file of word number `word`.
pub fn word_offset(word: u64) -> u64 {
    WORDS_OFFSET + word * 8
}

/// The part of `run` that lies in each word: word number and slots, in order.
pub fn words_of(run: ClusterRange) -> impl Iterator<Item = (u64, std::ops::Range<u64>)> {
    let first = run.start / CLUSTERS_PER_WORD;
    let last = if run.is_empty() {
        first
    } else {
        run.end.div_ceil(CLUSTERS_PER_WORD)
    };
    (first..last).map(move |word| {
        let base = word * CLUSTERS_PER_WORD;
        let start = run.start.max(base) - base;
        let end = run.end.min(base + CLUSTERS_PER_WORD) - base;
        (word, start..end)
    })
}

/// Which cache line of 64 bytes, the smallest of the processors with DAX, a word lies in.
pub(crate) fn line_of(word: u64) -> u64 {
    const WORDS_PER_LINE: u64 = 8;
    const { assert!(WORDS_OFFSET.is_multiple_of(WORDS_PER_LINE * 8)) };
    word / WORDS_PER_LINE
}

/// Length of the map file of a layer: header page and words, in whole pages.
pub fn file_bytes(size: VirtualSize, cluster: ClusterSize) -> u64 {
    let words = cluster
        .clusters_in(size.bytes())
        .div_ceil(CLUSTERS_PER_WORD);
    WORDS_OFFSET + (words * 8).next_multiple_of(4096)
}

/// A map file's header: a copy of what was true at creation, for rescue and to tell files apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The layer.
    pub layer: Uuid,
    /// Its parent when it was made.
    pub parent: Option<Uuid>,
    /// The image in which it was made.
    pub image: Uuid,
    /// Size of the disk.
    pub size: VirtualSize,
    /// Size of its clusters.
    pub cluster: ClusterSize,
    /// How many bytes of the parent showed.
    pub clip: u64,
}

impl Header {
    /// The first 1024 bytes of the file.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = [0; HEADER_BYTES];
        put(&mut raw, MAGIC_OFFSET, &MAGIC);
        put(&mut raw, VERSION_OFFSET, &VERSION.to_le_bytes());
        put(&mut raw, LAYER_OFFSET, self.layer.as_bytes());
        put(
            &mut raw,
            PARENT_OFFSET,
            self.parent.unwrap_or_default().as_bytes(),
        );
        put(&mut raw, IMAGE_OFFSET, self.image.as_bytes());
        put(&mut raw, SIZE_OFFSET, &self.size.bytes().to_le_bytes());
        put(
            &mut raw,
            CLUSTER_SIZE_OFFSET,
            &self.cluster.bytes().to_le_bytes(),
        );
        put(&mut raw, CLIP_OFFSET, &self.clip.to_le_bytes());
        let checksum = crc32c::crc32c(&raw);
        put(&mut raw, CHECKSUM_OFFSET, &checksum.to_le_bytes());
        raw
    }

    /// Reads a header back.
    ///
    /// # Errors
    /// `Corrupt` for a wrong magic, checksum or field, `Unsupported` for another version.
    pub fn decode(raw: &[u8; HEADER_BYTES]) -> Result<Self> {
        let corrupt = |what: &str| Error::new(ErrorKind::Corrupt, format!("map header: {what}"));
        if raw[..MAGIC.len()] != MAGIC {
            return Err(corrupt("wrong magic"));
        }
        let version = u32::from_le_bytes(field(raw, VERSION_OFFSET));
        if version != VERSION {
            let what = format!("map header: version {version} is not known");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let mut covered = *raw;
        put(&mut covered, CHECKSUM_OFFSET, &[0; 4]);
        if crc32c::crc32c(&covered) != u32::from_le_bytes(field(raw, CHECKSUM_OFFSET)) {
            return Err(corrupt("wrong checksum"));
        }
        let parent = Uuid::from_bytes(field(raw, PARENT_OFFSET));
        Ok(Self {
            layer: Uuid::from_bytes(field(raw, LAYER_OFFSET)),
            parent: (!parent.is_nil()).then_some(parent),
            image: Uuid::from_bytes(field(raw, IMAGE_OFFSET)),
            size: VirtualSize::new(u64::from_le_bytes(field(raw, SIZE_OFFSET)))
                .map_err(|e| corrupt("size").caused_by(e))?,
            cluster: ClusterSize::new(u64::from_le_bytes(field(raw, CLUSTER_SIZE_OFFSET)))
                .map_err(|e| corrupt("cluster size").caused_by(e))?,
            clip: u64::from_le_bytes(field(raw, CLIP_OFFSET)),
        })
    }
}

/// Says to which boot of which machine, and to which file, live words belong: the page cache that holds their data
/// is gone with the boot, and a copy of the file was never in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    /// The kernel's boot id.
    pub boot: Uuid,
    /// Inode number of the map file.
    pub inode: u64,
    /// Birth time of the map file.
    pub birth_ns: u64,
}

impl Tag {
    /// The tag of the file `identity` in the boot `boot`.
    pub fn new(boot: Uuid, identity: Identity) -> Self {
        Self {
            boot,
            inode: identity.inode,
            birth_ns: identity.birth_ns,
        }
    }

    /// The tag that a failed flush leaves: it names no boot.
    pub fn of_failed_flush(identity: Identity) -> Self {
        Self::new(Uuid::nil(), identity)
    }

    /// Whether a failed flush has left it.
    pub fn is_of_failed_flush(&self) -> bool {
        self.boot.is_nil()
    }

    /// The bytes at [`TAG_OFFSET`].
    pub fn encode(&self) -> [u8; TAG_BYTES] {
        let mut raw = [0; TAG_BYTES];
        put(&mut raw, 0, self.boot.as_bytes());
        put(&mut raw, 16, &self.inode.to_le_bytes());
        put(&mut raw, 24, &self.birth_ns.to_le_bytes());
        let checksum = crc32c::crc32c(&raw[..32]);
        put(&mut raw, 32, &checksum.to_le_bytes());
        raw
    }

    /// Reads a tag back; a damaged or missing one is `None` and belongs to no boot.
    pub fn decode(raw: &[u8; TAG_BYTES]) -> Option<Self> {
        let checksum = u32::from_le_bytes(field(raw, 32));
        (crc32c::crc32c(&raw[..32]) == checksum).then(|| Self {
            boot: Uuid::from_bytes(field(raw, 0)),
            inode: u64::from_le_bytes(field(raw, 16)),
            birth_ns: u64::from_le_bytes(field(raw, 24)),
        })
    }
}

fn put(raw: &mut [u8], offset: usize, value: &[u8]) {
    raw[offset..offset + value.len()].copy_from_slice(value);
}

fn field<const N: usize>(raw: &[u8], offset: usize) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&raw[offset..offset + N]);
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            layer: Uuid::from_u128(1),
            parent: Some(Uuid::from_u128(2)),
            image: Uuid::from_u128(3),
            size: VirtualSize::new(64 << 20).unwrap(),
            cluster: ClusterSize::new(4096).unwrap(),
            clip: 2 << 20,
        }
    }

    #[test]
    fn a_header_reads_back_and_every_flipped_bit_is_noticed() {
        let raw = header().encode();
        assert_eq!(Header::decode(&raw).unwrap(), header());
        for bit in 0..HEADER_BYTES * 8 {
            let mut flipped = raw;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_damaged_tag_belongs_to_no_boot() {
        let tag = Tag {
            boot: Uuid::from_u128(7),
            inode: 8,
            birth_ns: 9,
        };
        assert_eq!(Tag::decode(&tag.encode()), Some(tag));
        for bit in 0..36 * 8 {
            let mut flipped = tag.encode();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(Tag::decode(&flipped), Some(tag), "bit {bit}");
        }
    }

    #[test]
    fn settling_touches_only_clusters_that_were_noted_and_are_still_live() {
        let states = [State::Absent, State::Data, State::Zero, State::Live];
        for (now, noted) in states.iter().flat_map(|a| states.map(|b| (*a, b))) {
            let word = Word::default().with(31, now).with(3, now);
            let settled = word.settle(Word::default().with(31, noted));
            let expected = if now == State::Live && noted == State::Live {
                State::Data
            } else {
                now
            };
            assert_eq!(settled.get(31), expected);
            assert_eq!(settled.get(3), now);
        }
    }

    #[test]
    fn a_run_is_cut_at_word_borders() {
        let cut: Vec<_> = words_of(ClusterRange::new(30, 65)).collect();
        assert_eq!(cut, [(0, 30..32), (1, 0..32), (2, 0..1)]);
        assert_eq!(words_of(ClusterRange::new(5, 5)).count(), 0);
    }
}
