// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a command reads from: an image at a snapshot or now, or a file of another format. Formats are never guessed.

use std::ffi::OsStr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;
use pcow_format::chain::Walk;
use pcow_format::medium::File;
use pcow_format::medium::real::RealFile;
use pcow_format::{Error, ErrorKind, ImageLock, View};
use uuid::Uuid;

use crate::base;
use crate::failure::{Doing, Failure, Status};
use crate::foreign::{self, Opened};
use crate::open;

/// A format of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// An image of this program
    Pcow,
    /// A file that holds the bytes of a disk
    Raw,
    /// QEMU's format
    Qcow2,
    /// `VMware`'s format
    Vmdk,
}

impl Format {
    /// The name that the command line and `qemu-img` know it by.
    pub fn name(self) -> &'static str {
        match self {
            Format::Pcow => "pcow",
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
        }
    }
}

/// A disk open for reading.
#[derive(Debug)]
pub enum Disk {
    /// An image, kept from being written to if its present state is looked at.
    Image(
        View,
        #[expect(dead_code, reason = "held")] Option<ImageLock>,
    ),
    /// A file whose bytes are those of the disk.
    Raw(Arc<dyn File>, u64),
    /// A file of another format.
    Foreign(foreign::Access),
}

/// A piece of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its bytes.
    pub bytes: Range<u64>,
    /// Whether they are in a file; else they are zeros.
    pub is_data: bool,
    /// The sealed layer that has them, by which equal content is known without a look.
    pub layer: Option<Uuid>,
    /// How deep in its chain that layer is.
    depth: usize,
}

impl Disk {
    /// Opens the disk that `text` names. `purpose` reads like `cannot compare`.
    ///
    /// # Errors
    /// One line that says what is wrong with it.
    pub fn open(
        text: &OsStr,
        format: Format,
        base_dirs: &[PathBuf],
        purpose: &str,
    ) -> Result<Self, Failure> {
        match format {
            Format::Pcow => Self::open_image(text, base_dirs, purpose),
            Format::Raw => Self::open_raw(Path::new(text), purpose),
            Format::Qcow2 | Format::Vmdk => {
                let path = Path::new(text);
                match foreign::open(path, format, base_dirs, purpose)? {
                    Opened::Directly(access) => Ok(Self::Foreign(access)),
                    Opened::AsRaw(file) => Self::of_file(file, path, purpose),
                }
            }
        }
    }

    /// A snapshot can be read while the image is in use; its present state cannot.
    fn open_image(text: &OsStr, base_dirs: &[PathBuf], purpose: &str) -> Result<Self, Failure> {
        let (path, snapshot) = base::split(text)?;
        let context = || format!("{purpose} {}", text.display());
        let Some(name) = snapshot else {
            let (stored, lock) = open::for_reading_alone(path, base_dirs, purpose)
                .map_err(|f| advise_raw(f, path))?;
            let view = stored.view(stored.root().active).doing(context)?;
            return Ok(Self::Image(view, lock));
        };
        let stored =
            open::for_reading(path, base_dirs, purpose).map_err(|f| advise_raw(f, path))?;
        let layer = stored.root().snapshot(name).doing(context)?.layer;
        Ok(Self::Image(stored.view(layer).doing(context)?, None))
    }

    fn open_raw(path: &Path, purpose: &str) -> Result<Self, Failure> {
        if path.is_dir() {
            let what = format!(
                "{purpose} {}: it is a directory, not a file",
                path.display()
            );
            return Err(Failure::refused(what).advising("a pcow image has the format pcow"));
        }
        let file = RealFile::open_raw(path)
            .map_err(|e| Failure::refused(format!("{purpose} {}: {e}", path.display())))?;
        Self::of_file(file, path, purpose)
    }

    fn of_file(file: Arc<dyn File>, path: &Path, purpose: &str) -> Result<Self, Failure> {
        let status = file
            .status()
            .map_err(|e| Failure::refused(format!("{purpose} {}: {e}", path.display())))?;
        Ok(Self::Raw(file, status.len))
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Disk::Image(view, _) => view.size(),
            Disk::Raw(_, size) => *size,
            Disk::Foreign(access) => access.size(),
        }
    }

    /// Goes through it from front to back.
    pub fn pieces(&self) -> Pieces<'_> {
        Pieces {
            disk: self,
            walk: match self {
                Disk::Image(view, _) => Some(view.walk()),
                Disk::Raw(..) | Disk::Foreign(_) => None,
            },
        }
    }

    /// Reads `buf.len()` bytes at `offset`, all of which are on the disk.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> pcow_format::Result<()> {
        match self {
            Disk::Image(view, _) => view.read(offset, buf),
            Disk::Raw(file, _) => {
                let done = file.read_at(buf, offset).map_err(cannot_read)?;
                buf[done..].fill(0);
                Ok(())
            }
            Disk::Foreign(access) => access.read(buf, offset).map_err(cannot_read),
        }
    }

    /// The file in which a piece's bytes are at their own offset, if there is such a file.
    pub fn file_of(&self, piece: &Piece) -> Option<&dyn File> {
        match self {
            Disk::Image(view, _) => Some(view.chain().data_file(piece.depth)),
            Disk::Raw(file, _) => Some(file.as_ref()),
            Disk::Foreign(_) => None,
        }
    }
}

fn advise_raw(failure: Failure, path: &Path) -> Failure {
    if path.is_file() {
        return failure.advising("say which format it has: formats are never guessed");
    }
    failure
}

fn cannot_read(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, "cannot read the file").caused_by(error)
}

/// A walk over a disk.
#[derive(Debug)]
pub struct Pieces<'a> {
    disk: &'a Disk,
    walk: Option<Walk<'a>>,
}

impl Pieces<'_> {
    /// The piece that starts at `at`; past the end everything is zeros.
    ///
    /// # Errors
    /// If the image or file cannot be looked at.
    pub fn at(&mut self, at: u64) -> pcow_format::Result<Piece> {
        let size = self.disk.size();
        if at >= size {
            return Ok(Piece::zeros(at..u64::MAX));
        }
        match self.disk {
            Disk::Raw(file, _) => raw_piece(file.as_ref(), at, size),
            Disk::Foreign(access) => {
                let (end, is_data) = foreign::piece(access, at, size).map_err(cannot_read)?;
                Ok(Piece {
                    is_data,
                    ..Piece::zeros(at..end)
                })
            }
            Disk::Image(view, _) => {
                let Some(walk) = &mut self.walk else {
                    return Ok(Piece::zeros(at..size));
                };
                let piece = walk.piece(at)?;
                Ok(Piece {
                    bytes: piece.bytes,
                    is_data: piece.depth.is_some(),
                    layer: piece.depth.and_then(|d| view.sealed_layer(d)),
                    depth: piece.depth.unwrap_or(0),
                })
            }
        }
    }
}

fn raw_piece(file: &dyn File, at: u64, size: u64) -> pcow_format::Result<Piece> {
    Ok(match file.next_data(at).map_err(cannot_read)? {
        Some(data) if data.start <= at => Piece {
            bytes: at..data.end.min(size),
            is_data: true,
            layer: None,
            depth: 0,
        },
        Some(data) => Piece::zeros(at..data.start.min(size)),
        None => Piece::zeros(at..size),
    })
}

impl Piece {
    fn zeros(bytes: Range<u64>) -> Self {
        Self {
            bytes,
            is_data: false,
            layer: None,
            depth: 0,
        }
    }
}

impl Failure {
    /// Something was refused or went wrong.
    pub fn refused(message: String) -> Self {
        Self::Refused {
            message,
            advice: None,
            status: Status::Failed,
        }
    }
}
