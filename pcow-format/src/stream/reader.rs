// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes a stream apart. Whatever comes in, it takes a megabyte of memory, and gives out only what a checksum stands for.

use std::io::{self, Read};
use std::ops::Range;

use super::{
    DATA, END, HEADER_BYTES, Head, Header, MAX_DATA_BYTES, RECORD_BYTES, ZEROS, bad, field,
};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::units;

/// A piece of the disk.
#[derive(Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// Bytes, and where they go.
    Data(u64, &'a [u8]),
    /// A range that reads zero.
    Zeros(Range<u64>),
}

impl Record<'_> {
    /// The end of its range.
    pub fn end(&self) -> u64 {
        match self {
            Record::Data(offset, bytes) => offset + units::bytes(bytes.len()),
            Record::Zeros(range) => range.end,
        }
    }
}

/// A stream that is read.
pub struct Reader<'a> {
    input: &'a mut dyn Read,
    header: Header,
    /// Checksum of the last record, or of the header.
    sum: u32,
    /// End of the last range.
    position: u64,
    records: u64,
    payload: Vec<u8>,
}

impl std::fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader")
            .field("header", &self.header)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

impl<'a> Reader<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// `Stream`, `StreamCut`, `Unsupported` or `Io`.
    pub fn new(input: &'a mut dyn Read) -> Result<Self> {
        let mut raw = [0; HEADER_BYTES];
        read_all(input, &mut raw)?;
        let header = Header::decode(&raw)?;
        Ok(Self {
            input,
            position: header.start,
            header,
            sum: u32::from_le_bytes(field(&raw, HEADER_BYTES - 4)),
            records: 0,
            payload: Vec::new(),
        })
    }

    /// What the stream is of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next piece, `None` once the stream has ended as it should. Ranges come in ascending order.
    ///
    /// # Errors
    /// `Stream`, `StreamCut` or `Io`.
    pub fn next_record(&mut self) -> Result<Option<Record<'_>>> {
        let mut raw = [0; RECORD_BYTES];
        read_all(self.input, &mut raw)?;
        let head = Head::decode(&raw, &mut self.sum)?;
        if head.kind == END {
            return self.finish(head).map(|()| None);
        }
        let range = head.range(self.position, self.header.size.bytes());
        let range = range.ok_or_else(|| bad("a record of the stream is out of its place"))?;
        self.position = range.end;
        self.records += 1;
        match head.kind {
            DATA if head.length <= MAX_DATA_BYTES => {
                self.payload.resize(units::len(head.length), 0);
                read_all(self.input, &mut self.payload)?;
                if crc32c::crc32c(&self.payload) != head.payload_sum {
                    return Err(bad("data of the stream have a wrong checksum"));
                }
                Ok(Some(Record::Data(range.start, &self.payload)))
            }
            ZEROS if head.payload_sum == 0 => Ok(Some(Record::Zeros(range))),
            _ => Err(bad("a record of the stream is of no known kind")),
        }
    }

    fn finish(&mut self, head: Head) -> Result<()> {
        let expected = Head {
            kind: END,
            payload_sum: 0,
            offset: self.header.size.bytes(),
            length: self.records,
        };
        if head != expected {
            return Err(bad("the end of the stream does not fit it"));
        }
        match read_some(self.input, &mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(bad("something follows the end of the stream")),
            Err(e) => Err(e).context(cannot_read),
        }
    }
}

fn read_all(input: &mut dyn Read, mut buf: &mut [u8]) -> Result<()> {
    while !buf.is_empty() {
        match read_some(input, buf).context(cannot_read)? {
            0 => {
                return Err(Error::new(
                    ErrorKind::StreamCut,
                    "the stream ends too early",
                ));
            }
            n => buf = &mut buf[n..],
        }
    }
    Ok(())
}

fn read_some(input: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match input.read(buf) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn cannot_read() -> String {
    "cannot read the stream".to_owned()
}
