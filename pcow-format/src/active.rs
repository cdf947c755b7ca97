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

mod flush;
mod opening;
mod space;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

pub use opening::Recovery;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer_files;
use crate::map::{self, State, WORDS_OFFSET, Word};
use crate::medium::{Domain, File, Hindrance, Site, read_exact_at};
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
    /// A frontend of an earlier backend has clusters mapped, nobody here knows which, and its guest stores to them.
    is_mapped: bool,
    closed_for_writing: bool,
    domain: Domain,
    /// Guards every read-modify-write of a word; holds the numbers of words that may have live clusters.
    live: Mutex<BTreeSet<u64>>,
    ready: Mutex<Ready>,
    /// Held for the length of a flush; set for ever by the first that fails (I7).
    flush_failed: Mutex<Option<String>>,
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
            is_mapped: false,
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

    /// A frontend of an earlier backend goes on with the image.
    pub(crate) fn note_mapped(&mut self) {
        self.is_mapped = true;
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
    /// `NoSpace` or `Io`, or `FlushFailed` if the sync failed; the clusters still say zero then.
    pub fn allocate_over_zero(&self, run: ClusterRange) -> Result<()> {
        let range = self.cluster.byte_range(run);
        match self.domain {
            Domain::PageCache => self.data.zero(Site("active.over_zero.zero"), range),
            Domain::Dax => self.prepare_on_dax(range),
        }
        .context(|| format!("cannot reserve space in layer {}", self.name))?;
        if self.domain == Domain::PageCache {
            // Not under the lock of the flushes: a fault would wait for one.
            let synced = self.data.sync_data(Site("active.over_zero.sync"));
            if let Err(e) = synced.context(|| "cannot sync the data file".to_owned()) {
                self.distrust();
                return Err(self.fail_flushes(&e));
            }
        }
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
    /// restored sparse or share blocks with a copy are given storage of their own. Cheap after the first time. Nobody else
    /// does so for the same clusters meanwhile (F1).
    ///
    /// # Errors
    /// `NoSpace` or `Io`.
    pub fn ensure_storage(&self, run: ClusterRange) -> Result<()> {
        if self.ready().all(run) {
            return Ok(());
        }
        let range = self.cluster.byte_range(run);
        match self.domain {
            Domain::PageCache => self.data.reserve(Site("active.ensure.reserve"), range),
            Domain::Dax => self.ensure_on_dax(run, range),
        }
        .context(|| format!("cannot reserve space in layer {}", self.name))?;
        self.ready().set(run, true);
        Ok(())
    }

    /// On DAX a reservation, even one that finds everything there, leaves the inode to the journal, and the next fault
    /// of the guest waits for that. So it is for filesystems that do not tell, and for clusters that a guest may be storing to.
    fn ensure_on_dax(&self, run: ClusterRange, range: Range<u64>) -> std::io::Result<()> {
        if self.data.has_own_storage(range).unwrap_or(false) {
            return Ok(());
        }
        let missing = |c: &Cluster| !self.ready().all(c.only());
        for cluster in run.iter().filter(missing) {
            let range = self.cluster.byte_range(cluster.only());
            match self.data.has_own_storage(range.clone()) {
                Ok(true) => {}
                Ok(false) if !self.is_mapped => self.write_over(range)?,
                _ => self.data.reserve(Site("active.ensure.reserve"), range)?,
            }
        }
        Ok(())
    }

    /// M17: writes to a cluster what it holds. Until that is durable in storage of its own, the old one counts. Nobody has it
    /// mapped yet: a store in between would be written over.
    fn write_over(&self, range: Range<u64>) -> std::io::Result<()> {
        self.data.leave_room(&range)?;
        let mut content = vec![0; units::len(range.end - range.start)];
        read_exact_at(self.data.as_ref(), &mut content, range.start)?;
        let site = Site("active.ensure.write_durable");
        self.data.write_durable_at(site, &content, range.start)
    }

    /// Whether [`Active::ensure_storage`] has nothing left to do for `run`.
    pub fn has_storage(&self, run: ClusterRange) -> bool {
        self.ready().all(run)
    }

    /// The map file.
    pub(crate) fn map_file(&self) -> &dyn File {
        self.map.as_ref()
    }

    fn mark_data(&self, run: ClusterRange) -> Result<()> {
        self.ready().used(run);
        match self.domain {
            Domain::PageCache => self.set_words(run, State::Live),
            Domain::Dax => self.set_words(run, State::Data),
        }
    }

    fn set_words(&self, run: ClusterRange, state: State) -> Result<()> {
        let written = self.write_words(run, state);
        if self.domain == Domain::Dax {
            // One fence for all words: none of them is relied on before this returns (I2). After an error, too: who tries
            // again sees data in those that were written, and relies on it.
            self.map.fence(Site("active.word.fence"));
        }
        written
    }

    fn write_words(&self, run: ClusterRange, state: State) -> Result<()> {
        let mut words = map::words_of(run).peekable();
        while let Some(&(first, _)) = words.peek() {
            let line = map::line_of(first);
            let mut of_line =
                std::iter::from_fn(|| words.next_if(|(n, _)| map::line_of(*n) == line));
            let stored =
                of_line.try_for_each(|(number, slots)| self.set_slots(number, slots, state));
            // Once for all words of a line, and after an error, too: some may have been stored.
            self.write_word_back(first).and(stored)?;
        }
        Ok(())
    }

    fn set_slots(&self, number: u64, slots: Range<u64>, state: State) -> Result<()> {
        let mut live = self.live();
        let word = self.read_word(number)?;
        let word = slots.fold(word, |word, slot| word.with(slot, state));
        if word.has_live() {
            live.insert(number);
        }
        self.store_word(Site("active.word"), number, word)
    }

    /// Where a word is in the domain of processes. On DAX [`Active::write_word_back`] and a fence make it durable.
    fn store_word(&self, site: Site, number: u64, word: Word) -> Result<()> {
        let offset = map::word_offset(number);
        match self.domain {
            Domain::PageCache => self.map.write_at(site, &word.0.to_le_bytes(), offset),
            Domain::Dax => self.map.store_word(site, offset, word.0),
        }
        .context(|| format!("cannot write the map of layer {}", self.name))
    }

    /// Starts to write the line of a word back, on DAX.
    fn write_word_back(&self, number: u64) -> Result<()> {
        if self.domain == Domain::PageCache {
            return Ok(());
        }
        self.map
            .write_back(Site("active.word.write_back"), map::word_offset(number))
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
