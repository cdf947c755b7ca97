// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `read`: bytes of the disk to standard output.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;

use crate::cli::Global;
use crate::console::{Console, Form};
use crate::disk::{Disk, Format};
use crate::failure::{Doing, Failure, Status};
use crate::size;

/// Write bytes of the disk to standard output
///
/// For scripts and rescue. With --output json the bytes come as hexadecimal digits.
#[derive(Debug, Args)]
pub struct Read {
    /// The disk: IMAGE, IMAGE@SNAPSHOT, or a file of the format of -f
    image: OsString,

    /// The first byte
    #[arg(value_parser = size::bytes)]
    offset: u64,

    /// How many bytes
    #[arg(value_parser = size::bytes)]
    length: u64,

    /// Format of the disk; it is never guessed
    #[arg(
        short = 'f',
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "pcow"
    )]
    format: Format,
}

const PURPOSE: &str = "cannot read";
/// Bytes read at a time.
const STEP_BYTES: u64 = 1 << 20;

impl Read {
    /// Reads.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let disk = Disk::open(&self.image, self.format, &global.base_dirs, PURPOSE)?;
        let end = self.offset.checked_add(self.length);
        if end.is_none_or(|end| end > disk.size()) {
            return Err(Failure::refused(format!(
                "{PURPOSE} {} bytes at offset {} of {}: the disk has {} bytes",
                self.length,
                self.offset,
                self.image.display(),
                disk.size()
            )));
        }
        match console.form() {
            Form::Human => self.copy(&disk, &mut |bytes| console.writer().write_all(bytes))?,
            Form::Json => {
                let name = PathBuf::from(&self.image);
                let name = serde_json::to_string(&name).map_err(io::Error::from)?;
                let (offset, length) = (self.offset, self.length);
                write!(
                    console.writer(),
                    "{{\n  \"filename\": {name},\n  \"offset\": {offset},\n  \"length\": {length},\n  \"data\": \""
                )?;
                self.copy(&disk, &mut |bytes| hexadecimal(console.writer(), bytes))?;
                writeln!(console.writer(), "\"\n}}")?;
            }
        }
        console.finish()
    }

    fn copy(
        &self,
        disk: &Disk,
        write: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let (mut at, end) = (self.offset, self.offset + self.length);
        let mut buf = Vec::new();
        let mut pieces = disk.pieces();
        while at < end {
            let piece = pieces.at(at).doing(context)?;
            let next = piece.bytes.end.min(end).min(at + STEP_BYTES);
            buf.resize(usize::try_from(next - at).unwrap_or(usize::MAX), 0);
            if piece.is_data {
                disk.read(at, &mut buf).doing(context)?;
            } else {
                buf.fill(0);
            }
            write(&buf)?;
            at = next;
        }
        Ok(())
    }
}

fn hexadecimal(out: &mut dyn Write, bytes: &[u8]) -> io::Result<()> {
    bytes.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
}

impl Failure {
    /// The same failure with another exit code; a wrong command line stays one.
    #[must_use]
    pub fn ending_with(mut self, new: Status) -> Self {
        if let Self::Refused { status, .. } = &mut self
            && *status != Status::Usage
        {
            *status = new;
        }
        self
    }
}
