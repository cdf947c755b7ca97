// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The partial image beside the place of the one that comes: how it is made, goes on, is sealed, and gets its name or goes.

use std::ops::Range;
use std::sync::Arc;

use uuid::Uuid;

use super::target::Target;
use super::{RECEIVE_FILE, Receive, Unfinished};
use crate::chain::Owner;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::Image;
use crate::medium::{Access, Directory, Site, read_exact_at};
use crate::ops::create::{Base, NewImage, create_with_in, discard_files, rename_back};
use crate::ops::snapshot::Checksum;
use crate::root::Snapshot;
use crate::stream::{HEADER_BYTES, Header, Reader, Record};
use crate::units;

const RECEIVE_PART: &str = "receive.part";
/// Ending of the name of a partial image.
const ENDING: &str = ".receive.part";
/// After so many bytes what was received is made durable.
const CHECKPOINT_BYTES: u64 = 32 << 20;

impl Receive<'_> {
    fn part_name(&self) -> String {
        format!("{}{ENDING}", self.name)
    }

    /// The partial image, if there is one.
    pub(super) fn open_part(&self) -> Result<Option<(Arc<dyn Directory>, Unfinished)>> {
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
    pub(super) fn remove_part(&self, dir: &dyn Directory) -> Result<()> {
        let part = self.part_name();
        let context = || format!("cannot remove {part}");
        // Before it loses the name by which somebody finds it again.
        let files = dir.names().context(context)?;
        let gone = format!("{}.{}.part", self.name, Uuid::new_v4());
        let renamed = self
            .parent
            .rename_dir(Site("receive.gone.rename"), &part, &gone);
        renamed.context(context)?;
        let synced = self.parent.sync(Site("receive.gone.sync"));
        synced
            .inspect_err(|_| {
                // Who tries again looks for it under its name.
                let _ = rename_back(self.parent, &gone, &part);
            })
            .context(context)?;
        let removed = discard_files(self.parent, dir, (&gone, &files));
        removed.context(|| format!("cannot remove {gone}"))
    }

    /// Opens the partial image that goes on with the stream, or makes one.
    pub(super) fn partial_image(
        &self,
        header: &Header,
        target: Option<&Target>,
    ) -> Result<Partial> {
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
        let image = Image::load(Arc::clone(&dir), self.env.clone()).map_err(|e| {
            // Not the image that is named: that may not be there.
            let what = format!("cannot go on with {}", self.part_name());
            Error::new(e.kind(), what).caused_by(e)
        })?;
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
    pub(super) fn settle(&self, partial: Partial) -> Result<()> {
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
}

/// An image that is put together.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) image: Image,
    /// It starts where what is missing starts.
    header: Header,
    /// Bytes that came in since that was written down.
    unsaved: u64,
    pub(super) data_bytes: u64,
}

impl Partial {
    /// Takes in the records.
    pub(super) fn fill(
        &mut self,
        reader: &mut Reader<'_>,
        reached: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
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
    pub(super) fn checkpoint(&mut self) -> Result<()> {
        self.image.flush()?;
        write_progress(self.image.directory(), &self.header)?;
        self.unsaved = 0;
        Ok(())
    }

    /// Takes the snapshot, if that was not done; returns it.
    pub(super) fn seal(&mut self, mut snapshot: Snapshot) -> Result<Snapshot> {
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
