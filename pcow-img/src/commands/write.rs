// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `write`: bytes of a file or of standard input onto the disk.

use std::fmt;
use std::io::Read as _;
use std::path::PathBuf;

use clap::Args;
use pcow_format::Image;
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::disk::{Disk, Format};
use crate::failure::{Doing, Failure};
use crate::open;
use crate::progress::Progress;
use crate::size::{self, Bytes};

/// Write bytes onto the disk, in place
///
/// For scripts and rescue. The bytes are durable when the command ends. One that is cut off leaves some of them written:
/// take a snapshot first if that matters. The image must not be in use. A file must fit onto the disk; of standard input
/// what fits is written before the rest is refused.
#[derive(Debug, Args)]
pub struct Write {
    /// The image
    image: PathBuf,

    /// Where the first byte goes
    #[arg(value_parser = size::bytes)]
    offset: u64,

    /// What to write [default: standard input]
    file: Option<PathBuf>,
}

/// What `write` did.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    /// The image's directory.
    filename: PathBuf,
    /// Offset of the first byte.
    offset: u64,
    /// How many bytes were written.
    length: u64,
}

const PURPOSE: &str = "cannot write to";
/// Bytes written at a time.
const STEP_BYTES: usize = 1 << 20;

impl Write {
    /// Writes.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let source = match &self.file {
            Some(path) => Some(Disk::open(
                path.as_os_str(),
                Format::Raw,
                &[],
                "cannot read",
            )?),
            None => None,
        };
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        let size = stored.root().active_layer().doing(context)?.virtual_size;
        let length = source.as_ref().map_or(0, Disk::size);
        if self.offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(self.too_long(length, size));
        }
        let image = open::for_writing(&self.image, &global.base_dirs, PURPOSE)?;
        let written = match &source {
            Some(source) => self.write_file(&image, source, global.quiet),
            None => self.write_input(&image, size),
        };
        // Also after a failure: what was written is then at least durable.
        image.flush().doing(context)?;
        console.confirm(&Done {
            length: written?,
            offset: self.offset,
            filename: self.image,
        })
    }

    fn too_long(&self, length: u64, size: u64) -> Failure {
        Failure::refused(format!(
            "{PURPOSE} {}: {length} bytes at offset {} are more than the disk's {size}",
            self.image.display(),
            self.offset
        ))
    }

    fn write_file(&self, image: &Image, source: &Disk, quiet: bool) -> Result<u64, Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let mut progress = Progress::new(source.size(), quiet);
        let mut pieces = source.pieces();
        let mut buf = vec![0; STEP_BYTES];
        let mut at = 0;
        while at < source.size() {
            let piece = pieces.at(at).doing(context)?;
            let place = self.offset + at;
            if piece.is_data {
                let left = usize::try_from(piece.bytes.end - at).unwrap_or(usize::MAX);
                let buf = &mut buf[..left.min(STEP_BYTES)];
                source.read(at, buf).doing(context)?;
                image.write(place, buf).doing(context)?;
                at += u64::try_from(buf.len()).unwrap_or(u64::MAX);
            } else {
                let zeros = place..self.offset + piece.bytes.end;
                image.write_zeros(zeros).doing(context)?;
                at = piece.bytes.end;
            }
            progress.reach(at);
        }
        Ok(at)
    }

    fn write_input(&self, image: &Image, size: u64) -> Result<u64, Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let mut input = std::io::stdin().lock();
        let mut buf = Vec::with_capacity(STEP_BYTES);
        let mut at = self.offset;
        loop {
            buf.clear();
            let step = u64::try_from(STEP_BYTES).unwrap_or(u64::MAX);
            let got = input
                .by_ref()
                .take(step)
                .read_to_end(&mut buf)
                .map_err(|e| Failure::refused(format!("cannot read standard input: {e}")))?;
            let got = u64::try_from(got).unwrap_or(u64::MAX);
            if got == 0 {
                return Ok(at - self.offset);
            }
            let room = size - at;
            let fits = usize::try_from(got.min(room)).unwrap_or(usize::MAX);
            image.write(at, &buf[..fits]).doing(context)?;
            if got > room {
                return Err(self.too_long(at - self.offset + got, size));
            }
            at += got;
        }
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: wrote {} at offset {}",
            self.filename.display(),
            Bytes(self.length),
            self.offset
        )
    }
}
