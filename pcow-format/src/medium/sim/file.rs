// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An open file of the simulation.

use std::io;
use std::ops::Range;

use super::state::{FileNode, Inode, LINE_BYTES, PAGE_BYTES, WORD_BYTES};
use super::{Inner, Sim, WriteBack, os_error};
use crate::medium::{Access, Domain, File, Identity, Lease, Site, Status};
use crate::units::{bytes, len};

#[derive(Debug)]
pub(super) struct SimFile {
    sim: Sim,
    inode: Inode,
    name: String,
    access: Access,
}

impl SimFile {
    pub(super) fn new(sim: Sim, inode: Inode, name: &str, access: Access) -> Self {
        Self {
            sim,
            inode,
            name: name.to_owned(),
            access,
        }
    }

    /// One act that changes the file; `EBADF` if it was opened for reading.
    fn change(
        &self,
        site: Site,
        change: impl Fn(&mut FileNode) + Send + Sync + 'static,
    ) -> io::Result<()> {
        if self.access == Access::Read {
            return Err(os_error(libc::EBADF));
        }
        let inode = self.inode;
        self.act(site, move |inner| {
            inner.touch(inode);
            change(inner.state.file_mut(inode));
        })
    }

    fn act(
        &self,
        site: Site,
        change: impl Fn(&mut Inner) + Send + Sync + 'static,
    ) -> io::Result<()> {
        let inode = self.inode;
        self.sim.act(site, &self.name, move |inner| {
            inner.check_made(inode)?;
            change(inner);
            Ok(())
        })
    }

    fn check_mapped_word(&self, offset: u64) -> io::Result<()> {
        let fits = offset + bytes(WORD_BYTES) <= self.status()?.len;
        if self.sim.settings.domain != Domain::Dax {
            return Err(os_error(libc::EOPNOTSUPP));
        }
        if !fits || !offset.is_multiple_of(bytes(WORD_BYTES)) {
            return Err(os_error(libc::EINVAL));
        }
        Ok(())
    }
}

impl File for SimFile {
    fn status(&self) -> io::Result<Status> {
        let inner = self.sim.lock();
        let file = inner.state.file(self.inode);
        Ok(Status {
            identity: Identity {
                device: 1,
                inode: self.inode,
                birth_ns: self.inode,
            },
            len: *file.len.now(),
            allocated: bytes(file.data_pages() * PAGE_BYTES),
            links: bytes(inner.state.links(self.inode)),
            mtime_ns: 0,
        })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut inner = self.sim.lock();
        inner.touch(self.inode);
        Ok(inner.state.file(self.inode).read(buf, offset))
    }

    fn write_at(&self, site: Site, buf: &[u8], offset: u64) -> io::Result<()> {
        let buf: Vec<u8> = buf.to_vec();
        self.change(site, move |file| file.write(&buf, offset))
    }

    fn write_durable_at(&self, site: Site, buf: &[u8], offset: u64) -> io::Result<()> {
        // Two acts: a cut may come while the bytes are on their way. M17: to storage of the file's own, if it was shared.
        self.write_at(site, buf, offset)?;
        let range = offset..offset + bytes(buf.len());
        self.change(site, move |file| {
            file.own(range.clone());
            file.settle_range(range.clone());
        })
    }

    fn set_len(&self, site: Site, len: u64) -> io::Result<()> {
        self.change(site, move |file| file.set_len(len))
    }

    fn reserve(&self, site: Site, range: Range<u64>) -> io::Result<()> {
        // M7: reserved storage is unwritten and reads zero like a hole, before and after a cut.
        let on_dax = self.sim.settings.domain == Domain::Dax;
        self.change(site, move |file| {
            if on_dax {
                file.copy_in_caches(range.clone());
            }
            file.own(range.clone());
        })
    }

    fn zero(&self, site: Site, range: Range<u64>) -> io::Result<()> {
        self.change(site, move |file| file.clear(range.clone()))
    }

    fn write_zeros_durable(&self, site: Site, range: Range<u64>) -> io::Result<()> {
        let zeros = vec![0; len(range.end - range.start)];
        self.write_durable_at(site, &zeros, range.start)
    }

    fn prefer_extents(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn has_own_storage(&self, range: Range<u64>) -> io::Result<bool> {
        Ok(self.sim.lock().state.file(self.inode).has_own(&range))
    }

    fn punch(&self, site: Site, range: Range<u64>) -> io::Result<()> {
        self.change(site, move |file| file.clear(range.clone()))
    }

    fn leave_room(&self, _: &Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn is_low_on_space(&self) -> io::Result<bool> {
        Ok(false)
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        Ok(self.sim.lock().state.file(self.inode).next_data(from))
    }

    fn sync_data(&self, site: Site) -> io::Result<()> {
        let inode = self.inode;
        let done = self.act(site, move |inner| inner.state.file_mut(inode).settle());
        done.inspect_err(|_| {
            // M14. It succeeds: the file was made, or the sync had not got so far.
            let _ = self.sim.perform(site, &self.name, move |inner| {
                inner.check_made(inode)?;
                inner.state.file_mut(inode).mark_clean();
                Ok(())
            });
        })
    }

    /// A file has no times here but that of its birth, which is its number.
    fn sync_all(&self, site: Site) -> io::Result<()> {
        self.sync_data(site)
    }

    fn domain(&self) -> io::Result<Domain> {
        Ok(self.sim.settings.domain)
    }

    fn store_word(&self, site: Site, offset: u64, word: u64) -> io::Result<()> {
        self.check_mapped_word(offset)?;
        let range = offset..offset + bytes(WORD_BYTES);
        self.change(site, move |file| {
            // A store to shared storage is a fault, in which the kernel copies the page.
            file.copy_in_caches(range.clone());
            file.own(range.clone());
            file.write(&word.to_le_bytes(), offset);
        })
    }

    fn write_back(&self, site: Site, offset: u64) -> io::Result<()> {
        self.check_mapped_word(offset)?;
        let page = offset / bytes(PAGE_BYTES);
        let line = len(offset % bytes(PAGE_BYTES)) / LINE_BYTES * LINE_BYTES;
        let inode = self.inode;
        self.act(site, move |inner| {
            let versions = inner.state.file_mut(inode).page(page);
            let (version, epoch) = (versions.count() - 1, versions.epoch);
            inner.started.push(WriteBack {
                inode,
                page,
                line,
                version,
                epoch,
            });
        })
    }

    fn fence(&self, site: Site) {
        // A fence has no error to report, and `act` fails only if the closure does.
        let inode = self.inode;
        let _ = self.act(site, move |inner| inner.fence(inode));
    }

    fn share_storage(&self, site: Site, source: &dyn File) -> io::Result<bool> {
        if !self.sim.lock().shares {
            return Ok(false);
        }
        let (from, to) = (source.status()?.identity.inode, self.inode);
        self.act(site, move |inner| {
            // M18: filesystems write the source back first; what they share of it is durable with the next sync of this file.
            inner.state.file_mut(from).settle();
            let shared = inner.state.file(from).clone();
            let file = inner.state.file_mut(to);
            file.take_over(&shared);
            file.share();
            inner.state.file_mut(from).share();
        })?;
        Ok(true)
    }

    /// The simulation has one process, whose writers are closed by whoever asks.
    fn take_lease(&self) -> io::Result<Lease> {
        Ok(Lease::Granted)
    }

    fn lease_holds(&self) -> io::Result<bool> {
        Ok(true)
    }

    fn end_lease(&self) {}

    fn as_real(&self) -> Option<&std::fs::File> {
        None
    }
}

impl Inner {
    /// M9: every line of the file whose write-back was started is durable as it was then, or newer. Those of other files
    /// are not: the guest writes its data back in one thread, the backend its words in another.
    fn fence(&mut self, inode: Inode) {
        let started = std::mem::take(&mut self.started);
        let (started, others) = started.into_iter().partition(|w| w.inode == inode);
        self.started = others;
        let started: Vec<WriteBack> = started;
        for w in &started {
            let file = self.state.file_mut(w.inode);
            // A sync since then made something newer durable.
            if file.page(w.page).epoch == w.epoch {
                file.settle_line(w.page, w.line, w.version);
            }
        }
        for w in started {
            self.state.file_mut(w.inode).page(w.page).merge();
        }
    }
}
