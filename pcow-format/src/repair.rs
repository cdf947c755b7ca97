// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can be mended in an image that nobody has in use. Mends only what cannot make the content worse: nothing is guessed,
//! and as long as an image contradicts itself no file is removed.

use crate::active::{Active, scan_words};
use crate::check::check;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{FLUSH_FAILED_FILE, Image, Stored};
use crate::layer_files::{self, Pair};
use crate::lock::ImageLock;
use crate::map::{self, CLUSTERS_PER_WORD, State, Word};
use crate::medium::{Access, Site, read_exact_at};
use crate::ops::{remove_layer_files, unnamed_layers};

/// What becomes of clusters that were never flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unflushed {
    /// Those of an earlier boot are taken for data: the machine was shut down in order, so that their bytes were written.
    Trust,
    /// Those of this boot are given up: their bytes are gone from the page cache.
    Discard,
}

/// Decides about clusters that were never flushed, before the image is opened for writing, which would decide by the boot;
/// returns how many there were.
///
/// # Errors
/// `Locked`; `FlushFailed` if clusters are to be trusted after a flush has failed; `Corrupt` or `Io` if the active layer cannot be
/// read or written. Until the end an opening decides as before.
pub fn settle_unflushed(stored: &Stored, what: Unflushed) -> Result<u64> {
    let _lock = ImageLock::exclusive(stored.directory())?;
    let stored = stored.again()?;
    let pair = open_active(&stored)?;
    if what == Unflushed::Trust {
        refuse_to_trust_after_failed_flush(&stored, &pair)?;
    }
    let of_this_boot = Active::is_tagged(pair.map.as_ref(), stored.environment().boot)?;
    if of_this_boot == (what == Unflushed::Trust) {
        // Clusters of this boot are data already; those of another one are discarded by the next opening.
        return Ok(0);
    }
    let context = || "cannot settle the clusters that were not flushed".to_owned();
    let layer = stored.root().active.to_string();
    // I7: a sync after one that failed succeeds without what that did not write.
    let distrust = || Active::distrust_map(pair.map.as_ref(), &layer);
    if what == Unflushed::Trust {
        // I1: the words become data for good.
        let site = Site("repair.trust.data_sync");
        let synced = pair.data.sync_data(site);
        synced.inspect_err(|_| distrust()).context(context)?;
    }
    let mut count = 0;
    scan_words(pair.map.as_ref(), &mut |number, word| {
        let (without, live) = word.discard_live();
        if live == 0 {
            return Ok(());
        }
        count += u64::from(live);
        let word = match what {
            Unflushed::Trust => word.settle(word),
            Unflushed::Discard => without,
        };
        let bytes = word.0.to_le_bytes();
        let site = Site("repair.live.word");
        pair.map.write_at(site, &bytes, map::word_offset(number))
    })
    .context(context)?;
    let site = Site("repair.live.sync");
    let synced = pair.map.sync_data(site);
    synced.inspect_err(|_| distrust()).context(context)?;
    Ok(count)
}

/// Of what a failed flush did not write nobody knows what the medium holds (M14).
fn refuse_to_trust_after_failed_flush(stored: &Stored, pair: &Pair) -> Result<()> {
    if stored.flush_has_failed()? || Active::is_distrusted(pair.map.as_ref())? {
        let what = "a flush of this image has failed, so clusters that it did not flush cannot be taken for data";
        return Err(Error::new(ErrorKind::FlushFailed, what));
    }
    Ok(())
}

/// Mends what can be, and says what that was.
///
/// # Errors
/// `Locked`, and what opening the image may fail with.
pub fn repair(stored: &Stored) -> Result<Vec<String>> {
    let mut done = Vec::new();
    let lock = ImageLock::exclusive(stored.directory())?;
    let stored = stored.again()?;
    if let Some(text) = forget_clusters_past_the_end(&stored)? {
        done.push(text);
    }
    if !check(&stored)?.corruptions.is_empty() {
        return Ok(done);
    }
    done.extend(forget_failed_flush(&stored)?);
    done.extend(remove_unnamed(&stored)?);
    drop(lock);
    let image = Image::load(stored.share_directory(), stored.environment().clone())?;
    done.extend(give_unused_space_back(&image)?);
    Ok(done)
}

fn open_active(stored: &Stored) -> Result<Pair> {
    let active = stored.root().active_layer()?;
    layer_files::open_own(stored.directory(), active, Access::Write)
}

/// Words of the active layer that speak of clusters past the end of the disk, which nobody can see.
fn forget_clusters_past_the_end(stored: &Stored) -> Result<Option<String>> {
    let active = stored.root().active_layer()?;
    let clusters = active.cluster()?.clusters_in(active.virtual_size);
    // What cannot be opened is for the check to report.
    let Ok(pair) = open_active(stored) else {
        return Ok(None);
    };
    let mut wrong = Vec::new();
    let context = || "cannot read the map of the active layer".to_owned();
    scan_words(pair.map.as_ref(), &mut |number, word| {
        let inside = |slot: u64| number * CLUSTERS_PER_WORD + slot < clusters;
        let clean = (0..CLUSTERS_PER_WORD).filter(|s| !inside(*s));
        let clean = clean.fold(word, |word, slot| word.with(slot, State::Absent));
        if clean != word {
            wrong.push((number, clean));
        }
        Ok(())
    })
    .context(context)?;
    for (number, Word(clean)) in &wrong {
        let offset = map::word_offset(*number);
        let site = Site("repair.past_end.word");
        pair.map
            .write_at(site, &clean.to_le_bytes(), offset)
            .context(context)?;
    }
    // Without a sync: nothing rests on these words before the image is opened, and that or its first flush syncs the map.
    let what = "the map of the active layer does not speak of clusters past its end any more";
    Ok((!wrong.is_empty()).then(|| what.to_owned()))
}

/// I7: the image is closed, and was found sound.
fn forget_failed_flush(stored: &Stored) -> Result<Option<String>> {
    let context = || format!("cannot remove {FLUSH_FAILED_FILE}");
    let dir = stored.directory();
    match dir.unlink(Site("repair.flush_failed.unlink"), FLUSH_FAILED_FILE) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.context(context)?,
    }
    // The opening that follows syncs the directory.
    let what = "the failed flush is forgotten; what was written last before it may be missing";
    Ok(Some(what.to_owned()))
}

fn remove_unnamed(stored: &Stored) -> Result<Option<String>> {
    let names = stored.directory().names();
    let names = names.context(|| "cannot list the image's directory".to_owned())?;
    let unnamed = unnamed_layers(stored.root(), &names);
    for layer in &unnamed {
        remove_layer_files(stored.directory(), *layer)?;
    }
    let what = format!(
        "removed the files of {} layers that are not part of the image",
        unnamed.len()
    );
    Ok((!unnamed.is_empty()).then_some(what))
}

fn give_unused_space_back(image: &Image) -> Result<Option<String>> {
    // I3: what is not data now is not data after a crash either.
    image.flush()?;
    let before = image.allocated()?;
    image.active.give_back_unused()?;
    let freed = before.saturating_sub(image.allocated()?);
    Ok((freed > 0).then(|| format!("gave {freed} bytes back that the active layer did not use")))
}

/// Reads every byte that is data in the layers of the image; says what cannot be read.
///
/// # Errors
/// If a map cannot be read.
pub fn read_all(stored: &Stored, reached: &mut dyn FnMut(u64)) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let mut done = 0;
    for layer in &stored.root().layers {
        let env = stored.environment();
        // What cannot be opened is for the check to report.
        let Ok(Some(pair)) = layer_files::open_pair(stored.directory(), layer, &env.bases) else {
            continue;
        };
        let mut buf = vec![0; STEP_BYTES];
        let mut at = 0;
        let context = || format!("cannot look for data in layer {}", layer.uuid);
        while let Some(data) = pair.data.next_data(at).context(context)? {
            at = data.start;
            while at < data.end {
                let wanted = usize::try_from(data.end - at).unwrap_or(STEP_BYTES);
                let piece = &mut buf[..wanted.min(STEP_BYTES)];
                if let Err(e) = read_exact_at(pair.data.as_ref(), piece, at) {
                    faults.push(format!(
                        "layer {}: {} bytes at offset {at} cannot be read: {e}",
                        layer.uuid,
                        piece.len()
                    ));
                }
                let read = u64::try_from(piece.len()).unwrap_or(u64::MAX);
                at += read;
                done += read;
                reached(done);
            }
        }
    }
    Ok(faults)
}

/// Bytes read at a time; a fault is told of a piece this large.
const STEP_BYTES: usize = 64 << 10;
