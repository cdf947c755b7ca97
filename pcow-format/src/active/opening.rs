// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opening the active layer: what an earlier boot left live goes, and what a predecessor left on its way is made durable.

use std::ops::Range;

use uuid::Uuid;

use super::{Active, scan_words};
use crate::error::{IoContext, Result};
use crate::map::{self, CLUSTERS_PER_WORD, TAG_BYTES, TAG_OFFSET, Tag};
use crate::medium::{Domain, File, Site, read_exact_at};
use crate::units::{self, Cluster};

/// What opening the layer found out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Clusters that were live in an earlier boot: their bytes were never flushed and are gone.
    pub discarded_clusters: u64,
    /// The layer was on DAX since it was made, and is in the page cache now. Told once.
    pub left_dax: bool,
}

impl Active {
    /// Makes durable what a predecessor stored and did not come to fence or sync before it died: this process sees
    /// it, and rests promises on it. A word without fence may be believed (I2). A cluster may be live, if the filesystem
    /// was mounted without DAX earlier in this boot: what a guest fences in it from now on must not go with the boot.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn settle_inherited(&self) -> Result<()> {
        if self.domain == Domain::PageCache {
            // Words of this boot are live; a flush settles data and words in their order.
            return Ok(());
        }
        let noted = self.note_live()?;
        if !noted.is_empty() {
            self.data
                .sync_data(Site("active.open.data_sync"))
                .inspect_err(|_| self.distrust())
                .context(|| format!("cannot sync the data of layer {}", self.name))?;
            self.settle_live(&noted)?;
        }
        self.map
            .sync_data(Site("active.open.map_sync"))
            .inspect_err(|_| self.distrust())
            .context(|| format!("cannot sync the map of layer {}", self.name))
    }

    /// Whether the live words of `map` are of the boot `boot`, and of this very file.
    pub(crate) fn is_tagged(map: &dyn File, boot: Uuid) -> Result<bool> {
        let context = || "cannot read a boot tag".to_owned();
        let present = Tag::new(boot, map.status().context(context)?.identity);
        let mut raw = [0; TAG_BYTES];
        read_exact_at(map, &mut raw, TAG_OFFSET).context(context)?;
        Ok(Tag::decode(&raw) == Some(present))
    }

    /// Whether a flush has failed since the image was opened last, so that live words of `map` are not to be believed.
    pub(crate) fn is_distrusted(map: &dyn File) -> Result<bool> {
        let mut raw = [0; TAG_BYTES];
        read_exact_at(map, &mut raw, TAG_OFFSET).context(|| "cannot read a boot tag".to_owned())?;
        Ok(Tag::decode(&raw).is_some_and(|tag| tag.is_of_failed_flush()))
    }

    /// Live words of this boot stay; those of another one are discarded *before* the new tag is written, or they
    /// would look like this boot's if this process died in between. After a failed flush everything else is written again
    /// before, too: the new tag ends the distrust.
    pub(super) fn settle_tag(&self, boot: Uuid) -> Result<Recovery> {
        let context = || format!("cannot read the boot tag of layer {}", self.name);
        let present = Tag::new(boot, self.map.status().context(context)?.identity);
        let mut raw = [0; TAG_BYTES];
        read_exact_at(self.map.as_ref(), &mut raw, TAG_OFFSET).context(context)?;
        // A map that never was in the page cache domain has no tag and no live words.
        let untagged = raw == [0; TAG_BYTES];
        if untagged && self.domain == Domain::Dax {
            return Ok(Recovery::default());
        }
        if Tag::decode(&raw) == Some(present) {
            self.collect_live()?;
            return Ok(Recovery::default());
        }
        let recovery = if untagged {
            Recovery {
                left_dax: true,
                ..Recovery::default()
            }
        } else {
            self.discard_live()?
        };
        if Self::is_distrusted(self.map.as_ref())? {
            self.write_again()?;
        }
        let context = || format!("cannot write the boot tag of layer {}", self.name);
        let site = Site("active.open.tag");
        self.map
            .write_at(site, &present.encode(), TAG_OFFSET)
            .context(context)?;
        // Durable before the first live word: an old tag beside live words of this boot would do no harm, but no
        // tag at all would claim that there are none.
        self.map
            .sync_data(Site("active.open.tag_sync"))
            .inspect_err(|_| self.distrust())
            .context(context)?;
        Ok(recovery)
    }

    /// M14: what a failed sync did not write counts as written, so a later one succeeds without it. All that is seen now is
    /// made to be written: from then on a sync means it again. Nobody else may store meanwhile: what is read is written back.
    fn write_again(&self) -> Result<()> {
        log::warn!(
            "layer {}: a flush has failed, so all that it holds is written again; what was not flushed then may be lost",
            self.name
        );
        let context = || format!("cannot write again what layer {} holds", self.name);
        let mut buf = vec![0; units::len(self.cluster.bytes())];
        scan_words(self.map.as_ref(), &mut |number, word| {
            let first = number * CLUSTERS_PER_WORD;
            let data = (0..CLUSTERS_PER_WORD).filter(|slot| word.get(*slot).is_data());
            data.map(|slot| Cluster(first + slot).only())
                .try_for_each(|run| {
                    let range = self.cluster.byte_range(run);
                    let site = Site("active.again.data");
                    write_range_again(self.data.as_ref(), site, range, &mut buf)
                })
        })
        .context(context)?;
        // Words that became zero, too. Nothing is synced: what was written again is to be written, which the next flush does.
        let end = self.map.status().context(context)?.len;
        write_range_again(
            self.map.as_ref(),
            Site("active.again.map"),
            0..end,
            &mut buf,
        )
        .context(context)
    }

    fn collect_live(&self) -> Result<()> {
        let mut live = self.live();
        scan_words(self.map.as_ref(), &mut |number, word| {
            if word.has_live() {
                live.insert(number);
            }
            Ok(())
        })
        .context(|| format!("cannot read the map of layer {}", self.name))
    }

    /// Turns live words into absent ones. Needs no sync of its own: until the tag is durable it names a boot that is
    /// over, and whoever reads it discards them again.
    fn discard_live(&self) -> Result<Recovery> {
        let mut discarded = 0;
        let context = || format!("cannot discard unflushed clusters of layer {}", self.name);
        scan_words(self.map.as_ref(), &mut |number, word| {
            let (word, count) = word.discard_live();
            if count == 0 {
                return Ok(());
            }
            discarded += u64::from(count);
            let site = Site("active.open.discard");
            self.map
                .write_at(site, &word.0.to_le_bytes(), map::word_offset(number))
        })
        .context(context)?;
        Ok(Recovery {
            discarded_clusters: discarded,
            left_dax: false,
        })
    }
}

/// Writes what `range` of `file` shows into it. Not its holes: they are holes on the medium, too.
fn write_range_again(
    file: &dyn File,
    site: Site,
    range: Range<u64>,
    buf: &mut [u8],
) -> std::io::Result<()> {
    let mut at = range.start;
    while at < range.end
        && let Some(data) = file.next_data(at)?
        && data.start < range.end
    {
        at = data.start.max(at);
        let end = data.end.min(range.end).min(at + units::bytes(buf.len()));
        let piece = &mut buf[..units::len(end - at)];
        read_exact_at(file, piece, at)?;
        file.write_at(site, piece, at)?;
        at = end;
    }
    Ok(())
}
