// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a crash can leave of a simulated filesystem: the choices that a power cut makes, and the result of making them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use super::names::{DirectoryNode, NameChange};
use super::state::{
    Content, FileNode, Inode, Node, PAGE_BYTES, SECTOR_BYTES, State, TOP, WORD_BYTES, content, raw,
};
use super::versions::Versions;
use super::{Act, Inner, Settings, Sim, Step, Tearing, WriteBack};
use crate::medium::Domain;

/// What a power cut decides by itself, independently of every other choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Undecided {
    /// M4: which length a file has.
    Length,
    /// M2: which version of a page was written back last.
    Page(u64),
    /// M2, M8: which version of a sector or of an aligned word (at this offset of a page) reached the medium.
    Part(u64, usize),
    /// M5: whether a change of names in a directory is kept, if those that it rests on are.
    Name(usize),
}

/// One thing that a power cut decides.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    inode: Inode,
    what: Undecided,
    options: usize,
    removal: bool,
}

impl Choice {
    /// Whether it decides if names that were removed are there again.
    pub fn is_removal(&self) -> bool {
        self.removal
    }

    /// How many outcomes there are: 0 is the oldest, the last one the newest.
    pub fn options(&self) -> usize {
        self.options
    }

    /// The page of a file of whose content this decides something.
    pub fn page(&self) -> Option<u64> {
        match self.what {
            Undecided::Page(page) | Undecided::Part(page, _) => Some(page),
            Undecided::Length | Undecided::Name(_) => None,
        }
    }
}

/// A filesystem right after an act.
#[derive(Clone)]
pub struct Moment {
    act: Act,
    step: Step,
    state: State,
    /// Lines on their way to the medium.
    started: Vec<WriteBack>,
    settings: Arc<Settings>,
}

impl fmt::Debug for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Moment").field("act", &self.act).finish()
    }
}

/// Performs the acts of `moments` again, in that order, from `start` on; a moment for each of them.
///
/// `None` if one of them cannot be done there: it needs what another one makes.
pub fn replay(start: &Moment, moments: &[Moment]) -> Option<Vec<Moment>> {
    let mut inner = Inner {
        state: start.state.clone(),
        started: start.started.clone(),
        recorded: None,
        touched: None,
        hooks: Vec::new(),
        failing: Vec::new(),
        shares: false,
    };
    let mut one = |m: &Moment| {
        (m.step)(&mut inner).ok()?;
        let mut after = m.clone();
        after.state = inner.state.clone();
        after.started.clone_from(&inner.started);
        Some(after)
    };
    moments.iter().map(&mut one).collect()
}

impl Moment {
    pub(super) fn new(
        act: Act,
        step: Step,
        (state, started): (State, Vec<WriteBack>),
        settings: Arc<Settings>,
    ) -> Self {
        Self {
            act,
            step,
            state,
            started,
            settings,
        }
    }

    /// The act that has just happened.
    pub fn act(&self) -> &Act {
        &self.act
    }

    /// The filesystem after the death of all processes: everything is as it was (M1).
    pub fn process_death(&self) -> Sim {
        Sim::with(self.state.clone(), Arc::clone(&self.settings))
    }

    /// Everything that a power cut now would decide.
    pub fn choices(&self) -> Vec<Choice> {
        let mut choices = Vec::new();
        for inode in self.state.reachable() {
            let choice = |what, options, removal| Choice {
                inode,
                what,
                options,
                removal,
            };
            match self.state.node(inode) {
                Node::File(file) => file_choices(file, self.settings.unit(), |what, options| {
                    choices.push(choice(what, options, false));
                }),
                Node::Directory(directory) => {
                    let pending = directory.pending.iter().enumerate();
                    let one = |(i, change): (usize, &NameChange)| {
                        choice(Undecided::Name(i), 2, change.only_removes())
                    };
                    choices.extend(pending.map(one));
                }
            }
        }
        choices
    }

    /// The filesystem after a power cut; `picks` has an outcome for each of [`Moment::choices`].
    pub fn power_cut(&self, choices: &[Choice], picks: &[usize]) -> Sim {
        let mut decided: BTreeMap<Inode, Decisions> = BTreeMap::new();
        for (choice, pick) in choices.iter().zip(picks) {
            let of_inode = decided.entry(choice.inode).or_default();
            of_inode.insert(choice.what, *pick);
        }
        let state = self.state.map_reachable(|inode, node| match node {
            Node::File(file) if file.is_settled() => None,
            Node::File(file) => {
                let decisions = decided.remove(&inode).unwrap_or_default();
                Some(Node::File(cut_file(file, &decisions, self.settings.unit())))
            }
            Node::Directory(directory) => {
                let decisions = decided.remove(&inode).unwrap_or_default();
                Some(Node::Directory(cut_directory(directory, &decisions)))
            }
        });
        Sim::with(state, Arc::clone(&self.settings))
    }

    /// The indices of those `choices` that decide the bytes of pages which the file number `inode` has in any case: they
    /// change no length, no name and no hole. All choices of a page are among them, or none.
    pub fn content_choices(&self, choices: &[Choice], inode: u64) -> Vec<usize> {
        let decides_bytes = |choice: &Choice| {
            let page = choice.page().filter(|_| choice.inode == inode)?;
            let versions = &self.state.file(inode).pages[&page];
            let mut all = (0..versions.count()).map(|number| versions.version(number));
            all.all(Option::is_some).then_some(())
        };
        let numbered = choices.iter().enumerate();
        numbered
            .filter_map(|(i, choice)| decides_bytes(choice).map(|()| i))
            .collect()
    }

    /// Makes `sim`, which came from a power cut at this moment, what it were if that had decided `picks` for the choices
    /// `which` (of [`Moment::content_choices`], in order), and nobody had read or changed those pages since.
    pub fn decide_again(&self, sim: &Sim, choices: &[Choice], picks: &[usize], which: &[usize]) {
        let mut inner = sim.lock();
        let unit = self.settings.unit().unwrap_or(PAGE_BYTES);
        for same in which.chunk_by(|a, b| choices[*a].page() == choices[*b].page()) {
            let first = choices[same[0]];
            let Some(page) = first.page() else { continue };
            let versions = &self.state.file(first.inode).pages[&page];
            let kept = match first.what {
                Undecided::Page(_) => versions.version(picks[same[0]]).clone(),
                _ => tear(
                    versions,
                    same.iter().map(|i| (choices[*i].what, picks[*i])),
                    unit,
                ),
            };
            let file = inner.state.file_mut(first.inode);
            file.pages.insert(page, Versions::new(kept));
        }
    }

    /// What `pick` means, for people.
    pub fn describe(&self, choice: &Choice, pick: usize) -> String {
        let name = self.path_of(choice.inode);
        let version = format!("version {pick} of 0 to {}", choice.options - 1);
        match choice.what {
            Undecided::Length => format!("{name}: length, {version}"),
            Undecided::Page(page) => format!("{name}: page {page}, {version}"),
            Undecided::Part(page, at) => format!("{name}: page {page} byte {at}, {version}"),
            Undecided::Name(i) => {
                let changes = &self.state.directory(choice.inode).pending[i].0;
                let kept = if pick == 0 { "lost" } else { "kept" };
                let one = |(name, inode): &(String, Option<Inode>)| match inode {
                    Some(_) => format!("+{name}"),
                    None => format!("-{name}"),
                };
                let changes: Vec<_> = changes.iter().map(one).collect();
                format!("{name}: {}, {kept}", changes.join(" "))
            }
        }
    }

    fn path_of(&self, wanted: Inode) -> String {
        let mut open = vec![(TOP, String::new())];
        while let Some((inode, path)) = open.pop() {
            if inode == wanted {
                return if path.is_empty() { "/".into() } else { path };
            }
            if let Node::Directory(directory) = self.state.node(inode) {
                let below = directory.now.iter();
                open.extend(below.map(|(name, i)| (*i, format!("{path}/{name}"))));
            }
        }
        format!("removed file {wanted}")
    }
}

type Decisions = BTreeMap<Undecided, usize>;

impl Settings {
    /// What is torn within a page; `None` if nothing is.
    fn unit(&self) -> Option<usize> {
        match (self.domain, self.tearing) {
            (Domain::Dax, _) => Some(WORD_BYTES),
            (Domain::PageCache, Tearing::Sectors) => Some(SECTOR_BYTES),
            (Domain::PageCache, Tearing::Pages) => None,
        }
    }
}

fn file_choices(file: &FileNode, unit: Option<usize>, mut add: impl FnMut(Undecided, usize)) {
    if !file.len.is_settled() {
        add(Undecided::Length, file.len.count());
    }
    for (page, versions) in file.pages.iter().filter(|(_, v)| !v.is_settled()) {
        let torn = unit.map_or_else(BTreeSet::new, |unit| differing_parts(versions, unit));
        if torn.is_empty() {
            add(Undecided::Page(*page), versions.count());
        }
        for at in torn {
            add(Undecided::Part(*page, at), versions.count());
        }
    }
}

/// Offsets of the parts of `unit` bytes in which the versions of a page differ.
fn differing_parts(versions: &Versions<Content>, unit: usize) -> BTreeSet<usize> {
    let mut differing = BTreeSet::new();
    for number in 1..versions.count() {
        let (before, after) = (versions.version(number - 1), versions.version(number));
        let parts = (0..PAGE_BYTES).step_by(unit);
        differing.extend(parts.filter(|at| part(before, *at, unit) != part(after, *at, unit)));
    }
    differing
}

fn part(page: &Content, at: usize, unit: usize) -> &[u8] {
    let zeros = &[0; SECTOR_BYTES][..unit];
    page.as_ref().map_or(zeros, |page| &page.raw[at..at + unit])
}

fn cut_file(file: &FileNode, decisions: &Decisions, unit: Option<usize>) -> FileNode {
    let pick = |what| decisions.get(&what).copied().unwrap_or(0);
    let len = *file.len.version(pick(Undecided::Length));
    let mut pages = BTreeMap::new();
    for (page, versions) in &file.pages {
        let torn = decisions.range(Undecided::Part(*page, 0)..Undecided::Part(*page + 1, 0));
        let torn = torn.map(|(what, pick)| (*what, *pick));
        let kept = match decisions.get(&Undecided::Page(*page)) {
            Some(pick) => versions.version(*pick).clone(),
            None => tear(versions, torn, unit.unwrap_or(PAGE_BYTES)),
        };
        if kept.is_some() {
            pages.insert(*page, Versions::new(kept));
        }
    }
    file.survivor(len, pages)
}

/// The durable version of a page, with those parts of other versions that survived.
fn tear(
    versions: &Versions<Content>,
    torn: impl Iterator<Item = (Undecided, usize)>,
    unit: usize,
) -> Content {
    let mut torn = torn.filter(|(_, pick)| *pick > 0).peekable();
    if torn.peek().is_none() {
        return versions.version(0).clone();
    }
    let mut page = raw(versions.version(0));
    for (what, pick) in torn {
        if let Undecided::Part(_, at) = what {
            let from = part(versions.version(pick), at, unit);
            page[at..at + unit].copy_from_slice(from);
        }
    }
    content(page)
}

fn cut_directory(directory: &DirectoryNode, decisions: &Decisions) -> DirectoryNode {
    let kept = |i| decisions.get(&Undecided::Name(i)) == Some(&1);
    directory.settled(directory.names_after_cut(kept))
}
