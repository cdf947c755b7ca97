// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A stream: what a snapshot shows, or what it shows otherwise than an earlier one, as bytes for a pipe or a file. The normative
//! description is `docs/stream-format.md`. [`Reader`] and [`Writer`] touch no file; [`Sending`] reads an image, and
//! [`crate::ops::receive`] makes one.
//!
//! ```text
//! header (512)   which snapshot of which image, and since which one
//! record (32)    data: where, how long, checksum of what follows    payload
//! record (32)    zeros: where, how long
//! record (32)    end
//! ```
//!
//! Each record's checksum covers that of the one before it: a record that is missing, moved or from another stream is noticed,
//! and the last one speaks for all.

mod reader;
mod send;
mod token;
mod writer;

use std::ops::Range;

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::root::{self, MAX_NAME_BYTES};
use crate::units::{self, ClusterSize, VirtualSize};

pub use reader::{Reader, Record};
pub use send::{Sending, Sent};
pub use token::Token;
pub use writer::Writer;

/// First bytes of every stream.
pub const MAGIC: [u8; 8] = *b"PCOWSND\0";
/// Version of this layout.
pub const VERSION: u32 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 512;
/// Bytes of a record without its payload.
pub const RECORD_BYTES: usize = 32;
/// Most bytes of data in one record.
pub const MAX_DATA_BYTES: u64 = 1 << 20;
/// Offsets and lengths are multiples of this.
pub const UNIT_BYTES: u64 = 4096;

/// Offset of the version (u32).
pub const VERSION_OFFSET: usize = 8;
/// Offset of the features that a reader must know (u32, none is defined).
pub const FEATURES_OFFSET: usize = VERSION_OFFSET + 4;
/// Offset of the UUID of the image that was sent from.
pub const IMAGE_OFFSET: usize = FEATURES_OFFSET + 4;
/// Offset of the snapshot's UUID.
pub const SNAPSHOT_OFFSET: usize = IMAGE_OFFSET + 16;
/// Offset of the UUID of the snapshot that the stream continues; all zero in a full stream.
pub const FROM_OFFSET: usize = SNAPSHOT_OFFSET + 16;
/// Offset of the snapshot's number (u64).
pub const NUMBER_OFFSET: usize = FROM_OFFSET + 16;
/// Offset of the number of the snapshot that the stream continues (u64), or 0.
pub const FROM_NUMBER_OFFSET: usize = NUMBER_OFFSET + 8;
/// Offset of the time of the snapshot, in seconds since 1970 (u64).
pub const TIME_OFFSET: usize = FROM_NUMBER_OFFSET + 8;
/// Offset of the size of the disk in bytes (u64).
pub const SIZE_OFFSET: usize = TIME_OFFSET + 8;
/// Offset of the cluster size in bytes (u64).
pub const CLUSTER_SIZE_OFFSET: usize = SIZE_OFFSET + 8;
/// Offset of the first byte of the disk that the stream speaks of (u64).
pub const START_OFFSET: usize = CLUSTER_SIZE_OFFSET + 8;
/// Offset of the snapshot's name: its length in bytes (u32), and the name.
pub const NAME_OFFSET: usize = START_OFFSET + 8;
/// Offset of the same of the snapshot that the stream continues.
pub const FROM_NAME_OFFSET: usize = NAME_OFFSET + 4 + MAX_NAME_BYTES;
/// Offset of the checksum: CRC-32C of the header's bytes before it.
pub const CHECKSUM_OFFSET: usize = HEADER_BYTES - 4;

const _: () = assert!(FROM_NAME_OFFSET + 4 + MAX_NAME_BYTES <= CHECKSUM_OFFSET);
const _: () = assert!(MAX_DATA_BYTES.is_multiple_of(UNIT_BYTES));

/// Kind of a record: bytes follow.
pub const DATA: u32 = 1;
/// Kind of a record: the range reads zero.
pub const ZEROS: u32 = 2;
/// Kind of the last record.
pub const END: u32 = 3;

/// A snapshot, as a stream names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Says which one it is, in every image.
    pub uuid: Uuid,
    /// Its number in the image that was sent from.
    pub number: u64,
    /// Its name there.
    pub name: String,
}

/// What a stream is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The image that was sent from.
    pub image: Uuid,
    /// The snapshot.
    pub snapshot: Named,
    /// When it was taken, in seconds since 1970.
    pub time: u64,
    /// The snapshot that must be there already; `None` for a full stream.
    pub from: Option<Named>,
    /// Size of the disk.
    pub size: VirtualSize,
    /// Size of the clusters of the snapshot's layer.
    pub cluster: ClusterSize,
    /// The first byte of the disk that the stream speaks of; not 0 if it is the rest of one that was cut off.
    pub start: u64,
}

impl Header {
    /// The first bytes of the stream.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = [0; HEADER_BYTES];
        put(&mut raw, 0, &MAGIC);
        put(&mut raw, VERSION_OFFSET, &VERSION.to_le_bytes());
        put(&mut raw, IMAGE_OFFSET, self.image.as_bytes());
        put(&mut raw, SNAPSHOT_OFFSET, self.snapshot.uuid.as_bytes());
        put(&mut raw, NUMBER_OFFSET, &self.snapshot.number.to_le_bytes());
        put_name(&mut raw, NAME_OFFSET, &self.snapshot.name);
        if let Some(from) = &self.from {
            put(&mut raw, FROM_OFFSET, from.uuid.as_bytes());
            put(&mut raw, FROM_NUMBER_OFFSET, &from.number.to_le_bytes());
            put_name(&mut raw, FROM_NAME_OFFSET, &from.name);
        }
        put(&mut raw, TIME_OFFSET, &self.time.to_le_bytes());
        put(&mut raw, SIZE_OFFSET, &self.size.bytes().to_le_bytes());
        let cluster = self.cluster.bytes().to_le_bytes();
        put(&mut raw, CLUSTER_SIZE_OFFSET, &cluster);
        put(&mut raw, START_OFFSET, &self.start.to_le_bytes());
        let sum = crc32c::crc32c(&raw[..CHECKSUM_OFFSET]);
        put(&mut raw, CHECKSUM_OFFSET, &sum.to_le_bytes());
        raw
    }

    /// Reads a header back. Order of the checks: magic, version and features, checksum, fields, cross-fields.
    ///
    /// # Errors
    /// `Stream`, or `Unsupported` for another version.
    pub fn decode(raw: &[u8; HEADER_BYTES]) -> Result<Self> {
        if raw[..MAGIC.len()] != MAGIC {
            return Err(bad("this is not a pcow stream"));
        }
        let version = u32::from_le_bytes(field(raw, VERSION_OFFSET));
        let features = u32::from_le_bytes(field(raw, FEATURES_OFFSET));
        if version != VERSION || features != 0 {
            let what = format!("the stream has version {version} and features {features:#x}");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let sum = u32::from_le_bytes(field(raw, CHECKSUM_OFFSET));
        if crc32c::crc32c(&raw[..CHECKSUM_OFFSET]) != sum {
            return Err(bad("the header of the stream has a wrong checksum"));
        }
        let header = Self::decode_fields(raw)?;
        // What is not a field is zero, so that each header has one form.
        if header.encode() != *raw {
            return Err(bad("the header of the stream has bytes that mean nothing"));
        }
        Ok(header)
    }

    fn decode_fields(raw: &[u8; HEADER_BYTES]) -> Result<Self> {
        let number = |offset| u64::from_le_bytes(field(raw, offset));
        let named = |uuid, number_offset, name_offset| -> Result<Named> {
            Ok(Named {
                uuid: Uuid::from_bytes(field(raw, uuid)),
                number: number(number_offset),
                name: name(raw, name_offset)?,
            })
        };
        let size = VirtualSize::new(number(SIZE_OFFSET));
        let cluster = ClusterSize::new(number(CLUSTER_SIZE_OFFSET));
        let is_full = field(raw, FROM_OFFSET) == [0; 16];
        let from = || named(FROM_OFFSET, FROM_NUMBER_OFFSET, FROM_NAME_OFFSET);
        let header = Self {
            image: Uuid::from_bytes(field(raw, IMAGE_OFFSET)),
            snapshot: named(SNAPSHOT_OFFSET, NUMBER_OFFSET, NAME_OFFSET)?,
            time: number(TIME_OFFSET),
            from: (!is_full).then(from).transpose()?,
            size: size.map_err(|e| bad("the stream's size").caused_by(e))?,
            cluster: cluster.map_err(|e| bad("the stream's cluster size").caused_by(e))?,
            start: number(START_OFFSET),
        };
        header.validate()?;
        Ok(header)
    }

    fn validate(&self) -> Result<()> {
        let snapshot = &self.snapshot;
        if snapshot.uuid.is_nil() || snapshot.number == 0 || snapshot.number == u64::MAX {
            return Err(bad("the stream is of no snapshot"));
        }
        let is_older = |from: &Named| {
            (1..snapshot.number).contains(&from.number) && from.uuid != snapshot.uuid
        };
        if !self.from.as_ref().is_none_or(is_older) {
            return Err(bad("the stream continues a snapshot that is not older"));
        }
        if self.start > self.size.bytes() || !self.start.is_multiple_of(UNIT_BYTES) {
            return Err(bad("the stream starts past the end of its disk"));
        }
        Ok(())
    }
}

/// A record, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    kind: u32,
    payload_sum: u32,
    offset: u64,
    length: u64,
}

impl Head {
    /// Its bytes; `before` is the checksum of what comes before it, and becomes its own.
    fn encode(self, before: &mut u32) -> [u8; RECORD_BYTES] {
        let mut raw = [0; RECORD_BYTES];
        put(&mut raw, 0, &self.kind.to_le_bytes());
        put(&mut raw, 4, &self.payload_sum.to_le_bytes());
        put(&mut raw, 8, &self.offset.to_le_bytes());
        put(&mut raw, 16, &self.length.to_le_bytes());
        *before = sum_after(*before, &raw);
        put(&mut raw, RECORD_BYTES - 4, &before.to_le_bytes());
        raw
    }

    /// Reads a record back that comes after one with the checksum `before`. Nothing in it counts before its checksum is right.
    fn decode(raw: &[u8; RECORD_BYTES], before: &mut u32) -> Result<Self> {
        let sum = u32::from_le_bytes(field(raw, RECORD_BYTES - 4));
        if sum_after(*before, raw) != sum || field(raw, RECORD_BYTES - 8) != [0; 4] {
            return Err(bad("a record of the stream has a wrong checksum"));
        }
        *before = sum;
        Ok(Self {
            kind: u32::from_le_bytes(field(raw, 0)),
            payload_sum: u32::from_le_bytes(field(raw, 4)),
            offset: u64::from_le_bytes(field(raw, 8)),
            length: u64::from_le_bytes(field(raw, 16)),
        })
    }

    /// Its bytes of the disk, if they lie behind `position` on a disk of `size` bytes.
    fn range(self, position: u64, size: u64) -> Option<Range<u64>> {
        let end = self.offset.checked_add(self.length)?;
        let aligned = end.is_multiple_of(UNIT_BYTES) && self.offset.is_multiple_of(UNIT_BYTES);
        let inside = position <= self.offset && self.offset < end && end <= size;
        (aligned && inside).then_some(self.offset..end)
    }
}

fn sum_after(before: u32, raw: &[u8; RECORD_BYTES]) -> u32 {
    let sum = crc32c::crc32c(&before.to_le_bytes());
    crc32c::crc32c_append(sum, &raw[..RECORD_BYTES - 4])
}

fn bad(what: &str) -> Error {
    Error::new(ErrorKind::Stream, what)
}

fn put(raw: &mut [u8], offset: usize, value: &[u8]) {
    raw[offset..offset + value.len()].copy_from_slice(value);
}

fn put_name(raw: &mut [u8], offset: usize, name: &str) {
    let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
    put(raw, offset, &length.to_le_bytes());
    put(raw, offset + 4, name.as_bytes());
}

/// A name that a snapshot can have.
fn name(raw: &[u8; HEADER_BYTES], offset: usize) -> Result<String> {
    let length = u64::from(u32::from_le_bytes(field(raw, offset)));
    if length > units::bytes(MAX_NAME_BYTES) {
        return Err(bad("a name in the stream is too long"));
    }
    let bytes = &raw[offset + 4..][..units::len(length)];
    let text = std::str::from_utf8(bytes).map_err(|_| bad("a name in the stream is no text"))?;
    root::check_name(text).map_err(|e| bad("a name in the stream").caused_by(e))?;
    Ok(text.to_owned())
}

fn field<const N: usize>(raw: &[u8], offset: usize) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&raw[offset..offset + N]);
    value
}
