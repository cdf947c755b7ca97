// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An open directory of the simulation.

use std::any::Any;
use std::io;
use std::sync::Arc;

use super::file::SimFile;
use super::names::{DirectoryNode, NameChange};
use super::state::{Inode, Node};
use super::{Inner, Sim, os_error};
use crate::medium::real::RealDirectory;
use crate::medium::{Access, Directory, File, Site};

#[derive(Debug, Clone)]
pub(super) struct SimDirectory {
    sim: Sim,
    inode: Inode,
    name: String,
}

impl SimDirectory {
    pub(super) fn new(sim: Sim, inode: Inode, name: &str) -> Self {
        Self {
            sim,
            inode,
            name: name.to_owned(),
        }
    }

    pub(super) fn look_up(&self, inner: &Inner, name: &str) -> io::Result<Inode> {
        let found = self.node(inner).now.get(name);
        found.copied().ok_or_else(|| os_error(libc::ENOENT))
    }

    fn node<'a>(&self, inner: &'a Inner) -> &'a DirectoryNode {
        inner.state.directory(self.inode)
    }

    fn file(&self, inner: &Inner, name: &str) -> io::Result<Inode> {
        let inode = self.look_up(inner, name)?;
        match inner.state.node(inode) {
            Node::File(_) => Ok(inode),
            Node::Directory(_) => Err(os_error(libc::EISDIR)),
        }
    }

    fn directory(&self, inner: &Inner, name: &str) -> io::Result<Inode> {
        let inode = self.look_up(inner, name)?;
        match inner.state.node(inode) {
            Node::Directory(_) => Ok(inode),
            Node::File(_) => Err(os_error(libc::ENOTDIR)),
        }
    }

    fn absent(&self, inner: &Inner, name: &str) -> io::Result<()> {
        match self.look_up(inner, name) {
            Ok(_) => Err(os_error(libc::EEXIST)),
            Err(_) => Ok(()),
        }
    }

    fn change(&self, inner: &mut Inner, changes: &[(&str, Option<Inode>)]) {
        let owned = changes
            .iter()
            .map(|(name, inode)| ((*name).to_owned(), *inode));
        let change = NameChange(owned.collect());
        inner.state.directory_mut(self.inode).change(change);
    }

    /// Performs an act on the name `on`.
    fn act(
        &self,
        site: Site,
        on: &str,
        act: impl Fn(&Self, &mut Inner, &str) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<()> {
        let (this, name) = (self.clone(), on.to_owned());
        self.sim.act(site, on, move |inner| {
            inner.check_made(this.inode)?;
            act(&this, inner, &name)
        })
    }

    fn opened(&self, inode: Inode, name: &str) -> Arc<dyn Directory> {
        Arc::new(Self::new(self.sim.clone(), inode, name))
    }
}

impl Directory for SimDirectory {
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn File>> {
        let inode = self.file(&self.sim.lock(), name)?;
        Ok(Arc::new(SimFile::new(
            self.sim.clone(),
            inode,
            name,
            access,
        )))
    }

    fn create(&self, site: Site, name: &str) -> io::Result<Arc<dyn File>> {
        let inode = self.sim.next_inode(site)?;
        self.act(site, name, move |this, inner, name| {
            this.absent(inner, name)?;
            inner.state.add_file(inode);
            this.change(inner, &[(name, Some(inode))]);
            Ok(())
        })?;
        let file = SimFile::new(self.sim.clone(), inode, name, Access::Write);
        Ok(Arc::new(file))
    }

    fn rename(&self, site: Site, from: &str, to: &str) -> io::Result<()> {
        let from = from.to_owned();
        self.act(site, to, move |this, inner, to| {
            let inode = this.file(inner, &from)?;
            // rename(2): two names of one file stay as they are.
            if this.file(inner, to).ok() != Some(inode) {
                this.change(inner, &[(&from, None), (to, Some(inode))]);
            }
            Ok(())
        })
    }

    fn link(&self, site: Site, source: &dyn Directory, from: &str, to: &str) -> io::Result<()> {
        let source = source.as_any().downcast_ref::<SimDirectory>();
        let same = source.filter(|s| Arc::ptr_eq(&s.sim.inner, &self.sim.inner));
        let source = same.ok_or_else(|| os_error(libc::EXDEV))?.clone();
        let from = from.to_owned();
        self.act(site, to, move |this, inner, to| {
            let inode = source.file(inner, &from)?;
            this.absent(inner, to)?;
            this.change(inner, &[(to, Some(inode))]);
            Ok(())
        })
    }

    fn unlink(&self, site: Site, name: &str) -> io::Result<()> {
        self.act(site, name, |this, inner, name| {
            this.file(inner, name)?;
            this.change(inner, &[(name, None)]);
            Ok(())
        })
    }

    fn sync(&self, site: Site) -> io::Result<()> {
        self.act(site, &self.name, |this, inner, _| {
            inner.state.settle_directory(this.inode);
            Ok(())
        })
    }

    fn names(&self) -> io::Result<Vec<String>> {
        // No order is promised. The newest file first: layers have random names, and what is done must not depend on them,
        // so that it can be done again.
        let state = self.sim.lock();
        let mut names: Vec<_> = self.node(&state).now.iter().collect();
        names.sort_by_key(|(_, inode)| std::cmp::Reverse(**inode));
        Ok(names.into_iter().map(|(name, _)| name.clone()).collect())
    }

    fn open_dir(&self, name: &str) -> io::Result<Arc<dyn Directory>> {
        let inode = self.directory(&self.sim.lock(), name)?;
        Ok(self.opened(inode, name))
    }

    fn create_dir(&self, site: Site, name: &str) -> io::Result<Arc<dyn Directory>> {
        let inode = self.sim.next_inode(site)?;
        self.act(site, name, move |this, inner, name| {
            this.absent(inner, name)?;
            inner.state.add_directory(inode, this.inode);
            this.change(inner, &[(name, Some(inode))]);
            Ok(())
        })?;
        Ok(self.opened(inode, name))
    }

    fn rename_dir(&self, site: Site, from: &str, to: &str) -> io::Result<()> {
        let from = from.to_owned();
        self.act(site, to, move |this, inner, to| {
            let inode = this.directory(inner, &from)?;
            this.absent(inner, to)?;
            this.change(inner, &[(&from, None), (to, Some(inode))]);
            Ok(())
        })
    }

    fn remove_dir(&self, site: Site, name: &str) -> io::Result<()> {
        self.act(site, name, |this, inner, name| {
            let inode = this.directory(inner, name)?;
            if !inner.state.directory(inode).now.is_empty() {
                return Err(os_error(libc::ENOTEMPTY));
            }
            this.change(inner, &[(name, None)]);
            Ok(())
        })
    }

    fn as_real(&self) -> Option<&RealDirectory> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
