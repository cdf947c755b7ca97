// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Resize: the size of a disk belongs to its layers, whose files never change their length. A new active layer of the new
//! size takes the place of the old one if that is empty, and lies on it otherwise. What a smaller layer cuts off is not
//! shown again by a larger one (`clip`).

use uuid::Uuid;

use crate::error::Result;
use crate::image::Image;
use crate::root::{Layer, Root};
use crate::units::VirtualSize;

impl Image {
    /// Gives the disk another size. Snapshots keep theirs. What is added reads zero, also if it was cut off before.
    ///
    /// # Errors
    /// `InvalidArgument` if the chain is at its limit; `NoSpace`, `FlushFailed` or `Io`. Before the commit the image is as it was.
    pub fn resize(&mut self, size: VirtualSize) -> Result<()> {
        if size == self.virtual_size() {
            return Ok(());
        }
        let mut root = self.root().clone();
        let old = root.active_layer()?.clone();
        if self.active.is_empty()? {
            root.layers.retain(|l| l.uuid != old.uuid);
            let new = resized(old.clone(), size);
            self.with_new_layer(&new, |image| image.go_on_in(root, &new))?;
            super::remove_unused(self.directory(), &[old.uuid]);
            return Ok(());
        }
        let new = root.empty_layer(old.uuid, size, self.cluster_size())?;
        self.with_new_layer(&new, |image| {
            image.seal_active(&mut root)?;
            image.go_on_in(root, &new)
        })
    }

    fn go_on_in(&mut self, mut root: Root, new: &Layer) -> Result<()> {
        root.active = new.uuid;
        root.layers.push(new.clone());
        self.commit(root)
    }
}

/// An empty layer in the place of `old`.
fn resized(old: Layer, size: VirtualSize) -> Layer {
    Layer {
        uuid: Uuid::new_v4(),
        virtual_size: size.bytes(),
        clip: old.clip.min(size.bytes()),
        ..old
    }
}
