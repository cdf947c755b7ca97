// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Receive: a snapshot comes in as a stream. It is put together in an image of its own beside its place, a clone of what the
//! stream continues, and sealed there; then it comes into its place as everything does, by a rename or by a root.
//!
//! | | a full stream | one that continues a snapshot |
//! |---|---|---|
//! | `<name>.receive.part` is | a new image | a clone of the snapshot |
//! | what comes in | is written into its active layer | the same |
//! | at the end | it takes a snapshot, and is renamed | it takes a snapshot, whose layer the image adopts, with a root that has it |
//!
//! A stream that is cut off, and a process that dies, leave the partial image with the file `receive` in it: the stream's header,
//! with how far all is durable in the place of its start. The rest of the stream goes on from there.

use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::chain::Owner;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{Environment, Image, Stored};
use crate::layer_files;
use crate::lock::ImageLock;
use crate::medium::real::RealDirectory;
use crate::medium::{Access, Directory, Site, read_exact_at};
use crate::ops::create::{Base, NewImage, create_with_in, discard_part, rename_back};
use crate::ops::snapshot::Checksum;
use crate::root::{Layer, Root, Snapshot};
use crate::stream::{HEADER_BYTES, Header, Named, Reader, Record, Token};
use crate::units;

/// Name of the file that makes a partial image one, and says how far it is.
pub const RECEIVE_FILE: &str = "receive";
const RECEIVE_PART: &str = "receive.part";
/// Ending of the name of a partial image.
const ENDING: &str = ".receive.part";
/// After so many bytes what was received is made durable.
const CHECKPOINT_BYTES: u64 = 32 << 20;

/// What was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// The snapshot, as the image has it.
    pub snapshot: Snapshot,
    /// What it continues; `None` if the image is new.
    pub from: Option<Named>,
    /// Bytes of data that came with this stream.
    pub data_bytes: u64,
}

/// A stream that was not received to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfinished {
    /// What it is of; it starts where what is missing starts.
    pub header: Header,
}

impl Unfinished {
    /// What a sender must know to send the rest.
    pub fn token(&self) -> Token {
        Token {
            snapshot: self.header.snapshot.uuid,
            from: self.header.from.as_ref().map(|f| f.uuid),
            start: self.header.start,
        }
    }

    /// Whether a stream with this header is of the same, wherever it starts. Names may have changed meanwhile.
    fn is_of(&self, header: &Header) -> bool {
        let content = |h: &Header| {
            let from = h.from.as_ref().map(|f| f.uuid);
            (h.snapshot.uuid, from, h.size, h.cluster)
        };
        content(&self.header) == content(header)
    }
}

/// Where something is received.
#[derive(Debug)]
pub struct Receive<'a> {
    /// The directory in which the image is or will be.
    pub parent: &'a dyn Directory,
    /// Its name there.
    pub name: &'a str,
    /// Its path, as the environment knows it.
    pub path: &'a Path,
    /// The world around it.
    pub env: &'a Environment,
    /// What the snapshot is to be called here; what it is called there if `None`.
    pub rename: Option<&'a str>,
}

/// Receives into the image `path`, which must not exist if the stream is a full one; `reached` is told how far on the disk
/// it is, and how large that is.
///
/// # Errors
/// `Stream` or `StreamCut`, after which the rest can be sent; `Unfinished` if that is to be done with another stream first;
/// `Exists`; `NotFound` or `InvalidArgument` if the image is not what the stream continues; `Locked`; `NoSpace`, `FlushFailed`
/// or `Io`. The image is as it was then.
pub fn receive(
    path: &Path,
    input: &mut dyn Read,
    rename: Option<&str>,
    base_dirs: &[PathBuf],
    reached: &mut dyn FnMut(u64, u64),
) -> Result<Received> {
    at(path, base_dirs, rename, |place| {
        receive_in(place, input, reached)
    })
}

/// What is there of a stream into `path` that was not received to its end.
///
/// # Errors
/// `Corrupt` or `Io`.
pub fn unfinished(path: &Path, base_dirs: &[PathBuf]) -> Result<Option<Unfinished>> {
    at(path, base_dirs, None, unfinished_in)
}

/// As [`unfinished`], in an open directory.
///
/// # Errors
/// As [`unfinished`].
pub fn unfinished_in(place: &Receive<'_>) -> Result<Option<Unfinished>> {
    let Some((_, unfinished)) = place.open_part()? else {
        return Ok(None);
    };
    if let Ok(dir) = place.parent.open_dir(place.name) {
        let stored = Stored::load(dir, place.env.clone())?;
        return Ok((!is_joined(&stored, &unfinished)).then_some(unfinished));
    }
    Ok(Some(unfinished))
}

/// Removes what is there of such a stream; says what it was.
///
/// # Errors
/// `Locked` if it is being received; `Io`.
pub fn give_up_receiving(path: &Path, base_dirs: &[PathBuf]) -> Result<Option<Unfinished>> {
    at(path, base_dirs, None, give_up_receiving_in)
}

/// As [`give_up_receiving`], in an open directory.
///
/// # Errors
/// As [`give_up_receiving`].
pub fn give_up_receiving_in(place: &Receive<'_>) -> Result<Option<Unfinished>> {
    let Some((dir, unfinished)) = place.open_part()? else {
        return Ok(None);
    };
    let _lock = ImageLock::exclusive(dir.as_ref())?;
    place.remove_part(dir.as_ref())?;
    Ok(Some(unfinished))
}

/// Works in the directory that `path` is in, whether the image is there or not.
fn at<T>(
    path: &Path,
    base_dirs: &[PathBuf],
    rename: Option<&str>,
    work: impl FnOnce(&Receive<'_>) -> Result<T>,
) -> Result<T> {
    // An image that is there may be named by a link: what it continues in is beside the image itself.
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = real.file_name().and_then(|n| n.to_str()).ok_or_else(|| {
        let what = format!("{} cannot be the name of an image", path.display());
        Error::new(ErrorKind::InvalidArgument, what)
    })?;
    let beside = match real.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let parent =
        RealDirectory::open(beside).context(|| format!("cannot open {}", beside.display()))?;
    let dirs: Vec<_> = base_dirs
        .iter()
        .cloned()
        .chain([beside.to_owned()])
        .collect();
    work(&Receive {
        parent: parent.as_ref(),
        name,
        path: &real,
        env: &Environment::for_image(&real, &dirs)?,
        rename,
    })
}

/// As [`receive`], in an open directory.
///
/// # Errors
/// As [`receive`].
pub fn receive_in(
    place: &Receive<'_>,
    input: &mut dyn Read,
    reached: &mut dyn FnMut(u64, u64),
) -> Result<Received> {
    let mut reader = Reader::new(input)?;
    let header = reader.header().clone();
    let target = place.open_target(&header)?;
    let mut partial = place.partial_image(&header, target.as_ref())?;
    let received = partial.fill(&mut reader, reached);
    if let Err(e) = received {
        // What came in is not lost. If this fails, too, the checkpoint before it counts.
        let _ = partial.checkpoint();
        return Err(e);
    }
    let sealed = partial.seal(place.snapshot(&header))?;
    let data_bytes = partial.data_bytes;
    let snapshot = match target {
        None => place.settle(partial).map(|()| sealed)?,
        Some(target) => {
            let layer = sealed.layer;
            let snapshot = Snapshot {
                layer,
                ..place.snapshot(&header)
            };
            place.join(&target, &partial, snapshot)?
        }
    };
    Ok(Received {
        snapshot,
        from: header.from,
        data_bytes,
    })
}

/// An image that is there.
#[derive(Debug)]
struct Target {
    dir: Arc<dyn Directory>,
    /// The snapshot that the stream continues.
    from: Snapshot,
}

impl Receive<'_> {
    /// The snapshot of the stream, as it is to be called here. Its layer is not known yet.
    fn snapshot(&self, header: &Header) -> Snapshot {
        let name = self.rename.unwrap_or(&header.snapshot.name);
        Snapshot {
            uuid: header.snapshot.uuid,
            number: header.snapshot.number,
            name: name.to_owned(),
            layer: Uuid::nil(),
            time: header.time,
        }
    }

    /// The image that the stream continues; `None` if it makes a new one.
    fn open_target(&self, header: &Header) -> Result<Option<Target>> {
        let dir = match self.parent.open_dir(self.name) {
            Ok(dir) => Some(dir),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(e).context(|| format!("cannot open {}", self.name)),
        };
        match (dir, &header.from) {
            (None, None) => Ok(None),
            (None, Some(from)) => {
                let what = format!(
                    "the stream continues snapshot '{}', and there is no image that has it; receive a full stream first",
                    from.name
                );
                Err(Error::new(ErrorKind::NotFound, what))
            }
            (Some(dir), from) => {
                let stored = Stored::load(Arc::clone(&dir), self.env.clone())?;
                self.remove_joined_part(&stored)?;
                let is_it = |s: &&Snapshot| s.uuid == header.snapshot.uuid;
                if let Some(known) = stored.root().snapshots.iter().find(is_it) {
                    let what = format!("the image has this snapshot already, as '{}'", known.name);
                    return Err(Error::new(ErrorKind::InvalidArgument, what));
                }
                let Some(from) = from else {
                    let what = "the image exists already, and a full stream makes a new one";
                    return Err(Error::new(ErrorKind::Exists, what));
                };
                // Somebody who has the image would be noticed only at the end otherwise.
                drop(ImageLock::exclusive(dir.as_ref())?);
                let from = continued(&stored, from)?.clone();
                // What the commit would refuse is refused now.
                let row = row_to_come(&stored, &from, header);
                let root = with_received(stored.root(), row, self.snapshot(header))?.0;
                root.encode()?;
                Ok(Some(Target { dir, from }))
            }
        }
    }

    /// Removes a partial image of which the snapshot is in its place: its process died before it came to that.
    fn remove_joined_part(&self, stored: &Stored) -> Result<()> {
        let Some((dir, unfinished)) = self.open_part()? else {
            return Ok(());
        };
        if !is_joined(stored, &unfinished) {
            return Ok(());
        }
        let _lock = ImageLock::exclusive(dir.as_ref())?;
        self.remove_part(dir.as_ref())
    }

    fn part_name(&self) -> String {
        format!("{}{ENDING}", self.name)
    }

    /// The partial image, if there is one.
    fn open_part(&self) -> Result<Option<(Arc<dyn Directory>, Unfinished)>> {
        let name = self.part_name();
        let dir = match self.parent.open_dir(&name) {
            Ok(dir) => dir,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).context(|| format!("cannot open {name}")),
        };
        let mut raw = [0; HEADER_BYTES];
        let read = dir
            .open(RECEIVE_FILE, Access::Read)
            .and_then(|file| read_exact_at(file.as_ref(), &mut raw, 0));
        read.context(|| format!("cannot read {name}/{RECEIVE_FILE}"))?;
        let header = Header::decode(&raw).map_err(|e| {
            let what = format!("{name} is not what is left of a stream");
            Error::new(ErrorKind::Corrupt, what).caused_by(e)
        })?;
        Ok(Some((dir, Unfinished { header })))
    }

    /// A partial image is whole as long as it has its name: a power cut takes names back one by one.
    fn remove_part(&self, dir: &dyn Directory) -> Result<()> {
        let part = self.part_name();
        let context = || format!("cannot remove {part}");
        let gone = format!("{}.{}.part", self.name, Uuid::new_v4());
        let renamed = self
            .parent
            .rename_dir(Site("receive.gone.rename"), &part, &gone);
        renamed.context(context)?;
        let synced = self.parent.sync(Site("receive.gone.sync"));
        synced.context(context)?;
        discard_part(self.parent, dir, &gone).context(context)
    }

    /// Opens the partial image that goes on with the stream, or makes one.
    fn partial_image(&self, header: &Header, target: Option<&Target>) -> Result<Partial> {
        if self.open_part()?.is_none() {
            if header.start > 0 {
                let what = "the stream is the rest of one of which the beginning is not here";
                return Err(Error::new(ErrorKind::NotFound, what));
            }
            self.make_part(header, target)?;
        }
        let part = self.open_part()?.ok_or_else(|| {
            Error::new(ErrorKind::Io, "the partial image was removed by somebody")
        })?;
        let (dir, unfinished) = part;
        if !unfinished.is_of(header) {
            let what = format!(
                "snapshot '{}' is being received, and is not complete",
                unfinished.header.snapshot.name
            );
            return Err(Error::new(ErrorKind::Unfinished, what));
        }
        let image = Image::load(Arc::clone(&dir), self.env.clone())?;
        // Again, now that nobody else receives.
        let (_, unfinished) = self.open_part()?.unwrap_or((dir, unfinished));
        if header.start > unfinished.header.start {
            let what = format!(
                "the stream starts at byte {} of the disk, and {} were received",
                header.start, unfinished.header.start
            );
            return Err(Error::new(ErrorKind::StreamCut, what));
        }
        Ok(Partial {
            image,
            header: unfinished.header,
            unsaved: 0,
            data_bytes: 0,
        })
    }

    fn make_part(&self, header: &Header, target: Option<&Target>) -> Result<()> {
        let base = target.map(|target| Base::Image {
            path: self.path.to_owned(),
            snapshot: Some(target.from.number.to_string()),
            reference: false,
        });
        let new = NewImage {
            size: Some(header.size),
            cluster: header.cluster,
            allocation_unit: None,
            base,
        };
        let fill = &mut |image: &Image| write_progress(image.directory(), header);
        create_with_in(self.parent, &self.part_name(), &new, self.env, Some(fill)).map(drop)
    }

    /// Gives a new image its place.
    fn settle(&self, partial: Partial) -> Result<()> {
        let context = || format!("cannot create the image {}", self.name);
        let part = self.part_name();
        // Closed before it gets its name.
        drop(partial);
        let renamed = self
            .parent
            .rename_dir(Site("receive.rename"), &part, self.name);
        renamed.context(context)?;
        let synced = self.parent.sync(Site("receive.parent.sync"));
        synced
            .context(context)
            .map_err(|e| self.take_back(&part, e))?;
        // Best effort: it says nothing in an image that has its name.
        let dir = self.parent.open_dir(self.name);
        let _ = dir.and_then(|dir| dir.unlink(Site("receive.done.unlink"), RECEIVE_FILE));
        Ok(())
    }

    /// An image whose name may not survive a power cut is a partial one again, all of which is there: what goes on with it only
    /// gives it its name. Returns the error that says what there is now.
    fn take_back(&self, part: &str, cause: Error) -> Error {
        match rename_back(self.parent, self.name, part) {
            Ok(()) => cause,
            Err(e) => {
                let name = self.name;
                let what = format!(
                    "{name} was received, but its name could not be removed ({e}) after it was not made durable: a power cut may make it {part} again"
                );
                Error::new(ErrorKind::Io, what).caused_by(cause)
            }
        }
    }

    /// Makes the sealed layer of a partial image part of the image that is there.
    fn join(&self, target: &Target, partial: &Partial, snapshot: Snapshot) -> Result<Snapshot> {
        let part = partial.image.root();
        let row = part.layer(snapshot.layer).cloned().ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "the received layer is not in the table")
        })?;
        let mut image = Image::load(Arc::clone(&target.dir), self.env.clone())?;
        // Again: whatever was done to the image meanwhile, this is still the snapshot that the stream continues.
        let from = Named {
            uuid: target.from.uuid,
            number: target.from.number,
            name: target.from.name.clone(),
        };
        continued(&image.stored, &from)?;
        let number = image.add_received(partial.image.directory(), row, snapshot)?;
        // What stays is removed when somebody sends this snapshot again, or with `give_up_receiving`.
        if let Err(e) = self.remove_part(partial.image.directory()) {
            log::warn!("{e}");
        }
        image.root().snapshot(&number.to_string()).cloned()
    }
}

/// Whether the image has what the partial one beside it is to bring.
fn is_joined(stored: &Stored, unfinished: &Unfinished) -> bool {
    let snapshots = &stored.root().snapshots;
    let uuid = unfinished.header.snapshot.uuid;
    snapshots.iter().any(|s| s.uuid == uuid)
}

/// The newest snapshot of an image, if it is `from`, and nothing was written since.
fn continued<'a>(stored: &'a Stored, from: &Named) -> Result<&'a Snapshot> {
    let root = stored.root();
    let refuse = |kind, what: String| Err(Error::new(kind, what));
    let newest = root.snapshots.last();
    let Some(found) = newest.filter(|s| s.uuid == from.uuid) else {
        let has = newest.map_or("it has none".to_owned(), |s| {
            format!("its newest one is '{}'", s.name)
        });
        if root.snapshots.iter().any(|s| s.uuid == from.uuid) {
            let what = format!(
                "the stream continues snapshot '{}', which is not the newest one here ({has}); delete what is newer, or receive into a clone of '{}'",
                from.name, from.name
            );
            return refuse(ErrorKind::InvalidArgument, what);
        }
        let what = format!(
            "the stream continues snapshot '{}' ({}), which the image does not have ({has}); send from that one, or a full stream into a new image",
            from.name, from.uuid
        );
        return refuse(ErrorKind::NotFound, what);
    };
    let active = root.active_layer()?;
    let untouched = super::is_without_content(stored.directory(), active.uuid)
        .context(|| "cannot read the map of the active layer".to_owned())?;
    if !untouched || active.parent != Some(found.layer) {
        let what = format!(
            "the disk was changed since snapshot '{}', which the stream continues; roll it back to that first",
            found.name
        );
        return refuse(ErrorKind::InvalidArgument, what);
    }
    Ok(found)
}

/// A row like that of the layer to come.
fn row_to_come(stored: &Stored, from: &Snapshot, header: &Header) -> Layer {
    Layer {
        uuid: Uuid::new_v4(),
        parent: Some(from.layer),
        virtual_size: header.size.bytes(),
        cluster_size: header.cluster.bytes(),
        clip: stored
            .root()
            .layer(from.layer)
            .map_or(0, |l| l.virtual_size.min(header.size.bytes())),
        sealed: true,
        map_checksum: None,
        proof: None,
        kind: crate::root::Kind::Own,
    }
}

/// `root` with the sealed layer `row` in the place of the active one, which holds nothing, and a new one on it, which is returned
/// with the number that `snapshot` gets.
fn with_received(
    root: &Root,
    mut row: Layer,
    mut snapshot: Snapshot,
) -> Result<(Root, Layer, u64)> {
    let mut root = root.clone();
    let old = root.active_layer()?.clone();
    // The same content may have another layer by now: a deletion merges.
    row.parent = old.parent;
    snapshot.layer = row.uuid;
    let number = root.add_known_snapshot(snapshot)?;
    let (top, size, cluster) = (row.uuid, row.size()?, row.cluster()?);
    root.layers.push(row);
    let new = root.empty_layer(top, size, cluster)?;
    root.layers.retain(|l| l.uuid != old.uuid);
    root.layers.push(new.clone());
    root.active = new.uuid;
    root.allocation_unit = root.allocation_unit.max(cluster.bytes());
    Ok((root, new, number))
}

impl Image {
    /// Takes in the sealed layer `row` of the image in `from`, as the snapshot `snapshot`; returns its number.
    fn add_received(
        &mut self,
        from: &dyn Directory,
        row: Layer,
        snapshot: Snapshot,
    ) -> Result<u64> {
        let (old, layer) = (self.root().active, row.uuid);
        let (root, new, number) = with_received(self.root(), row, snapshot)?;
        root.encode()?;
        layer_files::adopt(self.directory(), from, layer)?;
        // I4: ends with a sync of the directory, which makes both layers' names durable.
        self.create_layer(&new)?;
        self.commit(root)?;
        super::remove_layer_files(self.directory(), old)?;
        Ok(number)
    }
}

/// An image that is put together.
#[derive(Debug)]
struct Partial {
    image: Image,
    /// It starts where what is missing starts.
    header: Header,
    /// Bytes that came in since that was written down.
    unsaved: u64,
    data_bytes: u64,
}

impl Partial {
    /// Takes in the records.
    fn fill(&mut self, reader: &mut Reader<'_>, reached: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let size = self.header.size.bytes();
        while let Some(record) = reader.next_record()? {
            let end = record.end();
            // What is there already: a snapshot's content does not change.
            if end > self.header.start && !self.is_sealed() {
                self.take(record)?;
                self.header.start = end;
            }
            if self.unsaved >= CHECKPOINT_BYTES {
                self.checkpoint()?;
            }
            reached(end, size);
        }
        Ok(())
    }

    fn take(&mut self, record: Record<'_>) -> Result<()> {
        match record {
            Record::Data(offset, bytes) => {
                self.unsaved += units::bytes(bytes.len());
                self.data_bytes += units::bytes(bytes.len());
                self.image.write(offset, bytes)
            }
            Record::Zeros(range) => self.hide(range),
        }
    }

    /// Makes a range read zero. Where nothing is below it does already: records come in order, and each speaks of another range.
    fn hide(&mut self, range: Range<u64>) -> Result<()> {
        let mut walk = self.image.below().walk(self.header.size.bytes());
        let mut at = range.start;
        while at < range.end {
            let extent = walk.extent(at)?;
            let end = extent.bytes.end.min(range.end);
            if extent.owner != Owner::Nobody {
                self.image.write_zeros(at..end)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Whether all of it came in before, and the snapshot was taken: it is the only one.
    fn is_sealed(&self) -> bool {
        !self.image.root().snapshots.is_empty()
    }

    /// Makes durable what came in, then says so.
    fn checkpoint(&mut self) -> Result<()> {
        self.image.flush()?;
        write_progress(self.image.directory(), &self.header)?;
        self.unsaved = 0;
        Ok(())
    }

    /// Takes the snapshot, if that was not done; returns it.
    fn seal(&mut self, mut snapshot: Snapshot) -> Result<Snapshot> {
        if !self.is_sealed() {
            snapshot.layer = self.image.root().active;
            let prepared = self.image.prepare_known_snapshot(snapshot)?;
            self.image.take_snapshot(prepared, Checksum::Now)?;
        }
        self.header.start = self.header.size.bytes();
        write_progress(self.image.directory(), &self.header)?;
        let sealed = self.image.root().snapshots.last();
        sealed.cloned().ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                "the received snapshot is not in the table",
            )
        })
    }
}

/// Writes down how far a partial image is; whole, or not at all.
fn write_progress(dir: &dyn Directory, header: &Header) -> Result<()> {
    let context = || format!("cannot write {RECEIVE_FILE}");
    match dir.unlink(Site("receive.progress.unlink"), RECEIVE_PART) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).context(context),
        _ => {}
    }
    let file = dir
        .create(Site("receive.progress.create"), RECEIVE_PART)
        .context(context)?;
    file.write_at(Site("receive.progress.write"), &header.encode(), 0)
        .context(context)?;
    file.sync_data(Site("receive.progress.sync"))
        .context(context)?;
    dir.rename(Site("receive.progress.rename"), RECEIVE_PART, RECEIVE_FILE)
        .context(context)?;
    dir.sync(Site("receive.progress.dir.sync")).context(context)
}
