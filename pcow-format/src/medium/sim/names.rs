// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The names in a simulated directory: those of now, those that are durable, and the changes between the two.

use std::collections::BTreeMap;

use super::state::Inode;

/// One change of names, whole or not at all. A rename sets one name and removes another.
#[derive(Debug, Clone)]
pub(super) struct NameChange(pub(super) Vec<(String, Option<Inode>)>);

impl NameChange {
    pub(super) fn only_removes(&self) -> bool {
        self.0.iter().all(|(_, inode)| inode.is_none())
    }

    fn touches(&self, name: &str) -> bool {
        self.0.iter().any(|(n, _)| n == name)
    }

    fn shares_a_name_with(&self, other: &NameChange) -> bool {
        self.0.iter().any(|(n, _)| other.touches(n))
    }

    fn apply(&self, names: &mut BTreeMap<String, Inode>) {
        for (name, inode) in &self.0 {
            match inode {
                Some(inode) => names.insert(name.clone(), *inode),
                None => names.remove(name),
            };
        }
    }
}

/// A directory.
#[derive(Debug, Clone, Default)]
pub(super) struct DirectoryNode {
    pub(super) parent: Inode,
    pub(super) now: BTreeMap<String, Inode>,
    durable: BTreeMap<String, Inode>,
    pub(super) pending: Vec<NameChange>,
}

impl DirectoryNode {
    pub(super) fn new(parent: Inode) -> Self {
        Self {
            parent,
            ..Self::default()
        }
    }

    pub(super) fn change(&mut self, change: NameChange) {
        change.apply(&mut self.now);
        self.pending.push(change);
    }

    pub(super) fn settle(&mut self) {
        self.durable.clone_from(&self.now);
        self.pending.clear();
    }

    /// Makes the present name of `inode` durable, with the changes that it rests on.
    pub(super) fn settle_name_of(&mut self, inode: Inode) {
        let sets = |c: &NameChange| c.0.iter().any(|(_, i)| *i == Some(inode));
        let Some(last) = self.pending.iter().rposition(sets) else {
            return;
        };
        let mut needed = vec![false; self.pending.len()];
        needed[last] = true;
        for i in (0..last).rev() {
            let above = (i + 1..=last).filter(|above| needed[*above]);
            needed[i] = above
                .into_iter()
                .any(|above| self.pending[above].shares_a_name_with(&self.pending[i]));
        }
        let pending = std::mem::take(&mut self.pending);
        for (change, needed) in pending.into_iter().zip(needed) {
            if needed {
                change.apply(&mut self.durable);
            } else {
                self.pending.push(change);
            }
        }
    }

    /// The names after a cut that the changes in `kept` survived, so far as those that they rest on did, too.
    pub(super) fn names_after_cut(&self, kept: impl Fn(usize) -> bool) -> BTreeMap<String, Inode> {
        let mut names = self.durable.clone();
        let mut lost: Vec<&NameChange> = Vec::new();
        for (i, change) in self.pending.iter().enumerate() {
            if kept(i) && !lost.iter().any(|l| l.shares_a_name_with(change)) {
                change.apply(&mut names);
            } else {
                lost.push(change);
            }
        }
        names
    }

    /// Everything that has a name here now or may have one after a cut.
    pub(super) fn possible(&self) -> impl Iterator<Item = Inode> {
        let pending = self.pending.iter().flat_map(|c| &c.0);
        let pending = pending.filter_map(|(_, inode)| *inode);
        self.now
            .values()
            .chain(self.durable.values())
            .copied()
            .chain(pending)
    }

    /// The same directory after a cut that left `names`.
    pub(super) fn settled(&self, names: BTreeMap<String, Inode>) -> Self {
        Self {
            parent: self.parent,
            now: names.clone(),
            durable: names,
            pending: Vec::new(),
        }
    }
}
