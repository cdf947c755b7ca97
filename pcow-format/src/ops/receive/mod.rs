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

mod partial;
mod target;

use std::io::Read;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{Environment, Stored};
use crate::lock::ImageLock;
use crate::medium::Directory;
use crate::medium::real::RealDirectory;
use crate::root::Snapshot;
use crate::stream::{Header, Named, Reader, Token};
use target::is_joined;

/// Name of the file that makes a partial image one, and says how far it is.
pub const RECEIVE_FILE: &str = "receive";

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
}
