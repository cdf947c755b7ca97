// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The image that a stream continues: whether it does, and what came in as a part of it.

use std::sync::Arc;

use uuid::Uuid;

use super::partial::Partial;
use super::{Receive, Unfinished};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{Image, Stored};
use crate::layer_files;
use crate::lock::ImageLock;
use crate::medium::{Directory, Site};
use crate::ops;
use crate::root::{Kind, Layer, Root, Snapshot};
use crate::stream::{Header, Named};

/// An image that is there.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) dir: Arc<dyn Directory>,
    /// The snapshot that the stream continues.
    pub(super) from: Snapshot,
}

impl Receive<'_> {
    /// The image that the stream continues; `None` if it makes a new one.
    pub(super) fn open_target(&self, header: &Header) -> Result<Option<Target>> {
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
                let is_it = |s: &&Snapshot| s.uuid == header.snapshot.uuid;
                let known = stored.root().snapshots.iter().find(is_it);
                if known.is_some() {
                    // I4: whoever joined it may have died before its root was durable. What it came from is removed now, and
                    // the sender is told that the snapshot is here.
                    dir.sync(Site("receive.joined.sync"))
                        .context(|| "cannot sync the image's directory".to_owned())?;
                }
                self.remove_joined_part(&stored)?;
                if let Some(known) = known {
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

    /// Makes the sealed layer of a partial image part of the image that is there.
    pub(super) fn join(
        &self,
        target: &Target,
        partial: &Partial,
        snapshot: Snapshot,
    ) -> Result<Snapshot> {
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
pub(super) fn is_joined(stored: &Stored, unfinished: &Unfinished) -> bool {
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
    let untouched = ops::is_without_content(stored.directory(), active.uuid)
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
        kind: Kind::Own,
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
        let adopted = layer_files::adopt(self.directory(), from, layer);
        adopted
            // I4: a layer's creation ends with a sync of the directory, which makes both layers' names durable.
            .and_then(|_| self.with_new_layer(&new, |image| image.commit(root)))
            // It holds data, so that no opening removes it.
            .inspect_err(|_| self.discard_unnamed(layer))?;
        ops::remove_unused(self.directory(), &[old]);
        Ok(number)
    }
}
