// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The two files of a layer: their names, creation, checks on opening, checksum, adoption into another image.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::chain;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::map::{self, HEADER_BYTES, Header, TAG_OFFSET, Tag};
use crate::medium::real::{RealDirectory, RealFile};
use crate::medium::{Access, Directory, Domain, File, Site, read_exact_at};
use crate::root::{Kind, Layer};
use crate::units;

const PAGE: usize = 4096;
/// Bytes copied at a time.
const COPY_BYTES: u64 = 1 << 20;
/// Bytes of a map read at a time for its checksum: whole pages.
const SUM_BYTES: usize = 16 * PAGE;
/// What one entry of a second-level page table maps.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Name of a layer's map file.
pub fn map_name(layer: Uuid) -> String {
    format!("{layer}.map")
}

/// Name of a layer's data file.
pub fn data_name(layer: Uuid) -> String {
    format!("{layer}.data")
}

/// Where the files of bases outside the image are, and which may be opened.
#[derive(Debug, Clone)]
pub struct BaseDirs(Places);

#[derive(Debug, Clone)]
enum Places {
    /// Directories of the machine.
    Below(Vec<PathBuf>),
    /// The entries of one directory of any medium.
    In(Arc<dyn Directory>),
}

impl BaseDirs {
    /// Directories below which bases may be opened. Those that do not exist allow nothing.
    pub fn new<'a>(directories: impl IntoIterator<Item = &'a Path>) -> Self {
        let real = directories
            .into_iter()
            .filter_map(|d| d.canonicalize().ok());
        Self(Places::Below(real.collect()))
    }

    /// Bases are the entries of `directory`, and their paths are names in it.
    pub fn in_directory(directory: Arc<dyn Directory>) -> Self {
        Self(Places::In(directory))
    }

    /// For a base at `path`: its own bases may lie beside it, and where those of the image may.
    pub(crate) fn of_base(&self, path: &Path) -> Self {
        match &self.0 {
            Places::Below(allowed) => {
                let beside = path.join("..");
                Self::new(
                    allowed
                        .iter()
                        .map(PathBuf::as_path)
                        .chain([beside.as_path()]),
                )
            }
            Places::In(_) => self.clone(),
        }
    }

    /// The path under which an image may record the base that its user calls `path`.
    ///
    /// # Errors
    /// `BaseMissing`.
    pub(crate) fn absolute(&self, path: &Path) -> Result<PathBuf> {
        match &self.0 {
            Places::Below(_) => canonical(path),
            // That directory is all there is: its names are the absolute paths.
            Places::In(_) => Ok(Path::new("/").join(path)),
        }
    }

    /// Opens the directory of a base that the user names, wherever it is.
    ///
    /// # Errors
    /// `BaseMissing`.
    pub(crate) fn open_named(&self, path: &Path) -> Result<Arc<dyn Directory>> {
        let opened = match &self.0 {
            Places::Below(_) => RealDirectory::open(path).map(|d| d as Arc<dyn Directory>),
            Places::In(directory) => directory.open_dir(&name_in_it(path)),
        };
        opened.map_err(|e| {
            let what = format!("cannot open the base {}", path.display());
            Error::new(ErrorKind::BaseMissing, what).caused_by(e)
        })
    }

    /// Checks that `path` lies below an allowed directory.
    fn resolve(&self, path: &Path) -> Result<PathBuf> {
        let real = self.absolute(path)?;
        match &self.0 {
            Places::Below(allowed) if !allowed.iter().any(|dir| real.starts_with(dir)) => {
                let what = format!(
                    "the base {} is outside the directories that this image may use",
                    real.display()
                );
                Err(Error::new(ErrorKind::BaseForbidden, what))
            }
            _ => Ok(real),
        }
    }

    fn open_dir(&self, path: &Path) -> Result<Arc<dyn Directory>> {
        self.open_named(&self.resolve(path)?)
    }

    fn open_raw(&self, path: &Path) -> Result<Arc<dyn File>> {
        let path = self.resolve(path)?;
        let opened = self.open_raw_named(&path);
        opened.context(|| format!("cannot open the base {}", path.display()))
    }

    /// Opens a raw base that the user names, wherever it is.
    pub(crate) fn open_raw_named(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        match &self.0 {
            Places::Below(_) => RealFile::open_raw(path),
            Places::In(directory) => directory.open(&name_in_it(path), Access::Read),
        }
    }

    /// The directory that a raw base is in; `None` if this process may not read it.
    pub(crate) fn directory_of_raw(&self, path: &Path) -> io::Result<Option<Arc<dyn Directory>>> {
        let (directory, parent) = match (&self.0, path.parent()) {
            (Places::In(directory), _) => return Ok(Some(Arc::clone(directory))),
            (Places::Below(_), None) => return Ok(None),
            (Places::Below(_), Some(parent)) => (RealDirectory::open(parent), parent),
        };
        match directory {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                log::debug!("{}: {e}", parent.display());
                Ok(None)
            }
            opened => opened.map(|d| Some(d as Arc<dyn Directory>)),
        }
    }
}

/// What `path` is called in the one directory that there is.
fn name_in_it(path: &Path) -> String {
    let name = path.strip_prefix("/").unwrap_or(path);
    name.to_string_lossy().into_owned()
}

fn canonical(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|e| {
        let what = format!("the base {} is not there", path.display());
        Error::new(ErrorKind::BaseMissing, what).caused_by(e)
    })
}

/// The map and data file of one layer.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) map: Arc<dyn File>,
    pub(crate) data: Arc<dyn File>,
}

/// Creates the empty files of `layer` in `dir`: complete and durable when this returns, names included (I4).
pub(crate) fn create(dir: &dyn Directory, layer: &Layer, image: Uuid, boot: Uuid) -> Result<Pair> {
    let context = || format!("cannot create the files of layer {}", layer.uuid);
    let (size, cluster) = (layer.size()?, layer.cluster()?);
    let data = dir
        .create(Site("layer.data.create"), &data_name(layer.uuid))
        .context(context)?;
    data.set_len(Site("layer.data.len"), size.bytes())
        .context(context)?;
    let map = dir
        .create(Site("layer.map.create"), &map_name(layer.uuid))
        .context(context)?;
    let map_bytes = map::file_bytes(size, cluster);
    map.set_len(Site("layer.map.len"), map_bytes)
        .context(context)?;
    let header = Header {
        layer: layer.uuid,
        parent: layer.parent,
        image,
        size,
        cluster,
        clip: layer.clip,
    };
    map.write_at(Site("layer.map.header"), &header.encode(), 0)
        .context(context)?;
    if map.domain().context(context)? == Domain::Dax {
        // Written blocks: a store to them needs no journal commit and cannot meet a full filesystem.
        write_zeros(map.as_ref(), map::WORDS_OFFSET..map_bytes).context(context)?;
    } else {
        let tag = Tag::new(boot, map.status().context(context)?.identity);
        map.write_at(Site("layer.map.tag"), &tag.encode(), TAG_OFFSET)
            .context(context)?;
    }
    data.sync_data(Site("layer.data.sync")).context(context)?;
    map.sync_data(Site("layer.map.sync")).context(context)?;
    dir.sync(Site("layer.dir.sync")).context(context)?;
    Ok(Pair { map, data })
}

/// Asks for extents that huge pages can map, if `unit` is what is allocated at least in the new data file `data`. On the
/// page cache's filesystems, and for smaller units, such extents would only take space.
///
/// Best effort: without them the kernel maps small pages.
pub(crate) fn prefer_huge_extents(data: &dyn File, unit: u64) {
    if unit < HUGE_PAGE_BYTES || !data.domain().is_ok_and(|d| d == Domain::Dax) {
        return;
    }
    if let Err(e) = data.prefer_extents(HUGE_PAGE_BYTES) {
        log::debug!("no hint for aligned extents: {e}");
    }
}

fn write_zeros(file: &dyn File, range: std::ops::Range<u64>) -> std::io::Result<()> {
    let zeros = vec![0; units::len(COPY_BYTES)];
    let mut at = range.start;
    while at < range.end {
        let n = COPY_BYTES.min(range.end - at);
        file.write_at(Site("layer.map.zeros"), &zeros[..units::len(n)], at)?;
        at += n;
    }
    Ok(())
}

/// Opens the files of the image's own layer `layer`, checked against the layer table.
pub(crate) fn open_own(dir: &dyn Directory, layer: &Layer, access: Access) -> Result<Pair> {
    let open = |name: String| {
        dir.open(&name, access).map_err(|e| {
            let kind = match (e.kind(), layer.sealed) {
                (std::io::ErrorKind::NotFound, true) => ErrorKind::BaseMissing,
                (std::io::ErrorKind::NotFound, false) => ErrorKind::Corrupt,
                _ => ErrorKind::Io,
            };
            Error::new(kind, format!("cannot open the layer file {name}")).caused_by(e)
        })
    };
    let pair = Pair {
        map: open(map_name(layer.uuid))?,
        data: open(data_name(layer.uuid))?,
    };
    check_pair(&pair, layer)?;
    Ok(pair)
}

/// Checks order: length, header, then the header against the table.
fn check_pair(pair: &Pair, layer: &Layer) -> Result<()> {
    let context = || format!("cannot inspect the files of layer {}", layer.uuid);
    let (size, cluster) = (layer.size()?, layer.cluster()?);
    let lengths = [
        (
            pair.map.status().context(context)?.len,
            map::file_bytes(size, cluster),
            map_name(layer.uuid),
        ),
        (
            pair.data.status().context(context)?.len,
            size.bytes(),
            data_name(layer.uuid),
        ),
    ];
    for (found, expected, name) in lengths {
        if found != expected {
            let what = format!("{name} has {found} bytes, not the {expected} that it must have");
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
    }
    let header = read_header(pair.map.as_ref(), layer.uuid)?;
    if header.layer != layer.uuid || header.size != size || header.cluster != cluster {
        let what = format!("{} belongs to another layer", map_name(layer.uuid));
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    Ok(())
}

fn read_header(map: &dyn File, layer: Uuid) -> Result<Header> {
    let mut raw = [0; HEADER_BYTES];
    read_exact_at(map, &mut raw, 0).context(|| format!("cannot read {}", map_name(layer)))?;
    Header::decode(&raw)
}

/// The map and data file of `layer`, wherever they are; `None` for a raw base.
pub(crate) fn open_pair(
    dir: &dyn Directory,
    layer: &Layer,
    bases: &BaseDirs,
) -> Result<Option<Pair>> {
    match &layer.kind {
        Kind::Own => open_own(dir, layer, Access::Read).map(Some),
        Kind::Reference { directory } => {
            let dir = bases.open_dir(directory)?;
            open_own(dir.as_ref(), layer, Access::Read).map(Some)
        }
        Kind::Raw { .. } => Ok(None),
    }
}

/// Opens `layer` for reading, wherever it is. `boot` tells whether live words of an active layer count.
pub(crate) fn open_for_reading(
    dir: &dyn Directory,
    layer: &Layer,
    bases: &BaseDirs,
    boot: Uuid,
) -> Result<chain::Layer> {
    let content = match (open_pair(dir, layer, bases)?, &layer.kind) {
        (Some(pair), _) => pcow_content(pair, layer, boot)?,
        (None, Kind::Raw { path, .. }) => raw_content(bases.open_raw(path)?, &layer.kind)?,
        (None, _) => return Err(Error::new(ErrorKind::Corrupt, "a layer without files")),
    };
    Ok(chain::Layer {
        name: layer.uuid.to_string(),
        cluster: layer.cluster()?,
        virtual_bytes: layer.virtual_size,
        clip: layer.clip,
        content,
    })
}

fn pcow_content(pair: Pair, layer: &Layer, boot: Uuid) -> Result<chain::Content> {
    let live_is_data = !layer.sealed && tag_is_of_this_boot(pair.map.as_ref(), boot)?;
    Ok(chain::Content::Pcow {
        map: pair.map,
        data: pair.data,
        live_is_data,
    })
}

fn tag_is_of_this_boot(map: &dyn File, boot: Uuid) -> Result<bool> {
    let mut raw = [0; map::TAG_BYTES];
    let context = || "cannot read a boot tag".to_owned();
    read_exact_at(map, &mut raw, TAG_OFFSET).context(context)?;
    let present = Tag::new(boot, map.status().context(context)?.identity);
    Ok(Tag::decode(&raw) == Some(present))
}

fn raw_content(file: Arc<dyn File>, recorded: &Kind) -> Result<chain::Content> {
    let Kind::Raw { path, .. } = recorded else {
        return Err(Error::new(ErrorKind::Corrupt, "not a raw layer"));
    };
    let present = raw_kind(file.as_ref(), path)?;
    if present != *recorded {
        let what = format!("the raw base {} was changed or replaced", path.display());
        return Err(Error::new(ErrorKind::BaseChanged, what));
    }
    let bytes = file
        .status()
        .context(|| format!("cannot inspect {}", path.display()))?
        .len;
    Ok(chain::Content::Raw { file, bytes })
}

/// What identifies the raw file at `path` now.
pub(crate) fn raw_kind(file: &dyn File, path: &Path) -> Result<Kind> {
    let status = file
        .status()
        .context(|| format!("cannot inspect {}", path.display()))?;
    Ok(Kind::Raw {
        path: path.to_owned(),
        device: status.identity.device,
        inode: status.identity.inode,
        size: status.len,
        // Times outside of the years 1677 to 2262 are all alike.
        mtime_ns: i64::try_from(status.mtime_ns).unwrap_or(i64::MAX),
    })
}

/// Checksum of a sealed map: CRC-32C over number (u64) and content of every 4 KiB page that is not all zero.
///
/// # Errors
/// As reading the file.
pub(crate) fn map_checksum(map: &dyn File) -> std::io::Result<String> {
    let page_bytes = units::bytes(PAGE);
    let mut sum = 0;
    let mut at = 0;
    let mut buf = vec![0; SUM_BYTES];
    while let Some(data) = map.next_data(at)? {
        at = (data.start / page_bytes * page_bytes).max(at);
        let end = data.end.next_multiple_of(page_bytes);
        while at < end {
            let pages = &mut buf[..units::len((end - at).min(units::bytes(SUM_BYTES)))];
            read_exact_at(map, pages, at)?;
            for page in pages.as_chunks::<PAGE>().0 {
                if *page != [0; PAGE] {
                    sum = crc32c::crc32c_append(sum, &(at / page_bytes).to_le_bytes());
                    sum = crc32c::crc32c_append(sum, page);
                }
                at += page_bytes;
            }
        }
    }
    Ok(format!("crc32c-{sum:08x}"))
}

/// As [`map_checksum`], for the map of `layer`.
pub(crate) fn map_sum(layer: Uuid, map: &dyn File) -> Result<String> {
    map_checksum(map).context(|| format!("cannot read {}", map_name(layer)))
}

/// How the files of a layer came into another image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adopted {
    /// By a second name for the same file: no space taken.
    Linked,
    /// By copying, `bytes` of them.
    Copied {
        /// Bytes of content copied.
        bytes: u64,
    },
}

/// Gives the sealed layer `layer` of the directory `from` a place in `to`, whose root does not name it: by link, else
/// by copy. Replaces what an adoption that was cut off left there: a layer's name is its content (I0).
pub(crate) fn adopt(to: &dyn Directory, from: &dyn Directory, layer: Uuid) -> Result<Adopted> {
    let mut copied = 0;
    for name in [data_name(layer), map_name(layer)] {
        match to.unlink(Site("adopt.unlink"), &name) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).context(|| format!("cannot replace {name}"));
            }
            _ => {}
        }
        match to.link(Site("adopt.link"), from, &name, &name) {
            Ok(()) => {}
            // Another filesystem, a file of another user, or too many names.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EXDEV | libc::EPERM | libc::EMLINK | libc::EOPNOTSUPP)
                ) =>
            {
                copied += copy(to, from, &name).context(|| format!("cannot copy {name}"))?;
            }
            Err(e) => return Err(e).context(|| format!("cannot link {name}")),
        }
    }
    Ok(match copied {
        0 => Adopted::Linked,
        bytes => Adopted::Copied { bytes },
    })
}

fn copy(to: &dyn Directory, from: &dyn Directory, name: &str) -> std::io::Result<u64> {
    let source = from.open(name, Access::Read)?;
    let target = to.create(Site("adopt.copy.create"), name)?;
    let len = source.status()?.len;
    target.set_len(Site("adopt.copy.len"), len)?;
    let mut buf = vec![0; units::len(COPY_BYTES)];
    let (mut at, mut copied) = (0, 0);
    while let Some(data) = source.next_data(at)? {
        at = data.start;
        while at < data.end {
            let n = COPY_BYTES.min(data.end - at);
            read_exact_at(source.as_ref(), &mut buf[..units::len(n)], at)?;
            target.write_at(Site("adopt.copy.write"), &buf[..units::len(n)], at)?;
            at += n;
            copied += n;
        }
    }
    target.sync_data(Site("adopt.copy.sync"))?;
    Ok(copied)
}
