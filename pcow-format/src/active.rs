// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The active layer: the one whose clusters change while a guest runs, and the order in which they become durable.
//!
//! Callers hold a lock per cluster across look-up and change (F1); this module only guards the words that neighbouring
//! clusters share. It knows nothing of the layers below: its caller says what a cluster is to hold.
//!
//! A cluster becomes data in this order, and a crash between any two steps leaves it absent or whole:
//!
//! | | page cache | DAX |
//! |---|---|---|
//! | 1 | reserve, or write the bytes | reserve and write the bytes, zeros among them, durably (I1) |
//! | 2 | word 11, *live*: this boot only | word 01, write-back, fence (I2) |
//! | 3 | `flush`: `fdatasync` the data, noted words 11 to 01, `fdatasync` the map | |

mod space;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::error::{Error, ErrorKind, IoContext, Result, chain_text};
use crate::layer_files;
use crate::map::{self, State, TAG_BYTES, TAG_OFFSET, Tag, WORDS_OFFSET, Word};
use crate::medium::{Domain, File, Hindrance, Site, read_exact_at};
use crate::mutant::{self, Mutant};
use crate::ready::Ready;
use crate::units::{self, Cluster, ClusterRange, ClusterSize, VirtualSize};

/// Bytes of a map read at once when all of it is looked through: 8,192 words.
const SCAN_BYTES: usize = 64 << 10;

/// The active layer, open for writing.
#[derive(Debug)]
pub struct Active {
    name: String,
    size: VirtualSize,
    cluster: ClusterSize,
    map: Arc<dyn File>,
    data: Arc<dyn File>,
    /// Whether `data` is open for reading only, because the layer is about to be sealed.
    closed_for_writing: bool,
    domain: Domain,
    /// Guards every read-modify-write of a word; holds the numbers of words that may have live clusters.
    live: Mutex<BTreeSet<u64>>,
    ready: Mutex<Ready>,
    /// Held for the length of a flush; set for ever by the first that fails (I7).
    flush_failed: Mutex<Option<String>>,
}

/// What opening the layer found out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Clusters that were live in an earlier boot: their bytes were never flushed and are gone.
    pub discarded_clusters: u64,
    /// The layer was on DAX since it was made, and is in the page cache now. Told once.
    pub left_dax: bool,
}

impl Active {
    /// Opens the layer `name` and settles what an earlier boot left (section "Opening" of `docs/image-format.md`).
    ///
    /// # Errors
    /// `Io` if a file cannot be read or written.
    pub(crate) fn open(
        name: String,
        (size, cluster): (VirtualSize, ClusterSize),
        (map, data): (Arc<dyn File>, Arc<dyn File>),
        boot: Uuid,
    ) -> Result<(Self, Recovery)> {
        let domain = domain_of(&name, map.as_ref(), data.as_ref())?;
        let active = Self {
            name,
            size,
            cluster,
            map,
            data,
            closed_for_writing: false,
            domain,
            live: Mutex::default(),
            ready: Mutex::new(Ready::new(cluster.clusters_in(size.bytes()))),
            flush_failed: Mutex::default(),
        };
        let recovery = active.settle_tag(boot)?;
        Ok((active, recovery))
    }

    /// What makes stores durable here.
    pub fn domain(&self) -> Domain {
        self.domain
    }

    /// Size of the clusters.
    pub fn cluster_size(&self) -> ClusterSize {
        self.cluster
    }

    /// Size of the disk.
    pub fn virtual_size(&self) -> VirtualSize {
        self.size
    }

    /// The data file, to be mapped by a frontend. Byte N of the disk is byte N of the file.
    pub fn data_file(&self) -> &dyn File {
        self.data.as_ref()
    }

    /// As [`Active::data_file`], to be kept for a moment: sealing the layer proves that nobody has it open for writing.
    pub fn share_data_file(&self) -> Arc<dyn File> {
        Arc::clone(&self.data)
    }

    /// Goes on with `reader`, the same file open for reading only: what was open for writing is closed.
    pub(crate) fn close_for_writing(&mut self, reader: Arc<dyn File>) {
        self.data = reader;
        self.closed_for_writing = true;
    }

    /// Takes that back, with `writer`, the same file open for writing.
    pub(crate) fn open_for_writing(&mut self, writer: Arc<dyn File>) {
        self.data = writer;
        self.closed_for_writing = false;
    }

    pub(crate) fn is_closed_for_writing(&self) -> bool {
        self.closed_for_writing
    }

    /// The checksum of the map, for a layer that is about to be sealed.
    pub(crate) fn map_checksum(&self) -> Result<String> {
        layer_files::map_checksum(self.map.as_ref())
            .context(|| format!("cannot read the map of layer {}", self.name))
    }

    /// State of one cluster.
    ///
    /// # Errors
    /// `Io` if the map cannot be read.
    pub fn state(&self, cluster: Cluster) -> Result<State> {
        Ok(self
            .read_word(map::word_of(cluster))?
            .get(map::slot_of(cluster)))
    }

    /// The longest run of data clusters around `cluster` within `bounds`; empty if `cluster` itself is none.
    ///
    /// # Errors
    /// `Io` if the map cannot be read.
    pub fn data_run(&self, cluster: Cluster, bounds: ClusterRange) -> Result<ClusterRange> {
        let states = self.states(bounds)?;
        let (before, after) = states.split_at(units::len(cluster.0 - bounds.start));
        let is_data = |s: &&State| s.is_data();
        let after = after.iter().take_while(is_data).count();
        if after == 0 {
            return Ok(ClusterRange::new(cluster.0, cluster.0));
        }
        let before = before.iter().rev().take_while(is_data).count();
        Ok(ClusterRange::new(
            cluster.0 - units::bytes(before),
            cluster.0 + units::bytes(after),
        ))
    }

    /// The states of the clusters of `run`, in order.
    ///
    /// # Errors
    /// `Io` if the map cannot be read.
    pub fn states(&self, run: ClusterRange) -> Result<Vec<State>> {
        read_states(self.map.as_ref(), run)
            .context(|| format!("cannot read the map of layer {}", self.name))
    }

    /// Gives `run`, all of it absent here and reading zero, storage that reads zero, ahead of its allocation.
    ///
    /// # Errors
    /// `NoSpace` or `Io`; nothing changed that anybody can see.
    pub fn prepare(&self, run: ClusterRange) -> Result<()> {
        if self.ready().all(run) {
            return Ok(());
        }
        self.give_storage(run)?;
        self.ready().set_spare(run);
        Ok(())
    }

    fn give_storage(&self, run: ClusterRange) -> Result<()> {
        let range = self.cluster.byte_range(run);
        match self.domain {
            Domain::PageCache => self.prepare_in_page_cache(range),
            Domain::Dax => self.prepare_on_dax(range),
        }
        .context(|| format!("cannot reserve space in layer {}", self.name))
    }

    fn prepare_in_page_cache(&self, range: Range<u64>) -> std::io::Result<()> {
        if self.is_hole(&range)? {
            // I1: a hole is durable zero, and reserving does not change what it reads.
            return self.data.reserve(Site("active.prepare.reserve"), range);
        }
        // Bytes of a copy that a crash cut off, or old ones that were not punched yet (I3).
        self.data.zero(Site("active.prepare.zero"), range)
    }

    /// Leaves *written* storage: each first store to a page that is only reserved would make the kernel change the file's
    /// extents and wait for the filesystem's journal, on the path of the guest's fault.
    fn prepare_on_dax(&self, range: Range<u64>) -> std::io::Result<()> {
        // In one piece first, so that the filesystem can choose an aligned extent, for a huge page.
        self.data
            .reserve(Site("active.prepare.reserve"), range.clone())?;
        // I1, I3: durable zeros over whatever is there. The word that follows is durable at once, too.
        self.data
            .write_zeros_durable(Site("active.prepare.zeros"), range)
    }

    /// Makes `run`, all of it absent here and reading zero, data that reads zero. Without a system call for storage if it
    /// was prepared.
    ///
    /// # Errors
    /// `NoSpace` or `Io`; the clusters are still absent then.
    pub fn allocate(&self, run: ClusterRange) -> Result<()> {
        if !self.ready().all(run) {
            self.give_storage(run)?;
            self.ready().set(run, true);
        }
        self.mark_data(run)
    }

    /// Makes `run`, which says *zero* here, data that reads zero. Durable before it returns: a word that
    /// is lost would otherwise uncover the parent's bytes.
    ///
    /// # Errors
    /// `NoSpace` or `Io`; the clusters still say zero then.
    pub fn allocate_over_zero(&self, run: ClusterRange) -> Result<()> {
        let range = self.cluster.byte_range(run);
        match self.domain {
            Domain::PageCache => {
                let site = Site("active.over_zero.zero");
                let zeroed = self.data.zero(site, range);
                zeroed.and_then(|()| self.data.sync_data(Site("active.over_zero.sync")))
            }
            Domain::Dax => self.prepare_on_dax(range),
        }
        .context(|| format!("cannot reserve space in layer {}", self.name))?;
        self.ready().set(run, true);
        self.set_words(run, State::Data)
    }

    /// Makes `run` data with the given content, which must be as long as the run.
    ///
    /// # Errors
    /// `NoSpace` or `Io`; the words are unchanged then.
    pub fn fill(&self, run: ClusterRange, content: &[u8]) -> Result<()> {
        let range = self.cluster.byte_range(run);
        assert_eq!(
            units::bytes(content.len()),
            range.end - range.start,
            "content fits the run"
        );
        let context = || format!("cannot copy into layer {}", self.name);
        // Until the copy is whole, what is there is neither the old zeros nor the new bytes.
        self.ready().set(run, false);
        match self.domain {
            // A whole-page write into the page cache reserves its blocks, or fails. It must not take the last ones:
            // a first store to storage that was reserved elsewhere would have none to split an extent with.
            Domain::PageCache => {
                self.data.leave_room(&range).context(context)?;
                let site = Site("active.fill.write");
                self.data
                    .write_at(site, content, range.start)
                    .context(context)?;
            }
            Domain::Dax => {
                self.data
                    .reserve(Site("active.fill.reserve"), range.clone())
                    .context(context)?;
                let site = Site("active.fill.write_durable");
                self.data
                    .write_durable_at(site, content, range.start)
                    .context(context)?;
            }
        }
        self.ready().set(run, true);
        self.mark_data(run)
    }

    /// Makes `run` data whose bytes are in the data file already, durably if the domain is DAX.
    pub(crate) fn mark_shared(&self, run: ClusterRange) -> Result<()> {
        self.mark_data(run)
    }

    /// Makes `run`, absent here, read zero whatever the parent holds.
    ///
    /// # Errors
    /// `Io`; the words are unchanged or changed in part then.
    pub fn mark_zero(&self, run: ClusterRange) -> Result<()> {
        self.set_words(run, State::Zero)
    }

    /// Makes sure that no store into `run`, which is data, can meet a full filesystem (I2): files that were
    /// restored sparse or share blocks with a copy are given storage of their own. Cheap after the first time.
    ///
    /// # Errors
    /// `NoSpace` or `Io`.
    pub fn ensure_storage(&self, run: ClusterRange) -> Result<()> {
        if self.ready().all(run) {
            return Ok(());
        }
        let range = self.cluster.byte_range(run);
        // On DAX a reservation, even one that finds everything there, leaves the inode to the journal, and the next fault
        // of the guest waits for that. A filesystem that does not tell is asked to reserve.
        let has_own =
            self.domain == Domain::Dax && self.data.has_own_storage(range.clone()).unwrap_or(false);
        if !has_own {
            self.data
                .reserve(Site("active.ensure.reserve"), range)
                .context(|| format!("cannot reserve space in layer {}", self.name))?;
        }
        self.ready().set(run, true);
        Ok(())
    }

    /// Whether [`Active::ensure_storage`] has nothing left to do for `run`.
    pub fn has_storage(&self, run: ClusterRange) -> bool {
        self.ready().all(run)
    }

    /// The map file.
    pub(crate) fn map_file(&self) -> &dyn File {
        self.map.as_ref()
    }

    /// Makes everything stored so far durable. Once it has failed it fails for ever (I7).
    ///
    /// # Errors
    /// `FlushFailed`.
    pub fn flush(&self) -> Result<()> {
        self.unless_failed(|| self.flush_once())
    }

    /// M14: pages that a failed sync did not write count as written. They can be dropped at any time, and then show what the
    /// medium holds: nothing yet, under a live cluster that was copied from below. So the next opening must not take live
    /// clusters for data, although the boot is the same: the tag names no boot from now on.
    fn distrust_live(&self) {
        if self.domain == Domain::Dax {
            return;
        }
        let distrusted = self.map.status().and_then(|status| {
            let tag = Tag::new(Uuid::nil(), status.identity);
            let site = Site("active.flush.distrust");
            self.map.write_at(site, &tag.encode(), TAG_OFFSET)
        });
        if let Err(e) = distrusted {
            log::error!(
                "layer {}: what was not flushed cannot be given up ({e}): run 'pcow-img check --discard-live' before the image is used again",
                self.name
            );
        }
    }

    /// Does what needs a sync, unless one has failed before; what fails now is remembered (I7).
    fn unless_failed(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut failed = self
            .flush_failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(earlier) = &*failed {
            let what = format!("an earlier flush of layer {} failed: {earlier}", self.name);
            return Err(Error::new(ErrorKind::FlushFailed, what));
        }
        work().map_err(|e| {
            if !mutant::is(Mutant::FlushErrorForgotten) {
                *failed = Some(e.to_string());
            }
            let what = format!("cannot flush layer {}", self.name);
            Error::new(ErrorKind::FlushFailed, what).caused_by(e)
        })
    }

    /// From now on no flush succeeds (I7); returns the error that says so.
    pub(crate) fn fail_flushes(&self, cause: &Error) -> Error {
        let refused = self.unless_failed(|| Err(Error::new(ErrorKind::Io, chain_text(cause))));
        refused.expect_err("what fails is remembered")
    }

    /// Only words noted *before* the data was synced may become durable: a word that turns live during the
    /// sync speaks of bytes that the sync may not have seen (I1).
    fn flush_once(&self) -> Result<()> {
        let noted = self.note_live()?;
        self.data
            .sync_data(Site("active.flush.data"))
            .inspect_err(|_| self.distrust_live())
            .context(|| "cannot sync the data file".to_owned())?;
        if self.domain == Domain::Dax && noted.is_empty() {
            return Ok(());
        }
        self.settle_live(&noted)?;
        self.map
            .sync_data(Site("active.flush.map"))
            .context(|| "cannot sync the map file".to_owned())
    }

    fn note_live(&self) -> Result<Vec<(u64, Word)>> {
        let numbers = std::mem::take(&mut *self.live());
        // A cluster that turns live after the take is in the new set again, whether or not it is noted here.
        let note = |number: &u64| Ok((*number, self.read_word(*number)?));
        numbers
            .iter()
            .map(note)
            .collect::<Result<_>>()
            .inspect_err(|_| {
                // Nothing was settled: they are still live.
                self.live().extend(&numbers);
            })
    }

    fn settle_live(&self, noted: &[(u64, Word)]) -> Result<()> {
        for (number, noted) in noted {
            let guard = self.live();
            let now = self.read_word(*number)?;
            let late = mutant::is(Mutant::LateWords);
            let settled = now.settle(if late { now } else { *noted });
            self.write_word(Site("active.flush.word"), *number, settled)?;
            drop(guard);
        }
        Ok(())
    }

    fn mark_data(&self, run: ClusterRange) -> Result<()> {
        self.ready().used(run);
        match self.domain {
            Domain::PageCache => self.set_words(run, State::Live),
            Domain::Dax => self.set_words(run, State::Data),
        }
    }

    fn set_words(&self, run: ClusterRange, state: State) -> Result<()> {
        for (number, slots) in map::words_of(run) {
            let mut live = self.live();
            let word = self.read_word(number)?;
            let word = slots.fold(word, |word, slot| word.with(slot, state));
            if word.has_live() {
                live.insert(number);
            }
            self.write_word(Site("active.word"), number, word)?;
        }
        if self.domain == Domain::Dax {
            // One fence for all words: none of them is relied on before this returns (I2).
            self.map.fence(Site("active.word.fence"));
        }
        Ok(())
    }

    fn write_word(&self, site: Site, number: u64, word: Word) -> Result<()> {
        let offset = map::word_offset(number);
        match self.domain {
            Domain::PageCache => self.map.write_at(site, &word.0.to_le_bytes(), offset),
            Domain::Dax => self
                .map
                .store_word(site, offset, word.0)
                .and_then(|()| self.map.write_back(Site("active.word.write_back"), offset)),
        }
        .context(|| format!("cannot write the map of layer {}", self.name))
    }

    fn read_word(&self, number: u64) -> Result<Word> {
        let mut raw = [0; 8];
        read_exact_at(self.map.as_ref(), &mut raw, map::word_offset(number))
            .context(|| format!("cannot read the map of layer {}", self.name))?;
        Ok(Word(u64::from_le_bytes(raw)))
    }

    fn is_hole(&self, range: &Range<u64>) -> std::io::Result<bool> {
        let data = self.data.next_data(range.start)?;
        Ok(data.is_none_or(|d| d.start >= range.end))
    }

    /// Whether every cluster is absent.
    ///
    /// # Errors
    /// `Io` if the map cannot be read.
    pub fn is_empty(&self) -> Result<bool> {
        let mut empty = true;
        scan_words(self.map.as_ref(), &mut |_, _| {
            empty = false;
            Ok(())
        })
        .context(|| format!("cannot read the map of layer {}", self.name))?;
        Ok(empty)
    }

    fn live(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        // The set may then hold too many numbers, never too few: inserts come before the word is written.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ready(&self) -> MutexGuard<'_, Ready> {
        // A bit is set after the work that it speaks of, cleared before: a panic in between leaves it clear.
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

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
                .context(|| format!("cannot sync the data of layer {}", self.name))?;
            self.settle_live(&noted)?;
        }
        self.map
            .sync_data(Site("active.open.map_sync"))
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

    /// Live words of this boot stay; those of another one are discarded *before* the new tag is written, or they
    /// would look like this boot's if this process died in between.
    fn settle_tag(&self, boot: Uuid) -> Result<Recovery> {
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
        let context = || format!("cannot write the boot tag of layer {}", self.name);
        let site = Site("active.open.tag");
        self.map
            .write_at(site, &present.encode(), TAG_OFFSET)
            .context(context)?;
        // Durable before the first live word: an old tag beside live words of this boot would do no harm, but no
        // tag at all would claim that there are none.
        self.map
            .sync_data(Site("active.open.tag_sync"))
            .context(context)?;
        Ok(recovery)
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

/// The domain of a layer's two files, which must be in the same one. With words in one domain and bytes in the other, a
/// word would be durable before its bytes (I1), or a guest's own flush would not cover the word (I2).
pub(crate) fn domain_of(layer: &str, map: &dyn File, data: &dyn File) -> Result<Domain> {
    let context = || format!("cannot tell the persistence domain of layer {layer}");
    let (of_map, of_data) = (
        map.domain().context(context)?,
        data.domain().context(context)?,
    );
    if of_map == of_data {
        return Ok(of_map);
    }
    let (file, kind, other) = match of_map {
        Domain::Dax => (data, "data", "map"),
        Domain::PageCache => (map, "map", "data"),
    };
    let hindrance = file.as_real().and_then(Hindrance::of);
    let why = hindrance.map_or("is not on DAX", Hindrance::reason);
    let what = format!("{layer}.{kind} {why}, but {layer}.{other} is on DAX");
    Err(Error::new(ErrorKind::MixedDomains, what))
}

/// The states that `map` gives the clusters of `run`, in order.
pub(crate) fn read_states(map: &dyn File, run: ClusterRange) -> std::io::Result<Vec<State>> {
    let first = map::word_of(Cluster(run.start));
    let last = run.end.div_ceil(map::CLUSTERS_PER_WORD).max(first);
    let mut raw = vec![0; units::len((last - first) * 8)];
    read_exact_at(map, &mut raw, map::word_offset(first))?;
    let words = raw.as_chunks::<8>().0;
    let word = |c: Cluster| {
        Word(u64::from_le_bytes(
            words[units::len(map::word_of(c) - first)],
        ))
    };
    Ok(run.iter().map(|c| word(c).get(map::slot_of(c))).collect())
}

/// Calls `visit` with the number and value of every word that is not zero. Skips holes.
pub(crate) fn scan_words(
    map: &dyn File,
    visit: &mut dyn FnMut(u64, Word) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut at = WORDS_OFFSET;
    let mut buf = vec![0; SCAN_BYTES];
    while let Some(data) = map.next_data(at)? {
        at = (data.start & !7).max(at);
        while at < data.end {
            let wanted = units::len(
                (data.end - at)
                    .next_multiple_of(8)
                    .min(units::bytes(SCAN_BYTES)),
            );
            let got = map.read_at(&mut buf[..wanted], at)?;
            for (i, raw) in buf[..got].as_chunks::<8>().0.iter().enumerate() {
                let word = Word(u64::from_le_bytes(*raw));
                if word != Word::default() {
                    visit((at - WORDS_OFFSET) / 8 + units::bytes(i), word)?;
                }
            }
            if got < wanted {
                return Ok(());
            }
            at += units::bytes(wanted);
        }
    }
    Ok(())
}
