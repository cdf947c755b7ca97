// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A medium whose calls fail as planned, around any other medium.
//!
//! Every call is counted, those that only look included. A plan names one of them by its number, and says how it fails
//! and whether all later ones of its kind do, too. It knows no format.

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::real::RealDirectory;
use super::{Access, Directory, Domain, File, Lease, Site, Status};

/// One call through the seam.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    /// What is called.
    pub method: &'static str,
    /// Where, for calls that change something.
    pub site: Option<Site>,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.site {
            Some(site) => write!(f, "{} at {}", self.method, site.0),
            None => f.write_str(self.method),
        }
    }
}

/// In which way a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// With this error number, having done nothing.
    Error(i32),
    /// It reads, or writes, half of what it should; a write then has no space.
    Short,
    /// It is carried out. But right before it the system wrote back what was not synced, and could not: the next sync of each
    /// of those files says so, whatever it does itself.
    WriteBack,
}

/// What write-back that fails does to a medium (M14).
pub trait WriteBack: Send {
    /// A sync of the files called `name` fails.
    fn fail_of(&self, name: &str);

    /// Nothing can be written back of what no sync has written. Returns the names of the files.
    fn fail_of_all(&self) -> BTreeSet<String>;
}

/// Which call fails, and how.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Number of the call, from 0.
    pub number: usize,
    /// How it fails.
    pub failure: Failure,
    /// Whether all later calls of the same method at the same site do so, too.
    pub lasting: bool,
}

#[derive(Default)]
struct Inner {
    calls: Vec<Call>,
    plan: Option<Plan>,
    /// The call that lasting failures are like.
    failed: Option<Call>,
    fired: bool,
    write_back: Option<Box<dyn WriteBack>>,
    /// Files whose write-back has failed, and no sync has said so.
    unreported: BTreeSet<String>,
}

/// What goes wrong on a medium. Clones are handles of the same.
#[derive(Clone, Default)]
pub struct Faults(Arc<Mutex<Inner>>);

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").finish_non_exhaustive()
    }
}

impl Faults {
    /// Counts from 0 again and follows `plan` from now on.
    pub fn begin(&self, plan: Option<Plan>) {
        let mut inner = self.lock();
        inner.calls.clear();
        inner.plan = plan;
        inner.failed = None;
        inner.fired = false;
    }

    /// Lets everything succeed; returns the calls since the beginning, and whether one failed.
    pub fn end(&self) -> (Vec<Call>, bool) {
        let mut inner = self.lock();
        inner.plan = None;
        inner.failed = None;
        (std::mem::take(&mut inner.calls), inner.fired)
    }

    /// Whose write-back fails with a sync, or by itself.
    pub fn write_back_of(&self, medium: impl WriteBack + 'static) {
        self.lock().write_back = Some(Box::new(medium));
    }

    /// Files whose write-back has failed, and no sync has said so.
    pub fn unreported(&self) -> BTreeSet<String> {
        self.lock().unreported.clone()
    }

    /// `directory`, with these faults.
    pub fn around(&self, directory: Arc<dyn Directory>) -> Arc<dyn Directory> {
        Arc::new(FaultyDirectory {
            inner: directory,
            faults: self.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call; tells how it is to fail.
    fn next(&self, method: &'static str, site: Option<Site>) -> Option<Failure> {
        let mut inner = self.lock();
        let call = Call { method, site };
        let number = inner.calls.len();
        inner.calls.push(call.clone());
        let plan = inner.plan?;
        if plan.failure == Failure::WriteBack {
            if plan.number == number {
                let failed = inner.write_back.as_ref().map(|medium| medium.fail_of_all());
                inner.unreported = failed.unwrap_or_default();
            }
            return None;
        }
        if plan.number == number {
            inner.failed = Some(call);
        } else if !plan.lasting || inner.failed.as_ref() != Some(&call) {
            return None;
        }
        inner.fired = true;
        Some(plan.failure)
    }

    /// For calls that are done or not.
    fn check(&self, method: &'static str, site: Option<Site>) -> io::Result<()> {
        match self.next(method, site) {
            None => Ok(()),
            Some(failure) => Err(failure.error()),
        }
    }
}

impl Failure {
    fn error(self) -> io::Error {
        io::Error::from_raw_os_error(match self {
            Self::Error(code) => code,
            Self::Short => libc::ENOSPC,
            Self::WriteBack => libc::EIO,
        })
    }
}

#[derive(Debug)]
struct FaultyDirectory {
    inner: Arc<dyn Directory>,
    faults: Faults,
}

impl FaultyDirectory {
    fn file(&self, name: &str, file: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(FaultyFile {
            inner: file,
            name: name.to_owned(),
            faults: self.faults.clone(),
        })
    }
}

impl Directory for FaultyDirectory {
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn File>> {
        self.faults.check("open", None)?;
        Ok(self.file(name, self.inner.open(name, access)?))
    }

    fn create(&self, site: Site, name: &str) -> io::Result<Arc<dyn File>> {
        self.faults.check("create", Some(site))?;
        Ok(self.file(name, self.inner.create(site, name)?))
    }

    fn rename(&self, site: Site, from: &str, to: &str) -> io::Result<()> {
        self.faults.check("rename", Some(site))?;
        self.inner.rename(site, from, to)
    }

    fn link(&self, site: Site, source: &dyn Directory, from: &str, to: &str) -> io::Result<()> {
        self.faults.check("link", Some(site))?;
        let wrapped = source.as_any().downcast_ref::<FaultyDirectory>();
        let source = wrapped.map_or(source, |w| w.inner.as_ref());
        self.inner.link(site, source, from, to)
    }

    fn unlink(&self, site: Site, name: &str) -> io::Result<()> {
        self.faults.check("unlink", Some(site))?;
        self.inner.unlink(site, name)
    }

    fn sync(&self, site: Site) -> io::Result<()> {
        self.faults.check("sync of a directory", Some(site))?;
        self.inner.sync(site)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        self.faults.check("names", None)?;
        self.inner.names()
    }

    fn open_dir(&self, name: &str) -> io::Result<Arc<dyn Directory>> {
        self.faults.check("open a directory", None)?;
        Ok(self.faults.around(self.inner.open_dir(name)?))
    }

    fn create_dir(&self, site: Site, name: &str) -> io::Result<Arc<dyn Directory>> {
        self.faults.check("create a directory", Some(site))?;
        Ok(self.faults.around(self.inner.create_dir(site, name)?))
    }

    fn rename_dir(&self, site: Site, from: &str, to: &str) -> io::Result<()> {
        self.faults.check("rename a directory", Some(site))?;
        self.inner.rename_dir(site, from, to)
    }

    fn remove_dir(&self, site: Site, name: &str) -> io::Result<()> {
        self.faults.check("remove a directory", Some(site))?;
        self.inner.remove_dir(site, name)
    }

    fn as_real(&self) -> Option<&RealDirectory> {
        self.inner.as_real()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug)]
struct FaultyFile {
    inner: Arc<dyn File>,
    name: String,
    faults: Faults,
}

impl FaultyFile {
    /// A sync that fails leaves what it was to write for written (M14). One after write-back that failed writes the rest.
    fn sync(&self, site: Site, sync: impl Fn() -> io::Result<()>) -> io::Result<()> {
        self.faults.check("sync", Some(site)).inspect_err(|_| {
            if let Some(medium) = &self.faults.lock().write_back {
                medium.fail_of(&self.name);
            }
        })?;
        sync()?;
        let mut inner = self.faults.lock();
        if inner.unreported.remove(&self.name) {
            inner.fired = true;
            return Err(Failure::WriteBack.error());
        }
        Ok(())
    }

    /// A write that may be cut short.
    fn write(
        &self,
        method: &'static str,
        site: Site,
        buf: &[u8],
        write: impl Fn(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        match self.faults.next(method, Some(site)) {
            None => write(buf),
            Some(failure) => {
                if failure == Failure::Short {
                    write(&buf[..buf.len() / 2])?;
                }
                Err(failure.error())
            }
        }
    }
}

impl File for FaultyFile {
    fn status(&self) -> io::Result<Status> {
        self.faults.check("status", None)?;
        self.inner.status()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match self.faults.next("read", None) {
            None => self.inner.read_at(buf, offset),
            Some(Failure::Short) => {
                let half = buf.len() / 2;
                self.inner.read_at(&mut buf[..half], offset)
            }
            Some(failure) => Err(failure.error()),
        }
    }

    fn write_at(&self, site: Site, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write("write", site, buf, |part| {
            self.inner.write_at(site, part, offset)
        })
    }

    fn write_durable_at(&self, site: Site, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write("durable write", site, buf, |part| {
            self.inner.write_durable_at(site, part, offset)
        })
    }

    fn set_len(&self, site: Site, len: u64) -> io::Result<()> {
        self.faults.check("set the length", Some(site))?;
        self.inner.set_len(site, len)
    }

    fn leave_room(&self, range: &Range<u64>) -> io::Result<()> {
        self.faults.check("leave room", None)?;
        self.inner.leave_room(range)
    }

    fn is_low_on_space(&self) -> io::Result<bool> {
        self.faults.check("look at the space left", None)?;
        self.inner.is_low_on_space()
    }

    fn reserve(&self, site: Site, range: Range<u64>) -> io::Result<()> {
        self.faults.check("reserve", Some(site))?;
        self.inner.reserve(site, range)
    }

    fn zero(&self, site: Site, range: Range<u64>) -> io::Result<()> {
        self.faults.check("zero", Some(site))?;
        self.inner.zero(site, range)
    }

    fn write_zeros_durable(&self, site: Site, range: Range<u64>) -> io::Result<()> {
        match self.faults.next("durable zeros", Some(site)) {
            None => self.inner.write_zeros_durable(site, range),
            Some(failure) => {
                if failure == Failure::Short {
                    let half = range.start + (range.end - range.start) / 8192 * 4096;
                    self.inner.write_zeros_durable(site, range.start..half)?;
                }
                Err(failure.error())
            }
        }
    }

    fn prefer_extents(&self, bytes: u64) -> io::Result<()> {
        self.faults.check("prefer extents", None)?;
        self.inner.prefer_extents(bytes)
    }

    fn has_own_storage(&self, range: Range<u64>) -> io::Result<bool> {
        self.faults.check("look for storage", None)?;
        self.inner.has_own_storage(range)
    }

    fn punch(&self, site: Site, range: Range<u64>) -> io::Result<()> {
        self.faults.check("punch", Some(site))?;
        self.inner.punch(site, range)
    }

    fn share_storage(&self, site: Site, source: &dyn File) -> io::Result<bool> {
        self.faults.check("share storage", Some(site))?;
        self.inner.share_storage(site, source)
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        self.faults.check("look for data", None)?;
        self.inner.next_data(from)
    }

    fn sync_data(&self, site: Site) -> io::Result<()> {
        self.sync(site, || self.inner.sync_data(site))
    }

    fn sync_all(&self, site: Site) -> io::Result<()> {
        self.sync(site, || self.inner.sync_all(site))
    }

    fn domain(&self) -> io::Result<Domain> {
        self.faults.check("tell the domain", None)?;
        self.inner.domain()
    }

    fn store_word(&self, site: Site, offset: u64, word: u64) -> io::Result<()> {
        self.faults.check("store", Some(site))?;
        self.inner.store_word(site, offset, word)
    }

    fn write_back(&self, site: Site, offset: u64) -> io::Result<()> {
        self.faults.check("write back", Some(site))?;
        self.inner.write_back(site, offset)
    }

    fn fence(&self, site: Site) {
        // It cannot fail.
        self.faults.lock().calls.push(Call {
            method: "fence",
            site: Some(site),
        });
        self.inner.fence(site);
    }

    fn take_lease(&self) -> io::Result<Lease> {
        self.faults.check("take a lease", None)?;
        self.inner.take_lease()
    }

    fn lease_holds(&self) -> io::Result<bool> {
        self.inner.lease_holds()
    }

    fn end_lease(&self) {
        self.inner.end_lease();
    }

    fn as_real(&self) -> Option<&std::fs::File> {
        self.inner.as_real()
    }
}
