// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a simulated filesystem holds: for every changeable thing the durable value and those it had since. Knows no call
//! of the seam. Cloning is cheap: files are shared until they change.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::names::DirectoryNode;
use super::versions::Versions;
use crate::units::{bytes, len};

/// Unit in which the page cache is written back.
pub(super) const PAGE_BYTES: usize = 4096;
/// Unit in which a cache line may be torn: one aligned store.
pub(super) const WORD_BYTES: usize = 8;
/// Unit of a cache-line write-back.
pub(super) const LINE_BYTES: usize = 64;
/// Unit in which a disk may tear a page.
pub(super) const SECTOR_BYTES: usize = 512;

/// What storage holds that somebody else has left.
const LEFT_BYTE: u8 = 0xee;
/// Stands in a digest for a page whose storage is shared.
const SHARED: u64 = 0x5a;

/// Number of a file or directory.
pub(super) type Inode = u64;

/// The directory that all others are in.
pub(super) const TOP: Inode = 1;

/// The bytes of one page, with a digest that is made when it is asked for.
#[derive(Debug)]
pub(super) struct Page {
    digest: OnceLock<u64>,
    pub(super) raw: [u8; PAGE_BYTES],
}

impl PartialEq for Page {
    fn eq(&self, other: &Self) -> bool {
        self.raw == other.raw
    }
}

impl Page {
    fn digest(&self) -> u64 {
        let words = self.raw.as_chunks().0;
        let sum = |sum, word: &[u8; WORD_BYTES]| mix(sum, u64::from_le_bytes(*word));
        *self.digest.get_or_init(|| words.iter().fold(1, sum))
    }
}

/// A page of a file; `None` is a hole or unwritten storage, which reads zero.
pub(super) type Content = Option<Arc<Page>>;

pub(super) fn content(raw: [u8; PAGE_BYTES]) -> Content {
    let digest = OnceLock::new();
    Some(Arc::new(Page { digest, raw }))
}

pub(super) fn raw(content: &Content) -> [u8; PAGE_BYTES] {
    content.as_ref().map_or([0; PAGE_BYTES], |page| page.raw)
}

/// One step of a digest that only has to tell states of one run apart.
pub(super) fn mix(sum: u64, value: u64) -> u64 {
    (sum ^ value)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(29)
}

/// A regular file.
#[derive(Debug, Clone)]
pub(super) struct FileNode {
    pub(super) len: Versions<u64>,
    pub(super) pages: BTreeMap<u64, Versions<Content>>,
    /// Pages whose storage another file has, too.
    shared: BTreeSet<u64>,
    /// Of length and pages as they are now, once it was asked for.
    digest: OnceLock<u64>,
}

impl FileNode {
    pub(super) fn new(len: u64, pages: BTreeMap<u64, Versions<Content>>) -> Self {
        Self {
            len: Versions::new(len),
            pages,
            shared: BTreeSet::new(),
            digest: OnceLock::new(),
        }
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let end = (*self.len.now()).min(offset + bytes(buf.len()));
        let mut done = 0;
        for (page, part) in pages_of(offset..end.max(offset)) {
            let target = &mut buf[done..done + part.len()];
            match self.pages.get(&page).map(Versions::now) {
                Some(Some(stored)) => target.copy_from_slice(&stored.raw[part.clone()]),
                _ => target.fill(0),
            }
            done += part.len();
        }
        done
    }

    pub(super) fn write(&mut self, buf: &[u8], offset: u64) {
        let range = offset..offset + bytes(buf.len());
        let mut rest = buf;
        for (page, part) in pages_of(range.clone()) {
            let (now, later) = rest.split_at(part.len());
            self.edit(page, |raw| raw[part].copy_from_slice(now));
            rest = later;
        }
        if range.end > *self.len.now() {
            self.len.set(range.end);
        }
    }

    pub(super) fn set_len(&mut self, new: u64) {
        let old = *self.len.now();
        if new < old {
            self.clear(new..old);
        }
        self.len.set(new);
    }

    /// Makes the range read zero, and whole pages of it holes.
    pub(super) fn clear(&mut self, range: Range<u64>) {
        for (page, part) in pages_of(range) {
            if !self.pages.contains_key(&page) {
                continue;
            }
            if part.len() == PAGE_BYTES {
                self.shared.remove(&page);
                self.page(page).set(None);
            } else {
                self.edit(page, |raw| raw[part].fill(0));
            }
        }
    }

    /// Shows what `other` does from now on.
    pub(super) fn take_over(&mut self, other: &Self) {
        self.clear(0..*self.len.now());
        for (page, versions) in &other.pages {
            self.page(*page).set(versions.now().clone());
        }
        self.len.set(*other.len.now());
    }

    /// The first run of pages at or after `from` that hold something.
    pub(super) fn next_data(&self, from: u64) -> Option<Range<u64>> {
        let page_bytes = bytes(PAGE_BYTES);
        let len = *self.len.now();
        let held = |(page, v): (&u64, &Versions<Content>)| v.now().is_some().then_some(*page);
        let mut pages = self
            .pages
            .range(from / page_bytes..)
            .filter_map(held)
            .take_while(|page| page * page_bytes < len);
        let first = pages.next()?;
        let mut end = first + 1;
        while pages.next() == Some(end) {
            end += 1;
        }
        let start = (first * page_bytes).max(from);
        let end = (end * page_bytes).min(len);
        (start < end).then_some(start..end)
    }

    pub(super) fn data_pages(&self) -> usize {
        self.pages.values().filter(|v| v.now().is_some()).count()
    }

    pub(super) fn settle(&mut self) {
        self.len.settle();
        self.pages.values_mut().for_each(Versions::settle);
    }

    /// The storage of all that the file holds is another file's as well from now on.
    pub(super) fn share(&mut self) {
        let held = self.pages.iter().filter(|(_, v)| v.now().is_some());
        self.shared = held.map(|(page, _)| *page).collect();
    }

    /// Whether all of `range` holds something, in storage that is this file's alone.
    pub(super) fn has_own(&self, range: &Range<u64>) -> bool {
        let data = self.next_data(range.start);
        let held = data.is_some_and(|d| d.start <= range.start && d.end >= range.end);
        held && !pages_of(range.clone()).any(|(page, _)| self.shared.contains(&page))
    }

    /// M17: what `range` shares is copied over what somebody left in other storage, and the copy is in the CPU's caches.
    pub(super) fn copy_in_caches(&mut self, range: Range<u64>) {
        for (page, _) in pages_of(range) {
            if self.shared.contains(&page) {
                self.page(page).copy_over(content([LEFT_BYTE; PAGE_BYTES]));
            }
        }
    }

    /// The storage of `range` is this file's alone from now on.
    pub(super) fn own(&mut self, range: Range<u64>) {
        for (page, _) in pages_of(range) {
            self.shared.remove(&page);
        }
    }

    /// Another file after a crash, whose storage is shared as this one's.
    pub(super) fn survivor(&self, len: u64, pages: BTreeMap<u64, Versions<Content>>) -> Self {
        let mut after = Self::new(len, pages);
        after.shared.clone_from(&self.shared);
        after
    }

    /// Makes the pages of `range` durable, with the length that is needed to read them.
    pub(super) fn settle_range(&mut self, range: Range<u64>) {
        for (page, _) in pages_of(range) {
            self.page(page).settle();
        }
        self.len.settle();
    }

    /// M14: what the file holds counts as written. That a page is a hole is metadata, which no filesystem forgets.
    pub(super) fn mark_clean(&mut self) {
        let held = self.pages.values_mut().filter(|v| v.now().is_some());
        held.for_each(Versions::mark_clean);
    }

    /// Whether pages of it would have to be written back.
    fn is_unwritten(&self) -> bool {
        let mut pages = self.pages.values();
        pages.any(|v| v.now().is_some() && !v.clean && !v.is_settled())
    }

    /// M14: each page that `chosen` says, of those that count as written and are not, is read anew from the medium.
    fn evict(&mut self, chosen: &mut impl FnMut() -> bool) {
        let lost = self.pages.values_mut().filter(|v| v.clean);
        lost.for_each(|v| {
            if chosen() {
                v.evict();
            }
        });
    }

    pub(super) fn is_settled(&self) -> bool {
        self.len.is_settled() && self.pages.values().all(Versions::is_settled)
    }

    /// Makes one cache line durable as it was in version `version` of its page.
    pub(super) fn settle_line(&mut self, page: u64, line: usize, version: usize) {
        let part = line..line + LINE_BYTES;
        let versions = self.page(page);
        let value: [u8; PAGE_BYTES] = raw(versions.version(version));
        versions.change_up_to(version, |old| {
            let mut new = raw(old);
            new[part.clone()].copy_from_slice(&value[part.clone()]);
            *old = content(new);
        });
    }

    pub(super) fn page(&mut self, page: u64) -> &mut Versions<Content> {
        self.pages
            .entry(page)
            .or_insert_with(|| Versions::new(None))
    }

    fn edit(&mut self, page: u64, change: impl FnOnce(&mut [u8; PAGE_BYTES])) {
        let versions = self.page(page);
        let mut new = raw(versions.now());
        change(&mut new);
        versions.set(content(new));
    }

    fn digest(&self) -> u64 {
        let held = |(page, v): (&u64, &Versions<Content>)| {
            let digest = v.now().as_ref()?.digest();
            Some(mix(*page, digest))
        };
        let pages = self.pages.iter().filter_map(held);
        let shared = self.shared.iter().map(|page| mix(*page, SHARED));
        *self
            .digest
            .get_or_init(|| pages.chain(shared).fold(*self.len.now(), mix))
    }
}

/// A file or a directory.
#[derive(Debug, Clone)]
pub(super) enum Node {
    File(FileNode),
    Directory(DirectoryNode),
}

/// A whole filesystem.
#[derive(Debug, Clone)]
pub(super) struct State {
    nodes: BTreeMap<Inode, Arc<Node>>,
    next: Inode,
}

impl State {
    pub(super) fn new() -> Self {
        let mut state = Self {
            nodes: BTreeMap::new(),
            next: TOP,
        };
        state.add_directory(TOP, TOP);
        state
    }

    pub(super) fn next_inode(&self) -> Inode {
        self.next
    }

    pub(super) fn add_file(&mut self, inode: Inode) {
        self.add(inode, Node::File(FileNode::new(0, BTreeMap::new())));
    }

    pub(super) fn add_directory(&mut self, inode: Inode, parent: Inode) {
        self.add(inode, Node::Directory(DirectoryNode::new(parent)));
    }

    fn add(&mut self, inode: Inode, node: Node) {
        self.next = self.next.max(inode + 1);
        self.nodes.insert(inode, Arc::new(node));
    }

    /// Whether there is such a file or directory, named or not.
    pub(super) fn has(&self, inode: Inode) -> bool {
        self.nodes.contains_key(&inode)
    }

    /// Names of files that would have to be written back.
    pub(super) fn names_of_unwritten(&self) -> BTreeSet<String> {
        let is_unwritten = |inode: &Inode| match self.node(*inode) {
            Node::File(file) => file.is_unwritten(),
            Node::Directory(_) => false,
        };
        let directories = self.nodes.values().filter_map(|n| match n.as_ref() {
            Node::Directory(d) => Some(&d.now),
            Node::File(_) => None,
        });
        let names = directories.flatten().filter(|(_, i)| is_unwritten(i));
        names.map(|(name, _)| name.clone()).collect()
    }

    /// Takes what the files called `name` hold for written, in whatever directories they are.
    pub(super) fn mark_clean(&mut self, name: &str) {
        let directories = self.nodes.values().filter_map(|n| match n.as_ref() {
            Node::Directory(d) => d.now.get(name).copied(),
            Node::File(_) => None,
        });
        for inode in directories.collect::<BTreeSet<_>>() {
            if let Node::File(file) = self.node_mut(inode) {
                file.mark_clean();
            }
        }
    }

    /// Reads pages of all files anew: see [`FileNode::evict`].
    pub(super) fn evict(&mut self, mut chosen: impl FnMut() -> bool) {
        let inodes: Vec<_> = self.nodes.keys().copied().collect();
        for inode in inodes {
            if let Node::File(file) = self.node_mut(inode) {
                file.digest = OnceLock::new();
                file.evict(&mut chosen);
            }
        }
    }

    pub(super) fn node(&self, inode: Inode) -> &Node {
        &self.nodes[&inode]
    }

    pub(super) fn file(&self, inode: Inode) -> &FileNode {
        match self.node(inode) {
            Node::File(file) => file,
            Node::Directory(_) => unreachable!("inode {inode} was made as a file"),
        }
    }

    pub(super) fn file_mut(&mut self, inode: Inode) -> &mut FileNode {
        match self.node_mut(inode) {
            Node::File(file) => {
                file.digest = OnceLock::new();
                file
            }
            Node::Directory(_) => unreachable!("inode {inode} was made as a file"),
        }
    }

    pub(super) fn directory(&self, inode: Inode) -> &DirectoryNode {
        match self.node(inode) {
            Node::Directory(directory) => directory,
            Node::File(_) => unreachable!("inode {inode} was made as a directory"),
        }
    }

    pub(super) fn directory_mut(&mut self, inode: Inode) -> &mut DirectoryNode {
        match self.node_mut(inode) {
            Node::Directory(directory) => directory,
            Node::File(_) => unreachable!("inode {inode} was made as a directory"),
        }
    }

    fn node_mut(&mut self, inode: Inode) -> &mut Node {
        let node = self.nodes.get_mut(&inode);
        Arc::make_mut(node.expect("handles name inodes that exist"))
    }

    /// Makes a directory's entries durable, and its own present name.
    pub(super) fn settle_directory(&mut self, inode: Inode) {
        let directory = self.directory_mut(inode);
        directory.settle();
        let parent = directory.parent;
        if parent != inode {
            self.directory_mut(parent).settle_name_of(inode);
        }
    }

    /// How many names the file has.
    pub(super) fn links(&self, inode: Inode) -> usize {
        let directories = self.nodes.values().filter_map(|n| match n.as_ref() {
            Node::Directory(d) => Some(d),
            Node::File(_) => None,
        });
        let names = directories.flat_map(|d| d.now.values());
        names.filter(|i| **i == inode).count()
    }

    /// The files and directories that have a name now or may have one after a cut, in the order of their numbers.
    pub(super) fn reachable(&self) -> BTreeSet<Inode> {
        let mut found = BTreeSet::from([TOP]);
        let mut open = vec![TOP];
        while let Some(inode) = open.pop() {
            if let Node::Directory(directory) = self.node(inode) {
                open.extend(directory.possible().filter(|i| found.insert(*i)));
            }
        }
        found
    }

    /// The state with the nodes that `cut` returns; nodes for which it has none stay as they are.
    pub(super) fn map_reachable(&self, mut cut: impl FnMut(Inode, &Node) -> Option<Node>) -> State {
        let mut nodes = BTreeMap::new();
        for inode in self.reachable() {
            let new = match cut(inode, self.node(inode)) {
                Some(node) => Arc::new(node),
                None => Arc::clone(&self.nodes[&inode]),
            };
            nodes.insert(inode, new);
        }
        State {
            nodes,
            next: self.next,
        }
    }

    /// A digest of all names and contents below `start` as they are now.
    pub(super) fn fingerprint(&self, start: Inode) -> u64 {
        let mut open = vec![start];
        let mut sum = 0;
        while let Some(inode) = open.pop() {
            match self.node(inode) {
                Node::File(file) => sum = mix(sum, file.digest()),
                Node::Directory(directory) => {
                    for (name, inode) in &directory.now {
                        sum = name.bytes().fold(mix(sum, *inode), |s, b| mix(s, b.into()));
                        open.push(*inode);
                    }
                }
            }
        }
        sum
    }
}

/// The pages that `range` touches, with the part of each.
pub(super) fn pages_of(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let page_bytes = bytes(PAGE_BYTES);
    let pages = range.start / page_bytes..range.end.div_ceil(page_bytes);
    pages.map(move |page| {
        let base = page * page_bytes;
        let part = range.start.max(base) - base..range.end.min(base + page_bytes) - base;
        (page, len(part.start)..len(part.end))
    })
}
