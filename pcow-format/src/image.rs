// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image held for writing ([`Image`]): opening, what a guest's touch needs, and the commit of a new root. Operations that change the layer tree are in `ops`.

mod stored;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

pub use stored::{Environment, FLUSH_FAILED_FILE, ROOT_FILE, Stored};
pub(crate) use stored::{ROOT_PART, Written, replace_root, write_root};
use stored::{open_image_dir, read_root};

use crate::active::{Active, Recovery};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer_files::{self, Pair};
use crate::lock::{ImageLock, Purpose};
use crate::map::State;
use crate::medium::{Access, Directory, Domain, Site};
use crate::root::{self, Kind, Root};
use crate::units::{self, Cluster, ClusterRange, ClusterSize, VirtualSize};

/// Whose bytes a cluster of the disk shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Data in the active layer.
    Active,
    /// In no layer, or zero in one below: reads zero, and may be allocated in place.
    Nobody,
    /// The active layer says zero.
    Zero,
    /// At least in part in a sealed layer.
    Sealed,
}

/// An image held for writing: nobody else can open it for writing while this lives.
#[derive(Debug)]
pub struct Image {
    pub(crate) stored: Stored,
    pub(crate) active: Active,
    pub(crate) below: Chain,
    recovery: Recovery,
    lock: Option<Arc<ImageLock>>,
}

impl Image {
    /// Takes the image at `path` for writing and recovers what a crash left.
    ///
    /// # Errors
    /// As [`Stored::open`] and [`Stored::chain`]; `Locked` naming the holder; `Linked` if a file that will be
    /// written has a second name.
    pub fn open(path: &Path, base_dirs: &[PathBuf]) -> Result<Self> {
        let dir = open_image_dir(path)?;
        Self::load(dir, Environment::for_image(path, base_dirs)?)
    }

    /// As [`Image::open`], to serve the image to a frontend. A frontend whose backend has ended may still use it: see
    /// [`ImageLock::in_use`].
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open_to_serve(path: &Path, base_dirs: &[PathBuf]) -> Result<Self> {
        let dir = open_image_dir(path)?;
        let env = Environment::for_image(path, base_dirs)?;
        Self::load_for(Purpose::Serve, dir, env)
    }

    /// As [`Image::open`] on an open directory.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn load(dir: Arc<dyn Directory>, env: Environment) -> Result<Self> {
        Self::load_for(Purpose::Change, dir, env)
    }

    fn load_for(purpose: Purpose, dir: Arc<dyn Directory>, env: Environment) -> Result<Self> {
        // Read once before locking, so that what is no image is said to be none; what counts is read under the lock.
        read_root(dir.as_ref())?;
        let lock = match purpose {
            Purpose::Change => ImageLock::exclusive(dir.as_ref())?,
            Purpose::Serve => ImageLock::to_serve(dir.as_ref())?,
        };
        // A predecessor may have died between the rename of the root and the sync of the directory. What is
        // promised from now on rests on the root that is read here, so that must not be lost any more (I4).
        dir.sync(Site("open.dir.sync"))
            .context(|| "cannot sync the image's directory".to_owned())?;
        let stored = Stored::load(dir, env)?;
        stored.refuse_after_failed_flush()?;
        let is_kept = lock.as_ref().is_some_and(|lock| lock.in_use().is_none());
        if is_kept {
            refuse_to_write_again(&stored)?;
        }
        let (mut active, below, recovery) = open_stack(&stored)?;
        if is_kept {
            active.note_mapped();
        }
        active.settle_inherited()?;
        // After the checks: an image that is refused is left as it was.
        if let Some(lock) = &lock {
            lock.record_holder(stored.env.boot, purpose);
        }
        crate::ops::sweep(&stored)?;
        Ok(Self {
            stored,
            active,
            below,
            recovery,
            lock: lock.map(Arc::new),
        })
    }

    /// The root as it was last committed.
    pub fn root(&self) -> &Root {
        &self.stored.root
    }

    /// The image's directory.
    pub fn directory(&self) -> &dyn Directory {
        self.stored.directory()
    }

    /// What recovery found when the image was opened.
    pub fn recovery(&self) -> Recovery {
        self.recovery
    }

    /// The lock, to be shared with a frontend; `None` on a medium without locks.
    pub fn lock(&self) -> Option<&ImageLock> {
        self.lock.as_deref()
    }

    /// As [`Image::lock`], to be kept beside the image: it is held until both are gone.
    pub fn share_lock(&self) -> Option<Arc<ImageLock>> {
        self.lock.clone()
    }

    /// The active layer.
    pub fn active(&self) -> &Active {
        &self.active
    }

    /// The layers below the active one.
    pub fn below(&self) -> &Chain {
        &self.below
    }

    /// Size of the disk.
    pub fn virtual_size(&self) -> VirtualSize {
        self.active.virtual_size()
    }

    /// Size of the clusters of the active layer, in which all of the calls below count.
    pub fn cluster_size(&self) -> ClusterSize {
        self.active.cluster_size()
    }

    /// What makes stores durable.
    pub fn domain(&self) -> Domain {
        self.active.domain()
    }

    /// The clusters that one allocation covers at least: those of the allocation unit around `cluster`.
    pub fn allocation_run(&self, cluster: Cluster) -> ClusterRange {
        let unit = self.stored.root.allocation_unit >> self.cluster_size().bits();
        let start = cluster.0 / unit * unit;
        let all = self.cluster_size().clusters_in(self.virtual_size().bytes());
        ClusterRange::new(start, (start + unit).min(all))
    }

    /// Whose bytes `cluster` shows. Pure look-up: changes nothing.
    ///
    /// # Errors
    /// `Io` or `Corrupt` if a map cannot be read.
    pub fn source(&self, cluster: Cluster) -> Result<Source> {
        let state = self.active.state(cluster)?;
        self.source_in_state(cluster, state)
    }

    /// [`Image::source`] of each cluster of `run`, in order.
    ///
    /// # Errors
    /// As [`Image::source`].
    pub fn sources(&self, run: ClusterRange) -> Result<Vec<Source>> {
        let states = self.active.states(run)?;
        let pairs = run.iter().zip(states);
        pairs
            .map(|(c, state)| self.source_in_state(c, state))
            .collect()
    }

    fn source_in_state(&self, cluster: Cluster, state: State) -> Result<Source> {
        Ok(match state {
            State::Data | State::Live => Source::Active,
            State::Zero => Source::Zero,
            State::Absent => {
                let bytes = self.cluster_size().byte_range(cluster.only());
                if self.below.is_nobodys(bytes)? {
                    Source::Nobody
                } else {
                    Source::Sealed
                }
            }
        })
    }

    /// Makes `run` data in the active layer, content unchanged, whatever its clusters were. The caller holds the
    /// locks of all of them (F1). `buf` is scratch space.
    ///
    /// # Errors
    /// `NoSpace`, `Io` or `FlushFailed`; clusters that were not reached are as they were.
    pub fn make_writable(&self, run: ClusterRange, buf: &mut Vec<u8>) -> Result<()> {
        let sources = self.sources(run)?;
        let mut start = run.start;
        for group in sources.chunk_by(|a, b| a == b) {
            let piece = ClusterRange::new(start, start + units::bytes(group.len()));
            match group[0] {
                Source::Active => self.active.ensure_storage(piece)?,
                Source::Nobody => self.active.allocate(piece)?,
                Source::Zero => self.allocate_over_zero(piece)?,
                Source::Sealed => self.copy_up(piece, buf)?,
            }
            start = piece.end;
        }
        Ok(())
    }

    /// As [`Active::allocate_over_zero`].
    pub(crate) fn allocate_over_zero(&self, run: ClusterRange) -> Result<()> {
        self.active
            .allocate_over_zero(run)
            .inspect_err(|e| self.mark_failed_flush(e))
    }

    /// Makes those data clusters of `run` absent again that hold just what the disk shows without them, and gives their
    /// storage back; returns how many. The caller holds the locks of all of them (F1), and nobody has them mapped.
    ///
    /// # Errors
    /// `Io`, `Corrupt` or `FlushFailed`; clusters that were not reached are still data.
    pub fn give_back_clean(&self, run: ClusterRange) -> Result<u64> {
        let clean = self.clean_clusters(run)?;
        let mut count = 0;
        let mut runs = Vec::new();
        for group in clean.chunk_by(|a, b| a.0 + 1 == b.0) {
            runs.push(ClusterRange::new(
                group[0].0,
                group[0].0 + units::bytes(group.len()),
            ));
            count += units::bytes(group.len());
        }
        self.active
            .give_back(&runs)
            .inspect_err(|e| self.mark_failed_flush(e))?;
        Ok(count)
    }

    /// The data clusters of `run` whose bytes are those below.
    fn clean_clusters(&self, run: ClusterRange) -> Result<Vec<Cluster>> {
        let len = units::len(self.cluster_size().bytes());
        let (mut own, mut below) = (vec![0; len], vec![0; len]);
        let mut clean = Vec::new();
        for (cluster, state) in run.iter().zip(self.active.states(run)?) {
            if !state.is_data() {
                continue;
            }
            let bytes = self.cluster_size().byte_range(cluster.only());
            self.read_cluster(cluster, bytes.clone(), &mut own)?;
            self.below.read(bytes.start, &mut below)?;
            if own == below {
                clean.push(cluster);
            }
        }
        Ok(clean)
    }

    fn copy_up(&self, run: ClusterRange, buf: &mut Vec<u8>) -> Result<()> {
        let range = self.cluster_size().byte_range(run);
        buf.resize(units::len(range.end - range.start), 0);
        self.below.read(range.start, buf)?;
        self.active.fill(run, buf)
    }

    /// Reads what the disk shows at `offset`. Not for clusters that a guest may be writing to: it maps those.
    ///
    /// # Errors
    /// `Io` or `Corrupt`.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = offset..offset + units::bytes(buf.len());
        for cluster in self.cluster_size().covering(&range).iter() {
            let own = self.cluster_size().byte_range(cluster.only());
            let part = own.start.max(range.start)..own.end.min(range.end);
            let place = units::len(part.start - offset)..units::len(part.end - offset);
            self.read_cluster(cluster, part, &mut buf[place])?;
        }
        Ok(())
    }

    fn read_cluster(&self, cluster: Cluster, part: Range<u64>, buf: &mut [u8]) -> Result<()> {
        match self.active.state(cluster)? {
            State::Data | State::Live => {
                crate::medium::read_exact_at(self.active.data_file(), buf, part.start)
                    .context(|| "cannot read the active layer's data".to_owned())
            }
            State::Zero => {
                buf.fill(0);
                Ok(())
            }
            State::Absent => self.below.read(part.start, buf),
        }
    }

    /// Makes everything stored so far durable, as far as the domain goes.
    ///
    /// # Errors
    /// `FlushFailed`, and then always (I7): a mark stays in the image's directory, so that a later process does not
    /// take for durable what this one could not write.
    pub fn flush(&self) -> Result<()> {
        self.active
            .flush()
            .inspect_err(|e| self.mark_failed_flush(e))
    }

    pub(crate) fn mark_failed_flush(&self, error: &Error) {
        if error.kind() == ErrorKind::FlushFailed {
            // Best effort: the medium fails already. The mark may be there from before.
            let dir = self.directory();
            let _ = dir.create(Site("flush.mark.create"), FLUSH_FAILED_FILE);
            let _ = dir.sync(Site("flush.mark.sync"));
        }
    }

    /// No flush of the active layer succeeds from now on (I7); returns the error that says so.
    pub(crate) fn fail_flushes(&self, cause: &Error) -> Error {
        let error = self.active.fail_flushes(cause);
        self.mark_failed_flush(&error);
        error
    }

    /// Makes `root` the image's root and goes on with what it names.
    ///
    /// # Errors
    /// `FlushFailed` if the root is in its place and may not be durable. After any other the image is as it was.
    pub(crate) fn commit(&mut self, root: Root) -> Result<()> {
        let stored = self.stored.with_root(root);
        // First, so that what cannot be opened does not become the root while this goes on with the old layer.
        let (active, below, _) = open_stack(&stored)?;
        let written = replace_root(stored.dir.as_ref(), &stored.root)?;
        // From here on the next opening goes on in the new layer, so this does, too: the old one is sealed (I0).
        self.stored = stored;
        self.active = active;
        self.below = below;
        match written {
            Written::Durable => Ok(()),
            // I4: nothing can be promised on a root that a power cut may take back, so no flush may succeed (I7).
            Written::Visible(e) => Err(self.fail_flushes(&e)),
        }
    }
}

/// After a failed flush the opening reads all that the active layer holds and writes it: a frontend of an earlier backend, which
/// may store meanwhile, would lose stores. Most often the mark of the failure was refused before.
fn refuse_to_write_again(stored: &Stored) -> Result<()> {
    let active = stored.root.active_layer()?;
    let pair = layer_files::open_own(stored.dir.as_ref(), active, Access::Read)?;
    if !Active::is_distrusted(pair.map.as_ref())? {
        return Ok(());
    }
    let what = "a flush of this image has failed, and a frontend still uses it; end that first";
    Err(Error::new(ErrorKind::FlushFailed, what))
}

fn open_stack(stored: &Stored) -> Result<(Active, Chain, Recovery)> {
    let records = stored.root.chain(stored.root.active)?;
    let (top, rest) = (records[0], &records[1..]);
    let (size, cluster) = (top.size()?, top.cluster()?);
    let below = stored.chain_of(rest, top.clip, cluster)?;
    let Pair { map, data } = layer_files::open_own(stored.dir.as_ref(), top, Access::Write)?;
    for (file, name) in [
        (&map, layer_files::map_name(top.uuid)),
        (&data, layer_files::data_name(top.uuid)),
    ] {
        let status = file.status().context(|| format!("cannot inspect {name}"))?;
        if status.links > 1 {
            // I6: what is written through one name would change under the other.
            let what = format!("the active layer's file {name} has {} names", status.links);
            return Err(Error::new(ErrorKind::Linked, what));
        }
    }
    let (active, recovery) = Active::open(
        top.uuid.to_string(),
        (size, cluster),
        (map, data),
        stored.env.boot,
    )?;
    Ok((active, below, recovery))
}

impl Root {
    /// A new, empty layer on `parent`, not yet in the table.
    ///
    /// # Errors
    /// `Corrupt` if `parent` is not in the table, `InvalidArgument` if a chain or the table is at its limit.
    pub(crate) fn empty_layer(
        &self,
        parent: Uuid,
        size: VirtualSize,
        cluster: ClusterSize,
    ) -> Result<root::Layer> {
        if self.layers.len() >= root::MAX_LAYERS || self.chain(parent)?.len() >= root::MAX_DEPTH {
            let what = format!(
                "the image is at a limit: {} layers in all or {} in a chain; 'pcow-img rebase' to no base makes a chain short",
                root::MAX_LAYERS,
                root::MAX_DEPTH
            );
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        let parent = self.layer(parent).ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "the parent layer is not in the table")
        })?;
        Ok(root::Layer {
            uuid: Uuid::new_v4(),
            parent: Some(parent.uuid),
            virtual_size: size.bytes(),
            cluster_size: cluster.bytes(),
            clip: size.bytes().min(parent.virtual_size),
            sealed: false,
            map_checksum: None,
            proof: None,
            kind: Kind::Own,
        })
    }
}
