// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A folder of one test, with images in it.

use std::path::{Path, PathBuf};

use pcow_format::ops::{Base, NewImage, create};
use pcow_format::{ClusterSize, Image, VirtualSize};

/// The default in the page cache.
const ALLOCATION_UNIT: u64 = 64 << 10;

/// A folder that is removed at the end.
#[derive(Debug)]
pub struct Scratch(tempfile::TempDir);

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// A new folder in the place for temporary files.
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A new folder below `parent`.
    pub fn below(parent: &Path) -> Self {
        Self(tempfile::tempdir_in(parent).unwrap())
    }

    /// A name in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Creates an image of `size` bytes.
    pub fn image(&self, name: &str, size: u64, cluster: u64) -> PathBuf {
        self.image_on(name, Some(size), cluster, None)
    }

    /// Creates a clone of what the image `base` shows now.
    pub fn clone_of(&self, name: &str, base: &Path, cluster: u64) -> PathBuf {
        let base = Base::Image {
            path: base.to_owned(),
            snapshot: None,
            reference: false,
        };
        self.image_on(name, None, cluster, Some(base))
    }

    /// Creates an image. It allocates the same on every filesystem: as it would by default in the page cache.
    pub fn image_on(
        &self,
        name: &str,
        size: Option<u64>,
        cluster: u64,
        base: Option<Base>,
    ) -> PathBuf {
        let new = NewImage {
            size: size.map(|bytes| VirtualSize::new(bytes).unwrap()),
            cluster: ClusterSize::new(cluster).unwrap(),
            allocation_unit: Some(cluster.max(ALLOCATION_UNIT)),
            base,
        };
        create(&self.path(name), &new, &[]).unwrap();
        self.path(name)
    }
}

/// Writes `bytes` into an image that is not served, as a guest would.
pub fn store(image: &Image, offset: u64, bytes: &[u8]) {
    let end = offset + u64::try_from(bytes.len()).unwrap();
    let run = image.cluster_size().covering(&(offset..end));
    image.make_writable(run, &mut Vec::new()).unwrap();
    let file = image.active().data_file().as_real().unwrap();
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset).unwrap();
}
