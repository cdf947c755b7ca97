// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image as it stands ([`Stored`]): its root, which is read and replaced whole, and the world around it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::chain::Chain;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer_files::{self, BaseDirs};
use crate::lock::ImageLock;
use crate::medium::real::RealDirectory;
use crate::medium::{Access, Directory, Site};
use crate::root::{self, Root};
use crate::units::{self, ClusterSize};

/// Name of the root in the image's directory.
pub const ROOT_FILE: &str = "image.json";
/// Name of the mark that a failed flush leaves; who has checked medium and image removes it.
pub const FLUSH_FAILED_FILE: &str = "flush-failed";
pub(crate) const ROOT_PART: &str = "image.json.part";

/// What an image needs to know of the world around it.
#[derive(Debug, Clone)]
pub struct Environment {
    /// Where bases outside the image may be.
    pub bases: BaseDirs,
    /// Identity of this boot of the machine.
    pub boot: Uuid,
}

impl Environment {
    /// For the image at `path`: bases may lie beside it, and below `extra`.
    ///
    /// # Errors
    /// `Io` if the kernel does not tell its boot id.
    pub fn for_image(path: &Path, extra: &[PathBuf]) -> Result<Self> {
        let beside = path.join("..");
        let dirs = extra.iter().map(PathBuf::as_path).chain([beside.as_path()]);
        Ok(Self {
            bases: BaseDirs::new(dirs),
            boot: boot_id()?,
        })
    }
}

/// The kernel's `random/boot_id` (proc(5)).
fn boot_id() -> Result<Uuid> {
    let context = || "cannot read the boot id".to_owned();
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context(context)?;
    Uuid::parse_str(text.trim()).map_err(|e| Error::new(ErrorKind::Io, context()).caused_by(e))
}

/// An image whose root was read and checked. Nothing is locked: what another process writes meanwhile may be missed.
#[derive(Debug)]
pub struct Stored {
    pub(super) dir: Arc<dyn Directory>,
    pub(super) root: Root,
    pub(super) env: Environment,
}

impl Stored {
    /// Opens the image in the directory `path`.
    ///
    /// # Errors
    /// `NotFound`, `NotAnImage`, `Unsupported`, `Corrupt` or `Io`.
    pub fn open(path: &Path, base_dirs: &[PathBuf]) -> Result<Self> {
        let dir = open_image_dir(path)?;
        Self::load(dir, Environment::for_image(path, base_dirs)?)
    }

    /// As [`Stored::open`] on an open directory.
    ///
    /// # Errors
    /// As [`Stored::open`].
    pub fn load(dir: Arc<dyn Directory>, env: Environment) -> Result<Self> {
        let root = read_root(dir.as_ref())?;
        Ok(Self { dir, root, env })
    }

    /// What the image is now: it may have changed before it was locked.
    pub(crate) fn again(&self) -> Result<Self> {
        Self::load(self.share_directory(), self.environment().clone())
    }

    /// The root.
    pub fn root(&self) -> &Root {
        &self.root
    }

    pub(crate) fn root_mut(&mut self) -> &mut Root {
        &mut self.root
    }

    /// The same image with another root.
    pub(crate) fn with_root(&self, root: Root) -> Self {
        Self {
            dir: Arc::clone(&self.dir),
            root,
            env: self.env.clone(),
        }
    }

    /// The image's directory.
    pub fn directory(&self) -> &dyn Directory {
        self.dir.as_ref()
    }

    /// As [`Stored::directory`], to be kept.
    pub(crate) fn share_directory(&self) -> Arc<dyn Directory> {
        Arc::clone(&self.dir)
    }

    /// What the image knows of the world around it.
    pub fn environment(&self) -> &Environment {
        &self.env
    }

    /// What a guest would see with `top` as the uppermost layer; errors here are what a missing base looks like.
    ///
    /// # Errors
    /// `BaseMissing`, `BaseChanged`, `BaseForbidden`, `Corrupt` or `Io`.
    pub fn chain(&self, top: Uuid) -> Result<Chain> {
        let records = self.root.chain(top)?;
        let (size, cluster) = (records[0].virtual_size, records[0].cluster()?);
        self.chain_of(&records, size, cluster)
    }

    /// As [`Stored::chain`] for rows that may not be in the table yet; `clip` bytes of them show.
    pub(crate) fn chain_of(
        &self,
        records: &[&root::Layer],
        clip: u64,
        finest: ClusterSize,
    ) -> Result<Chain> {
        let open = |l: &&root::Layer| {
            layer_files::open_for_reading(self.dir.as_ref(), l, &self.env.bases, self.env.boot)
        };
        let layers = records.iter().map(open).collect::<Result<_>>()?;
        Ok(Chain::new(layers, clip, finest))
    }

    /// Fails if a flush of the image has failed, and nobody has repaired it since (I7): after a failed sync the kernel takes the
    /// pages for written, so the next one would succeed without them.
    ///
    /// # Errors
    /// `FlushFailed`; `Io` if that cannot be found out.
    pub fn refuse_after_failed_flush(&self) -> Result<()> {
        if !self.flush_has_failed()? {
            return Ok(());
        }
        let what = "a flush of this image has failed: some of what was written last may not be on the medium";
        Err(Error::new(ErrorKind::FlushFailed, what))
    }

    pub(crate) fn flush_has_failed(&self) -> Result<bool> {
        match self.dir.open(FLUSH_FAILED_FILE, Access::Read) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e).context(|| format!("cannot look for {FLUSH_FAILED_FILE}")),
        }
    }

    /// Keeps writers out for as long as the result lives; `None` on a medium without locks.
    ///
    /// # Errors
    /// `Locked`.
    pub fn lock_shared(&self) -> Result<Option<ImageLock>> {
        ImageLock::shared(self.dir.as_ref())
    }
}

pub(super) fn open_image_dir(path: &Path) -> Result<Arc<dyn Directory>> {
    match RealDirectory::open(path) {
        Ok(dir) => Ok(dir),
        Err(e) if e.raw_os_error() == Some(libc::ENOTDIR) => {
            let what = format!("{} is a file, not a pcow image", path.display());
            Err(Error::new(ErrorKind::NotAnImage, what))
        }
        Err(e) => Err(e).context(|| format!("cannot open the image {}", path.display())),
    }
}

pub(super) fn read_root(dir: &dyn Directory) -> Result<Root> {
    let file = dir
        .open(ROOT_FILE, Access::Read)
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::new(
                ErrorKind::NotAnImage,
                "the directory is not a pcow image: it has no image.json",
            ),
            _ => Error::new(ErrorKind::Io, "cannot open image.json").caused_by(e),
        })?;
    let context = || "cannot read image.json".to_owned();
    let len = file.status().context(context)?.len;
    if len > root::MAX_BYTES {
        let what = format!("image.json has {len} bytes, more than any image needs");
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    let mut text = vec![0; units::len(len)];
    let got = file.read_at(&mut text, 0).context(context)?;
    Root::decode(&text[..got])
}

/// How far the replacement of a root came.
#[derive(Debug)]
pub(crate) enum Written {
    /// It is durable.
    Durable,
    /// It is what everybody reads, but the sync of the directory failed.
    Visible(Error),
}

/// Replaces the root: the new text is durable before it gets the name, the name before this returns (I4). After an error
/// the old root is still there.
pub(crate) fn replace_root(dir: &dyn Directory, root: &Root) -> Result<Written> {
    let context = || "cannot replace image.json".to_owned();
    put_in_place(dir, &root.encode()?)
        .inspect_err(|_| {
            // Best effort: the next opening removes what stays (I5).
            let _ = dir.unlink(Site("root.discard.unlink"), ROOT_PART);
        })
        .context(context)?;
    Ok(match dir.sync(Site("root.dir.sync")).context(context) {
        Ok(()) => Written::Durable,
        Err(e) => Written::Visible(e),
    })
}

fn put_in_place(dir: &dyn Directory, text: &[u8]) -> std::io::Result<()> {
    match dir.unlink(Site("root.part.unlink"), ROOT_PART) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let file = dir.create(Site("root.part.create"), ROOT_PART)?;
    file.write_at(Site("root.part.write"), text, 0)?;
    file.sync_data(Site("root.part.sync"))?;
    dir.rename(Site("root.rename"), ROOT_PART, ROOT_FILE)
}

/// As [`replace_root`], for who gives the image up after any error, or goes on with the old root, which shows the same.
pub(crate) fn write_root(dir: &dyn Directory, root: &Root) -> Result<()> {
    match replace_root(dir, root)? {
        Written::Durable => Ok(()),
        Written::Visible(e) => Err(e),
    }
}
