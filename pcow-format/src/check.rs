// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Looks an image through and says what is wrong with it. Writes nothing, and stops at nothing that it finds.

use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use crate::active::scan_words;
use crate::error::{ErrorKind, IoContext, Result, chain_text};
use crate::image::{ROOT_PART, Stored};
use crate::layer_files::{self, Pair};
use crate::map::{CLUSTERS_PER_WORD, State};
use crate::medium::{Access, File};
use crate::ops::unnamed_layers;
use crate::root::{Kind, Layer};
use crate::units::{Cluster, ClusterRange};

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The image contradicts itself: reading it may fail or show wrong bytes.
    pub corruptions: Vec<String>,
    /// Layers that could not be looked at, which says nothing about them.
    pub unchecked: Vec<String>,
    /// Space that is taken for nothing, in bytes; harmless.
    pub leaked_bytes: u64,
    /// What is taken for nothing.
    pub leaks: Vec<String>,
    /// Clusters that are data, in all layers.
    pub data_clusters: u64,
    /// Of these, clusters whose durability rests on the page cache of this boot.
    pub live_clusters: u64,
}

/// Checks every layer that the image names, and every file that it does not.
///
/// # Errors
/// Only if the directory itself cannot be read: all else is a finding.
pub fn check(stored: &Stored) -> Result<Report> {
    let mut report = Report::default();
    for layer in &stored.root().layers {
        if let Err(e) = check_layer(stored, layer, &mut report) {
            match e.kind() {
                ErrorKind::Io | ErrorKind::NoSpace | ErrorKind::BaseForbidden => {
                    report.unchecked.push(chain_text(&e))
                }
                _ => report.corruptions.push(chain_text(&e)),
            }
        }
    }
    check_leftovers(stored, &mut report)?;
    if stored.flush_has_failed()? {
        let what = "a flush has failed: what was written last before it may be missing";
        report.unchecked.push(what.to_owned());
    }
    Ok(report)
}

fn check_layer(stored: &Stored, layer: &Layer, report: &mut Report) -> Result<()> {
    let env = stored.environment();
    // Opening checks names, lengths, headers, and a raw base's identity.
    layer_files::open_for_reading(stored.directory(), layer, &env.bases, env.boot)?;
    let Some(pair) = layer_files::open_pair(stored.directory(), layer, &env.bases)? else {
        return Ok(());
    };
    check_words(&pair, layer, report)?;
    if layer.sealed {
        check_sum(pair.map.as_ref(), layer, report)?;
    }
    if layer.kind == Kind::Own {
        check_unused_space(&pair, layer, report)?;
    }
    Ok(())
}

fn check_words(pair: &Pair, layer: &Layer, report: &mut Report) -> Result<()> {
    let clusters = layer.cluster()?.clusters_in(layer.virtual_size);
    let mut beyond = false;
    let mut live = 0;
    scan_words(pair.map.as_ref(), &mut |number, word| {
        report.data_clusters += u64::from(word.data_count());
        live += u64::from(word.discard_live().1);
        // Only in a map's last words is there anything to look for past the end.
        let first = number * CLUSTERS_PER_WORD;
        let past = clusters.saturating_sub(first)..CLUSTERS_PER_WORD;
        beyond |= past.into_iter().any(|slot| word.get(slot) != State::Absent);
        Ok(())
    })
    .context(|| format!("cannot read the map of layer {}", layer.uuid))?;
    report.live_clusters += live;
    if beyond {
        report.corruptions.push(format!(
            "layer {}: the map speaks of clusters past its end",
            layer.uuid
        ));
    }
    if layer.sealed && live > 0 {
        report.corruptions.push(format!(
            "layer {}: {live} live clusters in a sealed map",
            layer.uuid
        ));
    }
    Ok(())
}

fn check_sum(map: &dyn File, layer: &Layer, report: &mut Report) -> Result<()> {
    let Some(expected) = &layer.map_checksum else {
        return Ok(());
    };
    let found = layer_files::map_checksum(map)
        .context(|| format!("cannot read the map of layer {}", layer.uuid))?;
    if found != *expected {
        let what = format!(
            "layer {}: the map's checksum is {found}, not {expected}",
            layer.uuid
        );
        report.corruptions.push(what);
    }
    Ok(())
}

/// Storage under clusters that are not data: prepared ahead and not used, or left by a crash.
fn check_unused_space(pair: &Pair, layer: &Layer, report: &mut Report) -> Result<()> {
    let mut leaked = 0;
    let context = || format!("cannot inspect the data of layer {}", layer.uuid);
    let mut at = 0;
    while let Some(data) = pair.data.next_data(at).context(context)? {
        leaked += unused_bytes(&pair.map, layer, &data)?;
        at = data.end;
    }
    if leaked > 0 {
        report.leaked_bytes += leaked;
        report.leaks.push(format!(
            "layer {}: {leaked} bytes outside of data clusters",
            layer.uuid
        ));
    }
    Ok(())
}

fn unused_bytes(map: &Arc<dyn File>, layer: &Layer, data: &Range<u64>) -> Result<u64> {
    let cluster = layer.cluster()?;
    let covering = cluster.covering(data);
    let mut unused = 0;
    let mut start = covering.start;
    while start < covering.end {
        let end = covering.end.min(start + CLUSTERS_PER_STEP);
        let states = crate::active::read_states(map.as_ref(), ClusterRange::new(start, end))
            .context(|| format!("cannot read the map of layer {}", layer.uuid))?;
        for (number, _) in (start..end).zip(states).filter(|(_, s)| !s.is_data()) {
            let own = cluster.byte_range(Cluster(number).only());
            unused += own.end.min(data.end) - own.start.max(data.start);
        }
        start = end;
    }
    Ok(unused)
}

const CLUSTERS_PER_STEP: u64 = 32 << 10;

fn check_leftovers(stored: &Stored, report: &mut Report) -> Result<()> {
    let names = stored
        .directory()
        .names()
        .context(|| "cannot list the image's directory".to_owned())?;
    let unnamed = unnamed_layers(stored.root(), &names);
    for name in names {
        let stem = name.split('.').next().unwrap_or_default();
        let of_unnamed = unnamed.iter().any(|u| u.to_string() == stem);
        if !of_unnamed && name != ROOT_PART {
            continue;
        }
        let file = stored.directory().open(&name, Access::Read);
        let bytes = file.and_then(|f| f.status()).map_or(0, |s| s.allocated);
        report.leaked_bytes += bytes;
        report
            .leaks
            .push(format!("{name}: not part of the image, {bytes} bytes"));
    }
    Ok(())
}
