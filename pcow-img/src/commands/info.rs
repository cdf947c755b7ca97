// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `info`: what an image is, what it takes, what it is made of and what it promises.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;
use pcow_format::info::Usage;
use pcow_format::medium::Domain;
use pcow_format::root::{self, Kind};
use pcow_format::{Stored, holder};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure, Status, one_line};
use crate::layers::{self, LayerInfo};
use crate::live::Backend;
use crate::open;
use crate::size::Bytes;
use crate::snapshots::SnapshotInfo;

/// Show what an image is, what it takes on disk, its layers, and what it promises
#[derive(Debug, Args)]
pub struct Info {
    /// The image
    image: PathBuf,
    /// Show every base outside of the image's directory, too, the uppermost first; in JSON, an array
    #[arg(long, alias = "backing-chain")]
    chain: bool,
}

/// The answer of `info`. Fields that `qemu-img info` has, too, mean the same.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    /// The image's directory.
    filename: PathBuf,
    /// Always `pcow`.
    format: &'static str,
    /// Version of the format.
    format_version: u32,
    /// Identity of the image.
    uuid: Uuid,
    /// Size of the disk in bytes.
    virtual_size: u64,
    /// Bytes that the layers take in the image's directory.
    actual_size: u64,
    /// Of these, bytes in files that no other image has.
    exclusive_size: u64,
    /// Of these, bytes in files that other images have, too.
    shared_size: u64,
    /// Size of the clusters in bytes.
    cluster_size: u64,
    /// Bytes that an allocation covers at least.
    allocation_unit: u64,
    /// The uppermost base that lies outside of the image's directory; absent if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<PathBuf>,
    /// Its format, `pcow` or `raw`.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<&'static str>,
    /// Snapshots in the order of their numbers.
    snapshots: Vec<SnapshotInfo>,
    /// What the disk shows where the image itself was not written, uppermost first.
    bases: Vec<BaseInfo>,
    /// All layers.
    layers: Vec<LayerInfo>,
    /// `page-cache` or `dax`; null if it could not be found out.
    persistence_domain: Option<&'static str>,
    /// Whether what a guest has flushed through an nvdimm outlasts a power loss; null if that could not be found out.
    guest_flush_is_durable: Option<bool>,
    /// What keeps the image from DAX on a device that could do it; absent if nothing does.
    #[serde(skip_serializing_if = "Option::is_none")]
    dax_hindrance: Option<String>,
    /// The process that has the image open for writing, or null.
    in_use_by: Option<String>,
    /// What the backend that serves the image says of itself; null if none does.
    backend: Option<BackendInfo>,
    /// What keeps the disk from being read or written now.
    problems: Vec<String>,
    #[serde(skip)]
    picture: Vec<String>,
}

/// A backend, as it says.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct BackendInfo {
    /// Its process.
    process: u64,
    /// Whether a frontend is attached.
    attached: bool,
    /// What `query-stats` of docs/control.md says of the session; null without one.
    session: Value,
}

impl BackendInfo {
    fn new(mut backend: Backend) -> Option<Self> {
        let session = backend.ask("query-stats")?["session"].take();
        Some(Self {
            process: backend.process(),
            attached: !session.is_null(),
            session,
        })
    }
}

impl fmt::Display for BackendInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}, ", self.process)?;
        if !self.attached {
            return f.write_str("no frontend attached");
        }
        let direction = self.session["direction"].as_str().unwrap_or("not known");
        write!(
            f,
            "frontend attached, loads and stores told apart: {direction}"
        )?;
        match self.session["waiting"].as_u64() {
            Some(0) | None => Ok(()),
            Some(n) => write!(f, "; the guest waits at {n} places, most often for space"),
        }
    }
}

/// A base of the active layer.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct BaseInfo {
    /// `pcow` or `raw`.
    format: &'static str,
    /// How it is used.
    usage: BaseUsage,
    /// Where it is; null for one whose layers are in the image's own directory.
    filename: Option<PathBuf>,
    /// UUID of the image that adopted layers come from; null for the others.
    image: Option<Uuid>,
    /// How many of its layers are in the chain.
    layers: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum BaseUsage {
    /// Its layers are in the image's own directory: the base may be moved or deleted.
    Adopted,
    /// Its files are needed where they are.
    Referenced,
}

const PURPOSE: &str = "cannot show";

impl Info {
    /// Shows the image.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        let mut info = ImageInfo::of(&stored, &self.image)?;
        info.backend = Backend::find_to_ask(&self.image, global).and_then(BackendInfo::new);
        if !self.chain {
            return console.show(&info);
        }
        let bases: Vec<_> = info
            .bases
            .iter()
            .filter_map(|base| Some((base.format, base.filename.clone()?)))
            .collect();
        let mut links = vec![Link::Image(Box::new(info))];
        for (format, path) in bases {
            links.push(if format == "raw" {
                Link::Raw(RawInfo::of(&path)?)
            } else {
                let stored = open::for_reading(&path, &global.base_dirs, PURPOSE)?;
                Link::Image(Box::new(ImageInfo::of(&stored, &path)?))
            });
        }
        console.show(&Links(links))
    }
}

/// An image and what lies below it.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Links(Vec<Link>);

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Link {
    Image(Box<ImageInfo>),
    Raw(RawInfo),
}

/// A base that is a file of bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct RawInfo {
    /// The file.
    filename: PathBuf,
    /// Always `raw`.
    format: &'static str,
    /// Its size in bytes.
    virtual_size: u64,
    /// Bytes that it takes.
    actual_size: u64,
}

impl RawInfo {
    fn of(path: &Path) -> Result<Self, Failure> {
        let status = path.metadata().map_err(|e| Failure::Refused {
            message: format!("{PURPOSE} {}: {e}", path.display()),
            advice: None,
            status: Status::Failed,
        })?;
        Ok(Self {
            filename: path.to_owned(),
            format: "raw",
            virtual_size: status.len(),
            actual_size: status.blocks() * 512,
        })
    }
}

impl fmt::Display for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, link) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            match link {
                Link::Image(info) => info.fmt(f)?,
                Link::Raw(info) => info.fmt(f)?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for RawInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, text: &dyn fmt::Display| writeln!(f, "{name:<17} {text}");
        let size = self.virtual_size;
        row("image:", &self.filename.display())?;
        row("format:", &self.format)?;
        row(
            "virtual size:",
            &format_args!("{} ({size} bytes)", Bytes(size)),
        )?;
        row("size on disk:", &Bytes(self.actual_size))
    }
}

impl ImageInfo {
    fn of(stored: &Stored, path: &Path) -> Result<Self, Failure> {
        Self::new(stored, path).doing(|| format!("{PURPOSE} {}", path.display()))
    }

    fn new(stored: &Stored, path: &Path) -> pcow_format::Result<Self> {
        let root = stored.root();
        let active = root.active_layer()?;
        let (bases, not_known) = bases(stored)?;
        let outside = bases.iter().find(|b| b.usage == BaseUsage::Referenced);
        let layers: Vec<_> = root
            .layers
            .iter()
            .map(|layer| layers::describe(stored, layer, path))
            .collect();
        let usage = total(&layers);
        let domain = stored.domain();
        let mut problems = problems(stored);
        problems.extend(domain.as_ref().err().and_then(unknown_domain));
        // What keeps the chain from being opened may keep the bases from being known as well.
        let new = |what: &String| !problems.contains(what);
        let not_known: Vec<_> = not_known.into_iter().filter(new).collect();
        problems.extend(not_known);
        let domain = domain.ok();
        Ok(Self {
            filename: path.to_owned(),
            format: "pcow",
            format_version: root.version,
            uuid: root.uuid,
            virtual_size: active.virtual_size,
            actual_size: usage.total(),
            exclusive_size: usage.exclusive,
            shared_size: usage.shared,
            cluster_size: active.cluster_size,
            allocation_unit: root.allocation_unit,
            backing_filename: outside.and_then(|b| b.filename.clone()),
            backing_filename_format: outside.map(|b| b.format),
            snapshots: root.snapshots.iter().map(SnapshotInfo::from).collect(),
            persistence_domain: domain.map(Domain::name),
            guest_flush_is_durable: domain.map(|d| d == Domain::Dax),
            backend: None,
            in_use_by: holder(stored.directory())?.map(|holder| holder.to_string()),
            dax_hindrance: hindrance(stored),
            problems,
            picture: layers::draw_all(stored, &layers),
            bases,
            layers,
        })
    }
}

fn total(layers: &[LayerInfo]) -> Usage {
    let usage = |l: &LayerInfo| Usage {
        exclusive: l.exclusive_size.unwrap_or(0),
        shared: l.shared_size.unwrap_or(0),
    };
    layers
        .iter()
        .map(usage)
        .fold(Usage::default(), |a, b| a + b)
}

/// What opening the disk would meet.
fn problems(stored: &Stored) -> Vec<String> {
    let below = stored.chain(stored.root().active).err();
    let flush = stored.refuse_after_failed_flush().err();
    below.iter().chain(&flush).map(with_advice).collect()
}

fn with_advice(error: &pcow_format::Error) -> String {
    match error.advice() {
        Some(advice) => format!("{}; {advice}", one_line(error)),
        None => one_line(error),
    }
}

/// Why the persistence domain is not known, unless it is that this user may not write the image, which is no problem of it.
fn unknown_domain(error: &pcow_format::Error) -> Option<String> {
    let cause = std::error::Error::source(error).and_then(|e| e.downcast_ref::<io::Error>());
    let may_not_write = cause.is_some_and(|e| {
        let kinds = [
            io::ErrorKind::PermissionDenied,
            io::ErrorKind::ReadOnlyFilesystem,
        ];
        kinds.contains(&e.kind())
    });
    (!may_not_write).then(|| with_advice(error))
}

fn hindrance(stored: &Stored) -> Option<String> {
    let (file, hindrance) = stored.dax_hindrance().ok()??;
    let advice = hindrance.advice();
    let advice = advice.map_or(String::new(), |a| format!("; {a}"));
    Some(format!("{file} {}{advice}", hindrance.reason()))
}

/// The bases of the active layer: neighbouring layers of one origin make one. Also why others are not known.
fn bases(stored: &Stored) -> pcow_format::Result<(Vec<BaseInfo>, Vec<String>)> {
    let (mut bases, mut not_known): (Vec<BaseInfo>, _) = (Vec::new(), Vec::new());
    for layer in stored.root().chain(stored.root().active)? {
        let base = match base_of(stored, layer) {
            Ok(Some(base)) => base,
            Ok(None) => continue,
            Err(e) => {
                not_known.push(with_advice(&e));
                continue;
            }
        };
        let place = |b: &BaseInfo| (b.usage, b.filename.clone(), b.image);
        match bases.last_mut() {
            Some(last) if place(last) == place(&base) => last.layers += 1,
            _ => bases.push(base),
        }
    }
    Ok((bases, not_known))
}

/// The base that `layer` comes from; `None` for what was made in this image.
fn base_of(stored: &Stored, layer: &root::Layer) -> pcow_format::Result<Option<BaseInfo>> {
    let base = |format, usage, filename, image| BaseInfo {
        format,
        usage,
        filename,
        image,
        layers: 1,
    };
    Ok(match &layer.kind {
        Kind::Own => {
            let image = stored.origin(layer)?;
            let adopted = image.is_some_and(|i| i != stored.root().uuid);
            adopted.then(|| base("pcow", BaseUsage::Adopted, None, image))
        }
        Kind::Reference { directory } => {
            let directory = Some(directory.clone());
            Some(base("pcow", BaseUsage::Referenced, directory, None))
        }
        Kind::Raw { path, .. } => {
            let path = Some(path.clone());
            Some(base("raw", BaseUsage::Referenced, path, None))
        }
    })
}

/// What the persistence domain means, in full.
fn promises(info: &ImageInfo) -> &'static [&'static str] {
    match info.guest_flush_is_durable {
        Some(true) => &[
            "DAX",
            "- the crash of a process loses nothing",
            "- what the guest has flushed outlasts a power loss",
        ],
        Some(false) => &[
            "page cache",
            "- the crash of a process, QEMU or the backend, loses nothing",
            "- a power loss loses what was written since the last flush on the host",
            "- the guest's own flushes through an nvdimm are not power-fail safe",
        ],
        None if info.problems.is_empty() => &["not known: only who may write the image can tell"],
        None => &["not known"],
    }
}

impl fmt::Display for ImageInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, text: &dyn fmt::Display| writeln!(f, "{name:<17} {text}");
        row("image:", &self.filename.display())?;
        row(
            "format:",
            &format_args!("pcow, version {}", self.format_version),
        )?;
        let size = self.virtual_size;
        row(
            "virtual size:",
            &format_args!("{} ({size} bytes)", Bytes(size)),
        )?;
        let (exclusive, shared) = (Bytes(self.exclusive_size), Bytes(self.shared_size));
        let total = Bytes(self.actual_size);
        let parts = format_args!("{total} ({exclusive} exclusive, {shared} shared)").to_string();
        row("size on disk:", &parts)?;
        row("cluster size:", &Bytes(self.cluster_size))?;
        row("allocation unit:", &Bytes(self.allocation_unit))?;
        for (index, base) in self.bases.iter().enumerate() {
            row(if index == 0 { "base:" } else { "" }, base)?;
        }
        for (index, line) in promises(self).iter().enumerate() {
            row(if index == 0 { "persistence:" } else { "" }, line)?;
        }
        if let Some(hindrance) = &self.dax_hindrance {
            row("not on DAX:", hindrance)?;
        }
        row("in use by:", &self.in_use_by.as_deref().unwrap_or("nobody"))?;
        if let Some(backend) = &self.backend {
            row("backend:", backend)?;
        }
        for problem in &self.problems {
            row("problem:", problem)?;
        }
        row("layers:", &"(the active one on top)")?;
        self.picture
            .iter()
            .try_for_each(|line| writeln!(f, "  {line}"))
    }
}

impl fmt::Display for BaseInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers = match self.layers {
            1 => "1 layer".to_owned(),
            n => format!("{n} layers"),
        };
        match (&self.filename, self.image) {
            (Some(path), _) if self.format == "raw" => write!(f, "raw file {}", path.display()),
            (Some(path), _) => write!(f, "{layers} of the image {}", path.display()),
            (None, Some(image)) => write!(f, "{layers} of the image {image}, kept in this image"),
            (None, None) => write!(f, "{layers} of an unknown image"),
        }
    }
}
