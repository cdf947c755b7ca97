// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A simulated filesystem that remembers what of it is durable, in either persistence domain.
//!
//! While it records, every call that changes something leaves a [`Moment`]: what the call was, and everything that a
//! crash right after it could leave. A moment can be turned into the filesystem after the death of the process
//! (nothing is lost) or after a power cut, where each [`Choice`] decides what survived. What it allows a power cut to do
//! are the media assumptions of `docs/image-format.md`; the comments here cite their numbers.
//!
//! Every act can be performed again on another state, so that the acts of a run can be replayed in another order
//! ([`replay`]). A hook ([`Sim::beside`]) does what another thread would do just then.
//!
//! It knows files and names, not layers or clusters. It has no locks. A fence covers the lines of its own file.

mod crash;
mod directory;
mod file;
mod names;
mod state;
mod versions;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Directory, Domain, Site};
use directory::SimDirectory;
use state::{Inode, State, TOP};

pub use crash::{Choice, Moment, replay};

/// One call through the seam that changes something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Act {
    /// Where it is in the source.
    pub site: Site,
    /// On what: the name of the file or directory.
    pub on: String,
}

/// A simulated filesystem. Clones are handles of the same one.
#[derive(Debug, Clone)]
pub struct Sim {
    inner: Arc<Mutex<Inner>>,
    settings: Arc<Settings>,
}

/// In which pieces a power cut takes back what was written to the page cache (M2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tearing {
    /// Whole pages.
    Pages,
    /// Sectors of 512 bytes.
    Sectors,
}

/// What stays the same across crashes.
#[derive(Debug, Clone)]
struct Settings {
    domain: Domain,
    tearing: Tearing,
    /// Calls that return without doing anything.
    skipped: BTreeSet<Site>,
}

/// What an act does, to any state.
type Step = Arc<dyn Fn(&mut Inner) -> io::Result<()> + Send + Sync>;

struct Inner {
    state: State,
    started: Vec<WriteBack>,
    recorded: Option<Vec<Moment>>,
    /// Files of which bytes were read or changed, while that is noted.
    touched: Option<BTreeSet<Inode>>,
    hooks: Vec<Hook>,
    /// Calls that are to fail, and how.
    failing: Vec<(Site, i32)>,
    /// Whether files can share storage.
    shares: bool,
}

/// What another thread does beside the next act at a site.
struct Hook {
    site: Site,
    when: When,
    run: Box<dyn FnOnce() + Send>,
}

/// On which side of an act something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Right before it.
    Before,
    /// Right after it.
    After,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("state", &self.state).finish()
    }
}

/// M14: what could not be written is taken for written from now on: a sync makes durable only what is written after this.
impl super::faulty::WriteBack for Sim {
    fn fail_of(&self, name: &str) {
        self.lock().state.mark_clean(name);
    }

    fn fail_of_all(&self) -> BTreeSet<String> {
        let mut inner = self.lock();
        let names = inner.state.names_of_unwritten();
        names.iter().for_each(|name| inner.state.mark_clean(name));
        names
    }
}

/// A cache line whose write-back was started and not fenced yet.
#[derive(Debug, Clone, Copy)]
struct WriteBack {
    inode: Inode,
    page: u64,
    line: usize,
    version: usize,
    epoch: u64,
}

impl Sim {
    /// An empty filesystem.
    pub fn new(domain: Domain) -> Self {
        let settings = Settings {
            domain,
            tearing: Tearing::Pages,
            skipped: BTreeSet::new(),
        };
        Self::with(State::new(), Arc::new(settings))
    }

    fn with(state: State, settings: Arc<Settings>) -> Self {
        let inner = Inner {
            state,
            started: Vec::new(),
            recorded: None,
            touched: None,
            hooks: Vec::new(),
            failing: Vec::new(),
            shares: false,
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
            settings,
        }
    }

    /// A copy on which the calls at `site` return without doing anything, and which grants `domain`.
    #[must_use]
    pub fn with_fault(&self, domain: Domain, site: Option<Site>) -> Self {
        let settings = Settings {
            domain,
            skipped: site.into_iter().collect(),
            ..*self.settings
        };
        Self::with(self.lock().state.clone(), Arc::new(settings))
    }

    /// A copy whose pages are torn like that.
    #[must_use]
    pub fn with_tearing(&self, tearing: Tearing) -> Self {
        let settings = Settings {
            tearing,
            ..(*self.settings).clone()
        };
        Self::with(self.lock().state.clone(), Arc::new(settings))
    }

    /// Has `run` done beside the next act at `site`, as by another thread.
    pub fn beside(&self, site: Site, when: When, run: impl FnOnce() + Send + 'static) {
        let run = Box::new(run);
        self.lock().hooks.push(Hook { site, when, run });
    }

    /// Makes the next call at `site` fail with the error number `code`; nothing of it is done. A sync that fails takes
    /// what it did not write for written (M14).
    pub fn fail(&self, site: Site, code: i32) {
        self.lock().failing.push((site, code));
    }

    /// From now on files can share storage, or cannot; at first they cannot.
    pub fn set_sharing(&self, shares: bool) {
        self.lock().shares = shares;
    }

    /// Forgets hooks and failures that were not reached; returns how many those were.
    pub fn forget_plans(&self) -> usize {
        let mut inner = self.lock();
        let plans = inner.hooks.len() + inner.failing.len();
        inner.hooks.clear();
        inner.failing.clear();
        plans
    }

    /// M14: memory grew short, and those pages that `chosen` says, of those that count as written and are not, were dropped
    /// and are read anew from the medium.
    pub fn evict(&self, chosen: impl FnMut() -> bool) {
        self.lock().state.evict(chosen);
    }

    /// The top directory.
    pub fn top(&self) -> Arc<dyn Directory> {
        Arc::new(SimDirectory::new(self.clone(), TOP, "/"))
    }

    /// Starts to record, and forgets what was recorded before.
    pub fn record(&self) {
        self.lock().recorded = Some(Vec::new());
    }

    /// How many moments were recorded.
    pub fn recorded(&self) -> usize {
        self.lock().recorded.as_ref().map_or(0, Vec::len)
    }

    /// Ends recording; returns a moment per call since it began.
    pub fn moments(&self) -> Vec<Moment> {
        self.lock().recorded.take().unwrap_or_default()
    }

    /// Notes from here on of which files bytes are read or changed. Where a file has holes, how long it is, and a sync are
    /// no bytes of it.
    pub fn watch(&self) {
        self.lock().touched = Some(BTreeSet::new());
    }

    /// Whether bytes of the file number `inode` were read or changed since [`Sim::watch`]; true if nobody watched.
    pub fn was_touched(&self, inode: u64) -> bool {
        let inner = self.lock();
        inner.touched.as_ref().is_none_or(|t| t.contains(&inode))
    }

    /// The present moment.
    pub fn now(&self) -> Moment {
        let act = Act {
            site: Site("now"),
            on: String::new(),
        };
        self.moment(&self.lock(), act, Arc::new(|_| Ok(())))
    }

    /// A digest of all names and contents as they are now.
    pub fn fingerprint(&self) -> u64 {
        self.lock().state.fingerprint(TOP)
    }

    /// The same of one entry of the top directory and what is below it, if there is such an entry.
    pub fn fingerprint_of(&self, name: &str) -> Option<u64> {
        let inner = self.lock();
        let inode = inner.state.directory(TOP).now.get(name)?;
        Some(inner.state.fingerprint(*inode))
    }

    /// The same of one entry of `directory`.
    pub fn fingerprint_at(&self, directory: &dyn Directory, name: &str) -> Option<u64> {
        let directory = directory.as_any().downcast_ref::<SimDirectory>()?;
        let inner = self.lock();
        let inode = directory.look_up(&inner, name).ok()?;
        Some(inner.state.fingerprint(inode))
    }

    fn moment(&self, inner: &Inner, act: Act, step: Step) -> Moment {
        let (state, started) = (inner.state.clone(), inner.started.clone());
        Moment::new(act, step, (state, started), Arc::clone(&self.settings))
    }

    /// Performs and records one act, unless its site is to be skipped.
    fn act(
        &self,
        site: Site,
        on: &str,
        step: impl Fn(&mut Inner) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<()> {
        if self.settings.skipped.contains(&site) {
            return Ok(());
        }
        self.lock().fail_if_due(site)?;
        self.run_hooks(site, When::Before);
        self.perform(site, on, step)?;
        self.run_hooks(site, When::After);
        Ok(())
    }

    /// Performs and records what cannot fail by plan: an act, or what a call does that has failed.
    fn perform(
        &self,
        site: Site,
        on: &str,
        step: impl Fn(&mut Inner) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<()> {
        let mut inner = self.lock();
        step(&mut inner)?;
        if inner.recorded.is_some() {
            let on = on.to_owned();
            let moment = self.moment(&inner, Act { site, on }, Arc::new(step));
            inner.recorded.get_or_insert_default().push(moment);
        }
        Ok(())
    }

    fn run_hooks(&self, site: Site, when: When) {
        let due = self.lock().due(site, when);
        // Without the lock: they make calls of their own.
        due.into_iter().for_each(|hook| (hook.run)());
    }

    /// The number that the next file or directory gets.
    fn next_inode(&self, site: Site) -> io::Result<Inode> {
        if self.settings.skipped.contains(&site) {
            return Err(io::Error::other(
                "a call that opens something cannot be skipped",
            ));
        }
        Ok(self.lock().state.next_inode())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A test that panicked inside a call has failed anyway.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// In a replay an act may come before the one that made its file.
    fn check_made(&self, inode: Inode) -> io::Result<()> {
        if self.state.has(inode) {
            return Ok(());
        }
        Err(os_error(libc::ENOENT))
    }

    fn touch(&mut self, inode: Inode) {
        if let Some(touched) = &mut self.touched {
            touched.insert(inode);
        }
    }

    fn fail_if_due(&mut self, site: Site) -> io::Result<()> {
        let due = self.failing.iter().position(|(s, _)| *s == site);
        due.map_or(Ok(()), |i| Err(os_error(self.failing.remove(i).1)))
    }

    /// Takes out the hooks of `site`.
    fn due(&mut self, site: Site, when: When) -> Vec<Hook> {
        if self.hooks.is_empty() {
            return Vec::new();
        }
        let hooks = std::mem::take(&mut self.hooks);
        let is_due = |h: &Hook| h.site == site && h.when == when;
        let (due, rest) = hooks.into_iter().partition(is_due);
        self.hooks = rest;
        due
    }
}

fn os_error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::medium::{Access, File};

    const SITE: Site = Site("test");

    fn create(sim: &Sim, name: &str) -> Arc<dyn File> {
        let file = sim.top().create(SITE, name).unwrap();
        file.set_len(SITE, 8192).unwrap();
        file.sync_data(SITE).unwrap();
        sim.top().sync(SITE).unwrap();
        file
    }

    /// What every possible power cut leaves, as told by `look`.
    fn after_all_cuts<T: Ord>(sim: &Sim, look: impl Fn(&Sim) -> T) -> BTreeSet<T> {
        let moment = sim.now();
        let choices = moment.choices();
        let mut all = vec![Vec::new()];
        for choice in &choices {
            let longer = |p: &Vec<usize>| {
                let p = p.clone();
                (0..choice.options()).map(move |o| [p.clone(), vec![o]].concat())
            };
            all = all.iter().flat_map(longer).collect();
        }
        let cut = |picks: &Vec<usize>| look(&moment.power_cut(&choices, picks));
        all.iter().map(cut).collect()
    }

    fn bytes_at(offsets: [u64; 2]) -> impl Fn(&Sim) -> [u8; 2] {
        move |sim| {
            let file = sim.top().open("f", Access::Read).unwrap();
            offsets.map(|offset| {
                let mut byte = [0xee];
                file.read_at(&mut byte, offset).unwrap();
                byte[0]
            })
        }
    }

    fn names(sim: &Sim) -> Vec<String> {
        let mut names = sim.top().names().unwrap();
        names.sort();
        names
    }

    #[test]
    fn a_page_keeps_any_version_since_its_sync_and_none_before() {
        let sim = Sim::new(Domain::PageCache);
        let file = create(&sim, "f");
        for byte in 1..=4 {
            file.write_at(SITE, &[byte], 0).unwrap();
            if byte == 2 {
                file.sync_data(SITE).unwrap();
            }
        }
        file.write_at(SITE, &[9], 4096).unwrap();
        let left = after_all_cuts(&sim, bytes_at([0, 4096]));
        let expected = [[2, 0], [2, 9], [3, 0], [3, 9], [4, 0], [4, 9]];
        assert_eq!(left, BTreeSet::from(expected));
    }

    #[test]
    fn what_a_failed_sync_did_not_write_is_gone_when_its_page_is_dropped() {
        let sim = Sim::new(Domain::PageCache);
        let file = create(&sim, "f");
        file.write_at(SITE, &[1], 0).unwrap();
        sim.fail(SITE, libc::EIO);
        file.sync_data(SITE).unwrap_err();
        file.write_at(SITE, &[2], 4096).unwrap();
        assert_eq!(bytes_at([0, 4096])(&sim), [1, 2]);
        sim.evict(|| true);
        assert_eq!(bytes_at([0, 4096])(&sim), [0, 2]);
    }

    #[test]
    fn a_fenced_line_is_as_it_was_at_its_write_back_or_newer() {
        let sim = Sim::new(Domain::Dax);
        let file = create(&sim, "f");
        file.store_word(SITE, 0, 1).unwrap();
        file.store_word(SITE, 64, 1).unwrap();
        file.write_back(SITE, 0).unwrap();
        file.store_word(SITE, 0, 2).unwrap();
        file.fence(SITE);
        let left = after_all_cuts(&sim, bytes_at([0, 64]));
        assert_eq!(left, BTreeSet::from([[1, 0], [1, 1], [2, 0], [2, 1]]));
    }

    #[test]
    fn words_of_one_line_are_torn_on_dax() {
        let sim = Sim::new(Domain::Dax);
        let file = create(&sim, "f");
        file.write_at(SITE, &[1; 16], 0).unwrap();
        let left = after_all_cuts(&sim, bytes_at([0, 8]));
        assert_eq!(left, BTreeSet::from([[0, 0], [0, 1], [1, 0], [1, 1]]));
    }

    #[test]
    fn a_rename_is_kept_whole_or_not_at_all_and_after_what_it_rests_on() {
        let sim = Sim::new(Domain::PageCache);
        sim.top().create(SITE, "a").unwrap();
        sim.top().rename(SITE, "a", "b").unwrap();
        sim.top().create(SITE, "c").unwrap();
        let left = after_all_cuts(&sim, |sim| names(sim).concat());
        let expected = ["", "a", "b", "c", "ac", "bc"].map(String::from);
        assert_eq!(left, BTreeSet::from(expected));
    }

    #[test]
    fn the_sync_of_a_renamed_directory_keeps_its_name_but_not_its_neighbours() {
        let sim = Sim::new(Domain::PageCache);
        let dir = sim.top().create_dir(SITE, "a").unwrap();
        sim.top().rename_dir(SITE, "a", "b").unwrap();
        sim.top().create(SITE, "c").unwrap();
        dir.sync(SITE).unwrap();
        let left = after_all_cuts(&sim, |sim| names(sim).concat());
        assert_eq!(left, BTreeSet::from(["b", "bc"].map(String::from)));
    }

    #[test]
    fn the_death_of_a_process_loses_nothing() {
        let sim = Sim::new(Domain::PageCache);
        let file = create(&sim, "f");
        file.write_at(SITE, &[1], 0).unwrap();
        sim.top().rename(SITE, "f", "g").unwrap();
        let after = sim.now().process_death();
        assert_eq!(names(&after), ["g"]);
        assert_eq!(after.fingerprint(), sim.fingerprint());
    }
}
