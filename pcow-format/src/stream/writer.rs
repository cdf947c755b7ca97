// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Puts a stream together.

use std::io::{self, Write};
use std::ops::Range;

use super::{DATA, END, HEADER_BYTES, Head, Header, MAX_DATA_BYTES, RECORD_BYTES, ZEROS, field};
use crate::units;

/// A stream that is written. Ranges come in ascending order.
pub struct Writer<'a> {
    out: &'a mut dyn Write,
    /// Checksum of the last record, or of the header.
    sum: u32,
    records: u64,
    size: u64,
    /// A range of zeros that may go on.
    zeros: Range<u64>,
    written: u64,
}

impl std::fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("records", &self.records)
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

impl<'a> Writer<'a> {
    /// Writes the header.
    ///
    /// # Errors
    /// As writing to `out`.
    pub fn new(out: &'a mut dyn Write, header: &Header) -> io::Result<Self> {
        let raw = header.encode();
        out.write_all(&raw)?;
        Ok(Self {
            out,
            sum: u32::from_le_bytes(field(&raw, HEADER_BYTES - 4)),
            records: 0,
            size: header.size.bytes(),
            zeros: 0..0,
            written: units::bytes(HEADER_BYTES),
        })
    }

    /// Writes bytes for `offset`.
    ///
    /// # Errors
    /// As writing to the output.
    pub fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.settle_zeros()?;
        for (at, piece) in (offset..)
            .step_by(units::len(MAX_DATA_BYTES))
            .zip(bytes.chunks(units::len(MAX_DATA_BYTES)))
        {
            let length = units::bytes(piece.len());
            self.record(DATA, crc32c::crc32c(piece), at..at + length)?;
            self.out.write_all(piece)?;
            self.written += length;
        }
        Ok(())
    }

    /// Says that `range` reads zero.
    ///
    /// # Errors
    /// As writing to the output.
    pub fn zeros(&mut self, range: Range<u64>) -> io::Result<()> {
        if self.zeros.end == range.start && !self.zeros.is_empty() {
            self.zeros.end = range.end;
            return Ok(());
        }
        self.settle_zeros()?;
        self.zeros = range;
        Ok(())
    }

    /// Ends the stream; returns its length in bytes.
    ///
    /// # Errors
    /// As writing to the output.
    pub fn end(mut self) -> io::Result<u64> {
        self.settle_zeros()?;
        let range = self.size..self.size + self.records;
        self.record(END, 0, range)?;
        self.out.flush()?;
        Ok(self.written)
    }

    fn settle_zeros(&mut self) -> io::Result<()> {
        match std::mem::take(&mut self.zeros) {
            range if range.is_empty() => Ok(()),
            range => self.record(ZEROS, 0, range),
        }
    }

    fn record(&mut self, kind: u32, payload_sum: u32, range: Range<u64>) -> io::Result<()> {
        let head = Head {
            kind,
            payload_sum,
            offset: range.start,
            length: range.end - range.start,
        };
        self.out.write_all(&head.encode(&mut self.sum))?;
        self.records += 1;
        self.written += units::bytes(RECORD_BYTES);
        Ok(())
    }
}
