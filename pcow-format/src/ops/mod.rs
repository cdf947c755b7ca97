// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations on the layer tree. Each builds complete, durable files first and switches `image.json` last (I4), so that
//! a crash leaves the image as it was or as it will be.

mod create;
mod delete;
mod rebase;
mod receive;
mod rename;
mod resize;
mod rollback;
mod snapshot;

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

pub use create::{
    Base, Created, Fill, NewImage, create, create_filled, create_filled_in, create_in,
};
pub use delete::{Deleted, Deletion};
pub use rebase::{Rebased, rebase_unsafe, rebase_unsafe_of};
pub use receive::{
    RECEIVE_FILE, Receive, Received, Unfinished, give_up_receiving, give_up_receiving_in, receive,
    receive_in, unfinished, unfinished_in,
};
pub use rollback::RolledBack;
pub use snapshot::{Checksum, Prepared};

use crate::active::scan_words;
use crate::error::{IoContext, Result};
use crate::image::{ROOT_PART, Stored};
use crate::layer_files::{data_name, map_name};
use crate::medium::{Access, Directory, Site};
use crate::mutant::{self, Mutant};
use crate::root::{Kind, Root};

/// Seconds since the epoch.
fn now() -> u64 {
    // A clock before 1970 is a clock that was never set.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// Removes what an operation that was cut off left behind, as far as I5 allows: a root on its way, and layers that the
/// root does not name and that hold not one data word. Anything else stays for `check` to report.
pub(crate) fn sweep(stored: &Stored) -> Result<()> {
    let dir = stored.directory();
    let context = || "cannot clean up after an operation that was cut off".to_owned();
    let names = dir.names().context(context)?;
    if names.iter().any(|n| n == ROOT_PART) {
        dir.unlink(Site("sweep.part.unlink"), ROOT_PART)
            .context(context)?;
    }
    // What a deletion was about to make or to remove: it said so before.
    let marked = marked_layers(&names);
    for layer in &marked {
        if stored.root().layer(*layer).is_none() {
            remove_layer_files(dir, *layer)?;
        }
    }
    delete::remove_marks(dir, &marked)?;
    for layer in unnamed_layers(stored.root(), &names) {
        // What cannot be looked at is not removed, and no reason to refuse the image.
        if is_without_content(dir, layer).unwrap_or(false) || mutant::is(Mutant::OrphanRemoved) {
            remove_layer_files(dir, layer)?;
        }
    }
    Ok(())
}

/// Layers that a deletion has marked.
fn marked_layers(names: &[String]) -> Vec<Uuid> {
    let layer_of = |name: &String| layer_named(name.strip_suffix(delete::MARK)?);
    names.iter().filter_map(layer_of).collect()
}

/// The layer that `stem` is the name of. Other spellings of a UUID are other people's files.
fn layer_named(stem: &str) -> Option<Uuid> {
    let uuid = Uuid::parse_str(stem).ok()?;
    (uuid.to_string() == stem).then_some(uuid)
}

/// Layers of which there are files but no row in the layer table, in the order of `names`.
pub(crate) fn unnamed_layers(root: &Root, names: &[String]) -> Vec<Uuid> {
    let named: HashSet<_> = root.layers.iter().map(|l| l.uuid).collect();
    let layer_of = |name: &String| {
        let stem = name
            .strip_suffix(".map")
            .or_else(|| name.strip_suffix(".data"))?;
        layer_named(stem)
    };
    let mut seen = HashSet::new();
    names
        .iter()
        .filter_map(layer_of)
        .filter(|layer| !named.contains(layer) && seen.insert(*layer))
        .collect()
}

/// Whether the files of `layer`, as far as they exist, hold nothing: no word in the map, or no map and no data.
fn is_without_content(dir: &dyn Directory, layer: Uuid) -> std::io::Result<bool> {
    match dir.open(&map_name(layer), Access::Read) {
        Ok(map) => {
            let mut empty = true;
            scan_words(map.as_ref(), &mut |_, _| {
                empty = false;
                Ok(())
            })?;
            Ok(empty)
        }
        // A data file is created before its map; without one it is the work of a creation that was cut off, and then
        // nothing was ever written to it.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let data = dir.open(&data_name(layer), Access::Read)?;
            Ok(data.next_data(0)?.is_none())
        }
        Err(e) => Err(e),
    }
}

/// Removes the names of a layer's files; one that is missing already is no error.
pub(crate) fn remove_layer_files(dir: &dyn Directory, layer: Uuid) -> Result<()> {
    // The map goes last: a data file without map would be taken for unfinished only while it is empty.
    for name in [data_name(layer), map_name(layer)] {
        match dir.unlink(Site("layer.unlink"), &name) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).context(|| format!("cannot remove {name}"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes the files of layers that a commit has taken out of the table. What the commit did is done, so it does not fail for
/// files that stay: those that hold nothing go at the next opening (I5), others by `pcow-img check --repair`.
fn remove_unused(dir: &dyn Directory, layers: &[Uuid]) {
    for layer in layers {
        if let Err(e) = remove_layer_files(dir, *layer) {
            log::warn!("{e}; it takes space and is not used any more");
        }
    }
}

/// Takes out of the table the layers that neither the active layer nor a snapshot needs; returns the image's own ones,
/// whose files may be removed once the root is committed.
fn drop_unused_layers(root: &mut Root) -> Result<Vec<Uuid>> {
    let tops: Vec<_> = root
        .snapshots
        .iter()
        .map(|s| s.layer)
        .chain([root.active])
        .collect();
    let mut needed = HashSet::new();
    for top in tops {
        let chain: Vec<_> = root.chain(top)?.iter().map(|l| l.uuid).collect();
        needed.extend(chain);
    }
    let unused: Vec<_> = root
        .layers
        .iter()
        .filter(|l| !needed.contains(&l.uuid) && l.kind == Kind::Own)
        .map(|l| l.uuid)
        .collect();
    root.layers.retain(|l| needed.contains(&l.uuid));
    Ok(unused)
}
