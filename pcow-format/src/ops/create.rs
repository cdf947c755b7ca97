// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Creation of an image, empty or on a base. It is built in a `.part` directory and renamed, so that an image of that
//! name is complete or absent (I6).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{Environment, Image, Stored, write_root};
use crate::layer_files::{self, Adopted, BaseDirs};
use crate::lock;
use crate::medium::real::RealDirectory;
use crate::medium::{Directory, Domain, File, Site};
use crate::ops::snapshot::free_name;
use crate::root::{Kind, Layer, Root};
use crate::units::{ClusterSize, MAX_CLUSTER_BYTES, SIZE_STEP_BYTES, VirtualSize};

/// Allocation unit of an image in the page cache, unless the user says otherwise.
const DEFAULT_UNIT_BYTES: u64 = 64 << 10;
/// Allocation unit on DAX: one huge page.
const DEFAULT_DAX_UNIT_BYTES: u64 = 2 << 20;

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// Size of the disk; that of the base if `None`.
    pub size: Option<VirtualSize>,
    /// Size of the clusters.
    pub cluster: ClusterSize,
    /// Bytes that an allocation covers at least; 64 KiB in the page cache and 2 MiB on DAX if `None`.
    pub allocation_unit: Option<u64>,
    /// What the disk shows where nothing was written.
    pub base: Option<Base>,
}

impl NewImage {
    /// Checks what can be checked without looking at a base.
    fn validate(&self) -> Result<()> {
        if self.size.is_none() && self.base.is_none() {
            return Err(invalid("an image without base needs a size".to_owned()));
        }
        let unit = self.allocation_unit;
        if unit.is_some_and(|u| !u.is_power_of_two() || u < self.cluster.bytes() || u > 1 << 30) {
            let what = "the allocation unit must be a power of two from the cluster size to 1 GiB";
            return Err(invalid(what.to_owned()));
        }
        Ok(())
    }
}

/// What a new image is based on.
#[derive(Debug, Clone)]
pub enum Base {
    /// Another image, at a snapshot (name or number) or as it is now.
    Image {
        /// Its directory.
        path: PathBuf,
        /// Which snapshot; the present state if `None`, which is sealed first.
        snapshot: Option<String>,
        /// Refer to the base's files where they are, instead of adopting them.
        reference: bool,
    },
    /// A raw file. Formats are never guessed.
    Raw {
        /// The file.
        path: PathBuf,
    },
}

/// What a creation did besides making the image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Created {
    /// Bytes of the base that had to be copied, because its files could not be linked.
    pub copied_bytes: u64,
    /// Snapshot of the base that was made to fix its present state.
    pub sealed_base_as: Option<String>,
}

/// Creates the image `path`.
///
/// # Errors
/// `Exists`, `InvalidArgument` for sizes, what opening a base may fail with, `NoSpace` or `Io`. A failed
/// creation leaves nothing under that name.
pub fn create(path: &Path, new: &NewImage, base_dirs: &[PathBuf]) -> Result<Created> {
    create_with(path, new, base_dirs, None)
}

/// As [`create`], with what `fill` writes into it: the image has its name only when all of that is durable.
///
/// # Errors
/// As [`create`], and what `fill` returns.
pub fn create_filled(
    path: &Path,
    new: &NewImage,
    base_dirs: &[PathBuf],
    fill: Fill<'_>,
) -> Result<Created> {
    create_with(path, new, base_dirs, Some(fill))
}

fn create_with(
    path: &Path,
    new: &NewImage,
    base_dirs: &[PathBuf],
    fill: Option<Fill<'_>>,
) -> Result<Created> {
    let name = path
        .file_name()
        .and_then(|n| n.to_str())
        .ok_or_else(|| invalid(format!("{} cannot be the name of an image", path.display())))?;
    let parent = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let beside = parent.to_owned();
    let parent =
        RealDirectory::open(parent).context(|| format!("cannot open {}", parent.display()))?;
    // The image is not there yet, so that what lies beside it is named by its parent.
    let dirs: Vec<_> = base_dirs.iter().cloned().chain([beside]).collect();
    let env = Environment::for_image(path, &dirs)?;
    create_with_in(parent.as_ref(), name, new, &env, fill)
}

/// Writes the first content of a new image.
pub type Fill<'a> = &'a mut dyn FnMut(&Image) -> Result<()>;

/// As [`create`], in an open directory.
///
/// # Errors
/// As [`create`].
pub fn create_in(
    parent: &dyn Directory,
    name: &str,
    new: &NewImage,
    env: &Environment,
) -> Result<Created> {
    create_with_in(parent, name, new, env, None)
}

/// As [`create_filled`], in an open directory.
///
/// # Errors
/// As [`create_filled`].
pub fn create_filled_in(
    parent: &dyn Directory,
    name: &str,
    new: &NewImage,
    env: &Environment,
    fill: Fill<'_>,
) -> Result<Created> {
    create_with_in(parent, name, new, env, Some(fill))
}

pub(super) fn create_with_in(
    parent: &dyn Directory,
    name: &str,
    new: &NewImage,
    env: &Environment,
    fill: Option<Fill<'_>>,
) -> Result<Created> {
    let context = || format!("cannot create the image {name}");
    if parent.names().context(context)?.iter().any(|n| n == name) {
        return Err(Error::new(
            ErrorKind::Exists,
            format!("{name} exists already"),
        ));
    }
    new.validate()?;
    // A name of its own: another creation may be under way, and a folder of the user's may be called anything.
    let part = format!("{name}.{}.part", Uuid::new_v4());
    let dir = parent
        .create_dir(Site("create.dir"), &part)
        .context(context)?;
    let made = make(dir.as_ref(), name, new, env).and_then(|created| {
        if let Some(fill) = fill {
            // The image that is let go of here is closed before it gets its name.
            let image = Image::load(Arc::clone(&dir), env.clone())?;
            fill(&image)?;
            image.flush()?;
        }
        parent
            .rename_dir(Site("create.rename"), &part, name)
            .context(context)?;
        Ok(created)
    });
    match made {
        Ok(created) => match parent.sync(Site("create.parent.sync")).context(context) {
            Ok(()) => Ok(created),
            Err(e) => Err(take_back(parent, dir.as_ref(), (&part, name), e)),
        },
        Err(e) => {
            // Best effort: what stays has a name that says what it is.
            let _ = discard_part(parent, dir.as_ref(), &part);
            Err(e)
        }
    }
}

/// Removes an image whose name may not survive a power cut; returns the error that says what there is now.
fn take_back(
    parent: &dyn Directory,
    dir: &dyn Directory,
    (part, name): (&str, &str),
    cause: Error,
) -> Error {
    match rename_back(parent, name, part).and_then(|()| discard_part(parent, dir, part)) {
        Ok(()) => cause,
        Err(e) => {
            let what = format!(
                "{name} or {part} is left of a creation that failed and could not be removed ({e}): a power cut may take it"
            );
            Error::new(ErrorKind::Io, what).caused_by(cause)
        }
    }
}

/// Takes the name from an image again that a power cut could take from it.
pub(super) fn rename_back(parent: &dyn Directory, name: &str, part: &str) -> std::io::Result<()> {
    parent.rename_dir(Site("create.back.rename"), name, part)
}

/// Removes an image that was not finished.
pub(super) fn discard_part(
    parent: &dyn Directory,
    dir: &dyn Directory,
    part: &str,
) -> std::io::Result<()> {
    discard_files(parent, dir, (part, &dir.names()?))
}

/// The same, of which the files are known.
pub(super) fn discard_files(
    parent: &dyn Directory,
    dir: &dyn Directory,
    (part, files): (&str, &[String]),
) -> std::io::Result<()> {
    for name in files {
        dir.unlink(Site("create.part.unlink"), name)?;
    }
    parent.remove_dir(Site("create.part.rmdir"), part)
}

/// The base is sealed only after everything that can be refused without it was accepted.
fn make(dir: &dyn Directory, name: &str, new: &NewImage, env: &Environment) -> Result<Created> {
    let base = new
        .base
        .as_ref()
        .map(|b| BaseLayers::open(b, name, env))
        .transpose()?;
    let copied_bytes = build(dir, new, base.as_ref(), env.boot)?;
    Ok(Created {
        copied_bytes,
        sealed_base_as: base.and_then(|b| b.sealed_as),
    })
}

fn build(
    dir: &dyn Directory,
    new: &NewImage,
    base: Option<&BaseLayers>,
    boot: Uuid,
) -> Result<u64> {
    let uuid = Uuid::new_v4();
    lock::create(dir)?;
    let (mut layers, copied) = base.map_or(Ok((Vec::new(), 0)), |b| b.adopt_into(dir))?;
    let active = active_layer(new, layers.first())?;
    let unit = new.allocation_unit;
    // I4: ends with a sync of the directory, which makes the adopted layers' names durable, too.
    let pair = layer_files::create(dir, &active, uuid, boot)?;
    let domain = pair
        .data
        .domain()
        .context(|| "cannot tell the persistence domain".to_owned())?;
    let default_unit = match domain {
        Domain::Dax => DEFAULT_DAX_UNIT_BYTES,
        Domain::PageCache => DEFAULT_UNIT_BYTES,
    };
    let unit = unit.unwrap_or(default_unit.max(new.cluster.bytes()));
    layer_files::prefer_huge_extents(pair.data.as_ref(), unit);
    layers.insert(0, active.clone());
    write_root(dir, &Root::new(uuid, unit, active.uuid, layers))?;
    Ok(copied)
}

fn active_layer(new: &NewImage, parent: Option<&Layer>) -> Result<Layer> {
    let size = match (new.size, parent) {
        (Some(size), _) => size,
        (None, Some(parent)) => parent.size()?,
        (None, None) => return Err(invalid("an image without base needs a size".to_owned())),
    };
    Ok(Layer {
        uuid: Uuid::new_v4(),
        parent: parent.map(|p| p.uuid),
        virtual_size: size.bytes(),
        cluster_size: new.cluster.bytes(),
        clip: parent.map_or(0, |p| p.virtual_size.min(size.bytes())),
        sealed: false,
        map_checksum: None,
        proof: None,
        kind: Kind::Own,
    })
}

/// The layers of a base, the top one first, ready to join another image's table.
#[derive(Debug)]
pub(super) struct BaseLayers {
    layers: Vec<Layer>,
    /// Where the files of its own layers are; `None` if they are referred to, or for a raw base.
    adopt_from: Option<Arc<dyn Directory>>,
    sealed_as: Option<String>,
}

impl BaseLayers {
    /// Opens `base`, sealing its present state if that is asked for. `for_image` names the new image.
    pub(super) fn open(base: &Base, for_image: &str, env: &Environment) -> Result<Self> {
        match base {
            Base::Raw { path } => Self::open_raw(&env.bases.absolute(path)?, &env.bases),
            Base::Image {
                path,
                snapshot,
                reference,
            } => {
                let path = env.bases.absolute(path)?;
                Self::open_image(&path, snapshot.as_deref(), *reference, for_image, env)
            }
        }
    }

    fn open_raw(path: &Path, bases: &BaseDirs) -> Result<Self> {
        let context = || format!("cannot open the raw base {}", path.display());
        let opened = bases.open_raw_named(path);
        let file =
            opened.map_err(|e| Error::new(ErrorKind::BaseMissing, context()).caused_by(e))?;
        make_durable(file.as_ref(), path, bases).context(context)?;
        let bytes = file.status().context(context)?.len;
        let size = VirtualSize::new(bytes.next_multiple_of(SIZE_STEP_BYTES))?;
        let layer = Layer {
            uuid: Uuid::new_v4(),
            parent: None,
            virtual_size: size.bytes(),
            cluster_size: MAX_CLUSTER_BYTES,
            clip: 0,
            sealed: true,
            map_checksum: None,
            proof: None,
            kind: layer_files::raw_kind(file.as_ref(), path)?,
        };
        Ok(Self {
            layers: vec![layer],
            adopt_from: None,
            sealed_as: None,
        })
    }

    fn open_image(
        path: &Path,
        snapshot: Option<&str>,
        reference: bool,
        for_image: &str,
        env: &Environment,
    ) -> Result<Self> {
        // The base's own bases are looked for beside it, as when it is opened itself.
        let base_env = Environment {
            bases: env.bases.of_base(path),
            boot: env.boot,
        };
        let dir = env.bases.open_named(path)?;
        let stored = Stored::load(Arc::clone(&dir), base_env.clone())?;
        let (layers, sealed_as) = match snapshot {
            Some(name) => {
                let top = stored.root().snapshot(name)?.layer;
                // I4: whoever committed this root may have died before it was durable. If a power cut took it back, the
                // snapshot's layer would be the active one again, and change under the new image.
                dir.sync(Site("base.dir.sync"))
                    .context(|| "cannot sync the base's directory".to_owned())?;
                (rows(stored.root(), top)?, None)
            }
            None => present_state(dir.clone(), stored, base_env.clone(), for_image)?,
        };
        // Errors of a broken base belong here, not to the first boot of the clone.
        if let Some(top) = layers.first() {
            Stored::load(Arc::clone(&dir), base_env)?.chain(top.uuid)?;
        }
        let mut base = Self {
            layers,
            adopt_from: None,
            sealed_as,
        };
        if reference {
            base.refer_to(path);
        } else {
            base.adopt_from = Some(dir);
        }
        Ok(base)
    }

    fn refer_to(&mut self, path: &Path) {
        for layer in self.layers.iter_mut().filter(|l| l.kind == Kind::Own) {
            layer.kind = Kind::Reference {
                directory: path.to_owned(),
            };
        }
    }

    /// Gives the layers' files a place in `dir`; returns their rows and how many bytes had to be copied. Their names are
    /// durable only once `dir` is synced, which has to be before a root names them.
    pub(super) fn adopt_into(&self, dir: &dyn Directory) -> Result<(Vec<Layer>, u64)> {
        let mut copied = 0;
        if let Some(from) = &self.adopt_from {
            for layer in self.layers.iter().filter(|l| l.kind == Kind::Own) {
                if let Adopted::Copied { bytes } =
                    layer_files::adopt(dir, from.as_ref(), layer.uuid)?
                {
                    copied += bytes;
                }
            }
        }
        Ok((self.layers.clone(), copied))
    }

    /// Those layers of which the image with this root and directory does not hold the files itself.
    pub(super) fn not_held_by(&self, root: &Root, dir: &dyn Directory) -> Result<Self> {
        let names = dir
            .names()
            .context(|| "cannot list the image's directory".to_owned())?;
        let has = |name: String| names.contains(&name);
        let held = |l: &Layer| {
            root.layer(l.uuid).is_some_and(|row| row.kind == Kind::Own)
                && has(layer_files::map_name(l.uuid))
                && has(layer_files::data_name(l.uuid))
        };
        Ok(Self {
            layers: self.layers.iter().filter(|l| !held(l)).cloned().collect(),
            adopt_from: self.adopt_from.clone(),
            sealed_as: None,
        })
    }

    /// The rows, the top one first.
    pub(super) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Name of the snapshot that fixes the base's present state, if one had to be made.
    pub(super) fn sealed_as(&self) -> Option<&str> {
        self.sealed_as.as_deref()
    }
}

/// The sealed layers that show what `stored` shows now; seals its active layer first if that holds anything.
fn present_state(
    dir: Arc<dyn Directory>,
    stored: Stored,
    env: Environment,
    for_image: &str,
) -> Result<(Vec<Layer>, Option<String>)> {
    let active = stored.root().active_layer()?.clone();
    let mut image = Image::load(dir, env)?;
    let parent = active.parent.and_then(|p| image.root().layer(p));
    // Same size, nothing written: the parent shows the same, and no snapshot is needed.
    let same = |p: &Layer| p.virtual_size == active.virtual_size && p.virtual_size == active.clip;
    if image.active().is_empty()? && parent.is_some_and(same) {
        let parent = active.parent.unwrap_or_default();
        return Ok((rows(image.root(), parent)?, None));
    }
    let name = free_name(image.root(), &format!("base-of-{for_image}"));
    let sealed = image.root().active;
    image.snapshot(Some(&name))?;
    Ok((rows(image.root(), sealed)?, Some(name)))
}

/// I4: a raw base may have been written just now, and a power cut take that, or its time of change, or its name.
fn make_durable(raw: &dyn File, path: &Path, bases: &BaseDirs) -> std::io::Result<()> {
    raw.sync_all(Site("base.raw.sync"))?;
    match bases.directory_of_raw(path)? {
        Some(directory) => directory.sync(Site("base.raw.dir.sync")),
        // Who may not read the directory did not put the file there just now.
        None => Ok(()),
    }
}

fn rows(root: &Root, top: Uuid) -> Result<Vec<Layer>> {
    Ok(root.chain(top)?.into_iter().cloned().collect())
}

fn invalid(what: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}
