// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an image takes on disk, what it is made of, and what its filesystem grants. Reads only.

use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use crate::active::domain_of;
use crate::error::{IoContext, Result};
use crate::image::Stored;
use crate::layer_files::{data_name, map_name};
use crate::map::{HEADER_BYTES, Header};
use crate::medium::{Access, Directory, Domain, File, Hindrance, read_exact_at};
use crate::root::{Kind, Layer};

/// Storage that the files of a layer take, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Usage {
    /// In files that no other image has.
    pub exclusive: u64,
    /// In files that other images have, too.
    pub shared: u64,
}

impl Usage {
    /// Both together.
    pub fn total(self) -> u64 {
        self.exclusive + self.shared
    }
}

impl std::ops::Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            exclusive: self.exclusive + other.exclusive,
            shared: self.shared + other.shared,
        }
    }
}

impl Stored {
    /// What the files of `layer` take. A base elsewhere takes nothing here.
    ///
    /// # Errors
    /// `Io` if a file cannot be inspected.
    pub fn usage(&self, layer: &Layer) -> Result<Usage> {
        if layer.kind != Kind::Own {
            return Ok(Usage::default());
        }
        let files = [data_name(layer.uuid), map_name(layer.uuid)];
        files.iter().try_fold(Usage::default(), |sum, name| {
            Ok(sum + file_usage(self.directory(), name)?)
        })
    }

    /// What all layers take together.
    ///
    /// # Errors
    /// As [`Stored::usage`].
    pub fn total_usage(&self) -> Result<Usage> {
        let mut sum = Usage::default();
        for layer in &self.root().layers {
            sum = sum + self.usage(layer)?;
        }
        Ok(sum)
    }

    /// The image in which a layer of the image's own directory was made; `None` for one that is elsewhere.
    ///
    /// # Errors
    /// `Io` if the map cannot be read, `Corrupt` or `Unsupported` for its header.
    pub fn origin(&self, layer: &Layer) -> Result<Option<Uuid>> {
        if layer.kind != Kind::Own {
            return Ok(None);
        }
        let name = map_name(layer.uuid);
        let mut raw = [0; HEADER_BYTES];
        self.directory()
            .open(&name, Access::Read)
            .and_then(|map| read_exact_at(map.as_ref(), &mut raw, 0))
            .context(|| format!("cannot read {name}"))?;
        Ok(Some(Header::decode(&raw)?.image))
    }

    /// What makes the active layer's stores durable on this filesystem.
    ///
    /// # Errors
    /// `Io` if a file cannot be opened for writing, `MixedDomains` if only one of its two files is on DAX.
    pub fn domain(&self) -> Result<Domain> {
        let active = self.root().active;
        let map = self.open_to_ask(&map_name(active))?;
        let data = self.open_to_ask(&data_name(active))?;
        domain_of(&active.to_string(), map.as_ref(), data.as_ref())
    }

    /// What keeps the active layer's files from DAX on a device that could do it, with the name of the first such file.
    ///
    /// # Errors
    /// `Io` if a file cannot be opened for writing.
    pub fn dax_hindrance(&self) -> Result<Option<(String, Hindrance)>> {
        let active = self.root().active;
        for name in [map_name(active), data_name(active)] {
            let file = self.open_to_ask(&name)?;
            let context = || "cannot tell the persistence domain".to_owned();
            if file.domain().context(context)? == Domain::PageCache
                && let Some(hindrance) = file.as_real().and_then(Hindrance::of)
            {
                return Ok(Some((name, hindrance)));
            }
        }
        Ok(None)
    }

    fn open_to_ask(&self, name: &str) -> Result<Arc<dyn File>> {
        self.directory()
            .open(name, Access::Write)
            .context(|| "cannot tell the persistence domain".to_owned())
    }
}

fn file_usage(dir: &dyn Directory, name: &str) -> Result<Usage> {
    let context = || format!("cannot inspect {name}");
    let status = dir
        .open(name, Access::Read)
        .and_then(|f| f.status())
        .context(context)?;
    Ok(if status.links > 1 {
        Usage {
            exclusive: 0,
            shared: status.allocated,
        }
    } else {
        Usage {
            exclusive: status.allocated,
            shared: 0,
        }
    })
}
