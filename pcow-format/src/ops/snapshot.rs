// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshot: the active layer is sealed, and an empty one takes its place.

use crate::active::domain_of;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::Image;
use crate::layer_files;
use crate::medium::{Access, Domain};
use crate::root::{self, Layer, Root};

impl Image {
    /// Takes a snapshot under `name`, or under a generated name; returns its number.
    ///
    /// # Errors
    /// `InvalidArgument` or `Exists` for the name; `NoSpace`, `FlushFailed` or `Io`. Before the commit the image is as it was.
    pub fn snapshot(&mut self, name: Option<&str>) -> Result<u64> {
        let mut root = self.root().clone();
        let sealed = root.active;
        let name = name.map_or_else(
            || free_name(&root, &format!("snapshot-{}", root.next_snapshot)),
            str::to_owned,
        );
        let number = root.add_snapshot(&name, sealed, super::now())?;
        let new = root.empty_layer(sealed, self.virtual_size(), self.cluster_size())?;
        self.create_layer(&new)?;
        self.seal_active(&mut root)?;
        root.active = new.uuid;
        root.layers.push(new);
        self.commit(root)?;
        Ok(number)
    }

    /// Creates the files of a layer that is about to join the table. They must promise as much as the present ones do.
    pub(crate) fn create_layer(&self, layer: &Layer) -> Result<()> {
        let boot = self.stored.environment().boot;
        let pair = layer_files::create(self.directory(), layer, self.root().uuid, boot)?;
        let domain = domain_of(
            &layer.uuid.to_string(),
            pair.map.as_ref(),
            pair.data.as_ref(),
        )?;
        if self.domain() == Domain::Dax && domain != Domain::Dax {
            // The next opening removes the files (I5).
            let what = "the image is on DAX, but files that are made in it now are not";
            return Err(Error::new(ErrorKind::MixedDomains, what));
        }
        layer_files::prefer_huge_extents(pair.data.as_ref(), self.root().allocation_unit);
        Ok(())
    }

    /// Makes everything in the active layer durable and marks its row in `root` as sealed.
    pub(crate) fn seal_active(&self, root: &mut Root) -> Result<()> {
        // In both domains: with DAX this covers lines that the guest stored but did not write back itself.
        self.flush()?;
        let active = root.active;
        let row = root.layers.iter_mut().find(|l| l.uuid == active);
        if let Some(row) = row {
            let pair = layer_files::open_own(self.directory(), row, Access::Read)?;
            let context = || format!("cannot read the map of layer {active}");
            row.map_checksum = Some(layer_files::map_checksum(pair.map.as_ref()).context(context)?);
            row.sealed = true;
        }
        Ok(())
    }
}

/// `wanted`, or with a number behind it if it is taken.
pub(super) fn free_name(root: &Root, wanted: &str) -> String {
    let taken = |name: &str| root.snapshots.iter().any(|s| s.name == name);
    let wanted = if root::check_name(wanted).is_ok() {
        wanted
    } else {
        "snapshot"
    };
    if !taken(wanted) {
        return wanted.to_owned();
    }
    // One of these is free: there are fewer snapshots than numbers to try.
    (2..)
        .map(|n: u64| format!("{wanted}-{n}"))
        .find(|name| !taken(name))
        .unwrap_or_default()
}
