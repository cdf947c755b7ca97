// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sends a snapshot. Only sealed layers are read, so it does not matter who has the image (I0). Where two snapshots have the
//! same layer, and where there are holes, nothing is read.

use std::io::{self, Write};
use std::ops::Range;

use uuid::Uuid;

use super::{Header, MAX_DATA_BYTES, Named, Token, UNIT_BYTES, Writer};
use crate::chain::{Piece, Walk};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::Stored;
use crate::root::{Root, Snapshot};
use crate::units;
use crate::view::View;

/// Zeros are looked for in data by blocks of this.
const BLOCK_BYTES: u64 = 64 << 10;

/// A snapshot that is ready to be sent.
#[derive(Debug)]
pub struct Sending {
    header: Header,
    snapshot: View,
    from: Option<View>,
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of the stream.
    pub stream_bytes: u64,
    /// Bytes of the disk in it.
    pub data_bytes: u64,
}

impl Sending {
    /// Opens the snapshot `snapshot` of an image, to be sent to who has its snapshot `from`, or nothing of it.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` if `from` is not the older one; what opening a layer may fail with.
    pub fn of(stored: &Stored, snapshot: &str, from: Option<&str>) -> Result<Self> {
        let root = stored.root();
        let from = from.map(|name| root.snapshot(name)).transpose()?;
        Self::between(stored, root.snapshot(snapshot)?, from, 0)
    }

    /// Opens what is missing of a stream that was cut off.
    ///
    /// # Errors
    /// As [`Sending::of`].
    pub fn rest(stored: &Stored, token: &Token) -> Result<Self> {
        let root = stored.root();
        let from = token.from.map(|uuid| known(root, uuid)).transpose()?;
        Self::between(stored, known(root, token.snapshot)?, from, token.start)
    }

    fn between(
        stored: &Stored,
        snapshot: &Snapshot,
        from: Option<&Snapshot>,
        start: u64,
    ) -> Result<Self> {
        let invalid = |what: String| Err(Error::new(ErrorKind::InvalidArgument, what));
        if let Some(from) = from.filter(|from| from.number >= snapshot.number) {
            let (from, to) = (&from.name, &snapshot.name);
            return invalid(format!("snapshot '{from}' is not older than '{to}'"));
        }
        let row = stored.root().layer(snapshot.layer).ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "a snapshot's layer is not in the table")
        })?;
        if start > row.virtual_size {
            return invalid(format!("snapshot '{}' is smaller than that", snapshot.name));
        }
        Ok(Self {
            header: Header {
                image: stored.root().uuid,
                snapshot: named(snapshot),
                time: snapshot.time,
                from: from.map(named),
                size: row.size()?,
                cluster: row.cluster()?,
                start,
            },
            snapshot: stored.view(snapshot.layer)?,
            from: from.map(|from| stored.view(from.layer)).transpose()?,
        })
    }

    /// What the stream will be of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Writes the stream; `reached` is told how much of the disk was gone through.
    ///
    /// # Errors
    /// `Io` or `Corrupt`.
    pub fn write(&self, out: &mut dyn Write, reached: &mut dyn FnMut(u64)) -> Result<Sent> {
        let mut writer = Writer::new(out, &self.header).context(cannot_write)?;
        let mut walks = Walks {
            new: self.snapshot.walk(),
            old: self.from.as_ref().map(|view| (view, view.walk())),
        };
        let (mut at, size) = (self.header.start, self.header.size.bytes());
        let mut sent = Sent::default();
        let mut buf = Vec::new();
        while at < size {
            let (end, step) = self.step(&mut walks, at)?;
            match step {
                Step::Same => {}
                Step::Zeros => writer.zeros(at..end).context(cannot_write)?,
                Step::Data => {
                    buf.resize(units::len(end - at), 0);
                    self.snapshot.read(at, &mut buf)?;
                    sent.data_bytes += self
                        .send_data(&mut writer, at, &buf)
                        .context(cannot_write)?;
                }
            }
            at = end;
            reached(at);
        }
        sent.stream_bytes = writer.end().context(cannot_write)?;
        Ok(sent)
    }

    /// What to do from `at` on, and up to where.
    fn step(&self, walks: &mut Walks<'_>, at: u64) -> Result<(u64, Step)> {
        let (new, old) = walks.at(at)?;
        let end = new
            .bytes
            .end
            .min(old.bytes.end)
            .min(self.header.size.bytes());
        let whole = end / UNIT_BYTES * UNIT_BYTES;
        if whole == at {
            // A border within a unit, such as the end of a raw base.
            return Ok((at + UNIT_BYTES, Step::Data));
        }
        Ok(match new.depth {
            _ if self.are_alike(&new, &old) => (whole, Step::Same),
            None => (whole, Step::Zeros),
            Some(_) => (whole.min(at + MAX_DATA_BYTES), Step::Data),
        })
    }

    /// Whether both show the same without a look: zeros both, or one layer's bytes.
    fn are_alike(&self, new: &Piece, old: &Piece) -> bool {
        let layer_of = |view: &View, piece: &Piece| view.sealed_layer(piece.depth?);
        match (&self.from, new.depth, old.depth) {
            (_, None, None) => true,
            (Some(from), Some(_), Some(_)) => {
                let layer = layer_of(&self.snapshot, new);
                layer.is_some() && layer == layer_of(from, old)
            }
            _ => false,
        }
    }

    /// Writes bytes that have storage, of which some blocks may be zeros all the same. Returns how many went as data.
    fn send_data(&self, writer: &mut Writer<'_>, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        let blocks: Vec<_> = bytes.chunks(units::len(BLOCK_BYTES)).collect();
        let is_zero = |block: &&[u8]| block.iter().all(|b| *b == 0);
        let mut data = 0;
        let mut at: Range<usize> = 0..0;
        for group in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            at = at.end..at.end + group.iter().map(|b| b.len()).sum::<usize>();
            let start = offset + units::bytes(at.start);
            let length = units::bytes(at.len());
            if !is_zero(&group[0]) {
                writer.data(start, &bytes[at.clone()])?;
                data += length;
            } else if self.from.is_some() {
                writer.zeros(start..start + length)?;
            }
        }
        Ok(data)
    }
}

/// What to do with a piece of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The receiver has it.
    Same,
    Zeros,
    Data,
}

/// Both disks side by side. What is past the end of the older one, and all of one that is not there, reads zero.
struct Walks<'a> {
    new: Walk<'a>,
    old: Option<(&'a View, Walk<'a>)>,
}

impl Walks<'_> {
    fn at(&mut self, at: u64) -> Result<(Piece, Piece)> {
        let old = match &mut self.old {
            Some((view, walk)) if at < view.size() => walk.piece(at)?,
            _ => Piece {
                bytes: at..u64::MAX,
                depth: None,
            },
        };
        Ok((self.new.piece(at)?, old))
    }
}

fn named(snapshot: &Snapshot) -> Named {
    Named {
        uuid: snapshot.uuid,
        number: snapshot.number,
        name: snapshot.name.clone(),
    }
}

fn known(root: &Root, uuid: Uuid) -> Result<&Snapshot> {
    root.snapshots
        .iter()
        .find(|s| s.uuid == uuid)
        .ok_or_else(|| {
            let what = format!("the image has no snapshot with the UUID {uuid}, or not any more");
            Error::new(ErrorKind::NotFound, what)
        })
}

fn cannot_write() -> String {
    "cannot write the stream".to_owned()
}
