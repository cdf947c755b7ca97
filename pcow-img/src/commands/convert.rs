// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `convert`: a disk in another form.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use pcow_format::medium::real::RealFile;
use pcow_format::medium::{File, Site};
use pcow_format::ops::{NewImage, create_filled};
use pcow_format::{ClusterSize, DEFAULT_CLUSTER_BYTES, SIZE_STEP_BYTES};
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::disk::{Disk, Format};
use crate::failure::{Doing, Failure};
use crate::foreign;
use crate::progress::Progress;
use crate::size::{self, Bytes};
use crate::temporary::{Temporary, cannot_write};

/// Copy a disk into another format, or out of a snapshot
///
/// Formats are never guessed: pcow is meant unless -f or -O says otherwise. Holes are not read and stay holes; the rest
/// is shared or copied by the filesystem where it can. qcow2 and flat VMDK are read directly. They are written through
/// qemu-img, which must be there for that, by way of a raw file beside the target; so are other kinds of VMDK and qcow2 with
/// subclusters read, by way of one in TMPDIR. Files that a file refers to must be beside it, or below a --base-dir, and their
/// format must be said.
///
/// The target appears when it is complete, or not at all. With -n an existing raw file is written to in place.
#[derive(Debug, Args)]
pub struct Convert {
    /// What to copy: IMAGE, IMAGE@SNAPSHOT, or a file of the format of -f
    source: OsString,

    /// The new image or file
    target: PathBuf,

    /// Format of the source
    #[arg(
        short = 'f',
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "pcow"
    )]
    format: Format,

    /// Format of the target
    #[arg(
        short = 'O',
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "pcow"
    )]
    target_format: Format,

    /// Write to a raw file that is there; what is cut off leaves it written in part
    #[arg(short = 'n', long)]
    no_create: bool,

    /// Cluster size of a new pcow image [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = size::cluster)]
    cluster_size: Option<ClusterSize>,
}

/// What `convert` made.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    /// The new image or file.
    filename: PathBuf,
    /// Its format.
    format: &'static str,
    /// Size of its disk in bytes.
    virtual_size: u64,
    /// Bytes that were copied; the rest are holes.
    copied_size: u64,
}

const PURPOSE: &str = "cannot convert";
/// Bytes copied at a time.
const STEP_BYTES: u64 = 64 << 20;
/// Bytes read at a time where the filesystem cannot copy.
const READ_BYTES: u64 = 1 << 20;

impl Convert {
    /// Converts.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let is_raw = self.target_format == Format::Raw;
        if self.no_create && !is_raw {
            let what = "only a raw file can be written to in place: -n goes with -O raw";
            return Err(Failure::usage(what));
        }
        if self.cluster_size.is_some() && self.target_format != Format::Pcow {
            return Err(Failure::usage("--cluster-size goes with -O pcow"));
        }
        if !self.no_create && self.target.symlink_metadata().is_ok() {
            let what = format!("{PURPOSE}: {} exists already", self.target.display());
            let advice = if is_raw {
                "choose another name, or write to it in place with -n"
            } else {
                "choose another name"
            };
            return Err(Failure::refused(what).advising(advice));
        }
        let source = Disk::open(&self.source, self.format, &global.base_dirs, PURPOSE)?;
        let mut progress = Progress::new(source.size(), global.quiet);
        let mut copied = 0;
        let virtual_size = match self.target_format {
            Format::Pcow => self.make_image(&source, global, &mut progress, &mut copied)?,
            Format::Raw if self.no_create => {
                self.write_over(&source, &mut progress, &mut copied)?;
                source.size()
            }
            Format::Raw => {
                let part = Temporary::beside(&self.target);
                let _open = make_raw(&part.0, &source, &mut progress, &mut copied)?;
                part.settle(&self.target)?;
                source.size()
            }
            Format::Qcow2 | Format::Vmdk => {
                self.make_foreign(&source, &mut progress, &mut copied)?;
                source.size()
            }
        };
        console.confirm(&Done {
            filename: self.target,
            format: self.target_format.name(),
            virtual_size,
            copied_size: copied,
        })
    }

    /// A disk whose size no image can have gets zeros at its end.
    fn make_image(
        &self,
        source: &Disk,
        global: &Global,
        progress: &mut Progress,
        copied: &mut u64,
    ) -> Result<u64, Failure> {
        let size = source.size().max(1).next_multiple_of(SIZE_STEP_BYTES);
        let size = size::virtual_size(size).map_err(Failure::refused)?;
        let cluster = self
            .cluster_size
            .map_or_else(|| ClusterSize::new(DEFAULT_CLUSTER_BYTES), Ok);
        let context = || format!("{PURPOSE} {}", self.source.display());
        let new = NewImage {
            size: Some(size),
            cluster: cluster.doing(context)?,
            allocation_unit: None,
            base: None,
        };
        let fill = &mut |image: &pcow_format::Image| {
            copy(source, progress, copied, &mut |chunk| match chunk {
                Chunk::In(file, range) => image.import(file, range),
                Chunk::Bytes(at, bytes) => image.write(at, bytes),
            })
        };
        create_filled(&self.target, &new, &global.base_dirs, fill).doing(context)?;
        Ok(size.bytes())
    }

    /// By way of a raw file, unless there is one already.
    fn make_foreign(
        &self,
        source: &Disk,
        progress: &mut Progress,
        copied: &mut u64,
    ) -> Result<(), Failure> {
        let part = Temporary::beside(&self.target);
        let to = (part.0.as_path(), self.target_format);
        if self.format == Format::Raw {
            foreign::convert((Path::new(&self.source), Format::Raw), to, PURPOSE)?;
            *copied = bytes_of_data(source).doing(|| PURPOSE.to_owned())?;
        } else {
            let raw = Temporary::beside(&self.target);
            make_raw(&raw.0, source, progress, copied)?;
            foreign::convert((&raw.0, Format::Raw), to, PURPOSE)?;
        }
        part.settle(&self.target)
    }

    /// In place: also zeros are written, as holes.
    fn write_over(
        &self,
        source: &Disk,
        progress: &mut Progress,
        copied: &mut u64,
    ) -> Result<(), Failure> {
        let fail = |e: std::io::Error| cannot_write(&self.target, &e);
        let target = RealFile::open_raw_for_writing(&self.target).map_err(fail)?;
        let room = target.status().map_err(fail)?.len;
        if room < source.size() {
            return Err(Failure::refused(format!(
                "{PURPOSE}: {} has {room} bytes, the source {}",
                self.target.display(),
                source.size()
            )));
        }
        if room > 0 {
            target.punch(Site("convert.punch"), 0..room).map_err(fail)?;
        }
        copy_to_file(source, target.as_ref(), progress, copied)?;
        target.sync_data(Site("convert.sync")).map_err(fail)
    }
}

/// Something to be copied.
enum Chunk<'a> {
    /// A range of a file, to the same offset.
    In(&'a dyn File, std::ops::Range<u64>),
    /// Bytes for an offset.
    Bytes(u64, &'a [u8]),
}

/// Puts a chunk into the target.
type Take<'a> = &'a mut dyn FnMut(Chunk<'_>) -> pcow_format::Result<()>;

/// Copies what is data of `source`; everything else is a hole of the target already.
fn copy(
    source: &Disk,
    progress: &mut Progress,
    copied: &mut u64,
    take: Take<'_>,
) -> pcow_format::Result<()> {
    let mut pieces = source.pieces();
    let mut buf = Vec::new();
    let mut at = 0;
    while at < source.size() {
        let piece = pieces.at(at)?;
        let mut end = piece.bytes.end;
        if let (true, Some(file)) = (piece.is_data, source.file_of(&piece)) {
            end = end.min(at + STEP_BYTES);
            take(Chunk::In(file, at..end))?;
            *copied += end - at;
        } else if piece.is_data {
            end = end.min(at + READ_BYTES);
            buf.resize(usize::try_from(end - at).unwrap_or(usize::MAX), 0);
            source.read(at, &mut buf)?;
            take(Chunk::Bytes(at, &buf))?;
            *copied += end - at;
        }
        at = end;
        progress.reach(at);
    }
    Ok(())
}

fn bytes_of_data(source: &Disk) -> pcow_format::Result<u64> {
    let mut sum = 0;
    let mut progress = Progress::new(0, true);
    copy(source, &mut progress, &mut sum, &mut |_| Ok(()))?;
    Ok(sum)
}

fn make_raw(
    path: &Path,
    source: &Disk,
    progress: &mut Progress,
    copied: &mut u64,
) -> Result<Arc<dyn File>, Failure> {
    let fail = |e: std::io::Error| cannot_write(path, &e);
    let target = RealFile::create_raw(path).map_err(fail)?;
    let site = Site("convert.len");
    target.set_len(site, source.size()).map_err(fail)?;
    copy_to_file(source, target.as_ref(), progress, copied)?;
    target.sync_data(Site("convert.sync")).map_err(fail)?;
    Ok(target)
}

fn copy_to_file(
    source: &Disk,
    target: &dyn File,
    progress: &mut Progress,
    copied: &mut u64,
) -> Result<(), Failure> {
    copy(source, progress, copied, &mut |chunk| {
        let done = match chunk {
            Chunk::In(file, range) => target.copy_from(Site("convert.copy"), file, range),
            Chunk::Bytes(at, bytes) => target.write_at(Site("convert.write"), bytes, at),
        };
        done.map_err(|e| {
            let kind = pcow_format::ErrorKind::Io;
            pcow_format::Error::new(kind, "cannot write the target").caused_by(e)
        })
    })
    .doing(|| PURPOSE.to_owned())
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "made {} ({}): {}, of which {} are data",
            self.filename.display(),
            self.format,
            Bytes(self.virtual_size),
            Bytes(self.copied_size)
        )
    }
}
