// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who may use an image: open-file-description locks on two bytes of its `lock` file.
//!
//! Byte 0, *in use*, is shared with the frontend, which keeps it while it has memory of the image mapped, even if the
//! backend dies. Byte 1, *serving*, is held through a second open that never leaves this process, and is taken before
//! anything of the image is read: two live backends are impossible. Nothing may depend on byte 0 alone, since any
//! holder of the description can drop it.
//!
//! ```text
//!            byte 1   byte 0
//! backend      x        x      shared with its frontend
//! it dies               x      kept by the frontend
//! the next     x        x      takes byte 1; the frontend hands byte 0 back
//! ```
//!
//! The file is never replaced, linked or removed: a lock on a file that lost its name would exclude nobody.
#![allow(unsafe_code)]

mod holder;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::medium::{Access, Directory, Site};
use crate::mutant::{self, Mutant};

pub use holder::{Process, Purpose, Record};

/// Name of the lock file in the image's directory.
pub const LOCK_FILE: &str = "lock";
const IN_USE: i64 = 0;
const SERVING: i64 = 1;
/// How long a lock may still be held by nobody that matters: a child that a threaded program starts has copies of its
/// descriptors, and so of its locks, until it executes its own program.
const GRACE: Duration = Duration::from_millis(200);

/// The right to use an image, as long as it lives.
#[derive(Debug)]
pub struct ImageLock {
    /// The description that holds byte 0; empty while a frontend of an earlier backend has it.
    in_use: OnceLock<File>,
    /// A description of its own for byte 0, in case that nobody has it.
    own: File,
    /// Holds byte 1. `None` for a reader.
    serving: Option<File>,
}

/// What became of a lock that a frontend has handed back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandedBack {
    /// The image is held by it.
    Taken,
    /// It is not the `lock` of this image: that of a copy, or something else.
    OtherFile,
    /// Another description holds the image.
    Busy,
}

impl ImageLock {
    /// Takes the image for a change that nobody else may see half done.
    ///
    /// # Errors
    /// `Locked`, naming the holder; `Linked` if the lock file has several names (a copy made with `cp -al`).
    pub(crate) fn exclusive(dir: &dyn Directory) -> Result<Option<Self>> {
        let Some(lock) = Self::serving(dir)? else {
            return Ok(None);
        };
        take(&lock.own, libc::F_WRLCK, IN_USE)?;
        lock.hold_own()?;
        Ok(Some(lock))
    }

    /// Takes the image to serve it. A frontend whose backend has ended may have it in use; it hands that back later, or
    /// ends, and until then [`ImageLock::in_use`] is `None`.
    ///
    /// # Errors
    /// As [`ImageLock::exclusive`], but `Locked` only if another process serves or changes the image, or reads it.
    pub(crate) fn to_serve(dir: &dyn Directory) -> Result<Option<Self>> {
        let Some(lock) = Self::serving(dir)? else {
            return Ok(None);
        };
        // A frontend is not waited for here: the guest waits for this backend. Nobody writes metadata who does not have
        // byte 1, and a frontend's mappings show only what is data.
        if !is_write_locked(&lock.own, IN_USE)? {
            take(&lock.own, libc::F_WRLCK, IN_USE)?;
            lock.hold_own()?;
        }
        Ok(Some(lock))
    }

    /// Holds byte 1 only.
    fn serving(dir: &dyn Directory) -> Result<Option<Self>> {
        let Some(serving) = open(dir, Access::Write)? else {
            return Ok(None);
        };
        let status = serving
            .metadata()
            .context(|| "cannot inspect the lock file".to_owned())?;
        if status.nlink() != 1 {
            let what = "the image's lock file has more than one name";
            return Err(Error::new(ErrorKind::Linked, what));
        }
        if !mutant::is(Mutant::ServingLockDropped) {
            take(&serving, libc::F_WRLCK, SERVING)?;
        }
        let Some(own) = open(dir, Access::Write)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            in_use: OnceLock::new(),
            own,
            serving: Some(serving),
        }))
    }

    /// Notes that `own` holds byte 0.
    fn hold_own(&self) -> Result<()> {
        let held = self
            .own
            .try_clone()
            .context(|| "cannot duplicate the lock file".to_owned())?;
        // Set already: then it is a duplicate of this description, since only one can hold the byte.
        let _ = self.in_use.set(held);
        Ok(())
    }

    /// Leaves a text that names this process.
    pub(crate) fn record_holder(&self, boot: Uuid, purpose: Purpose) {
        if let Some(file) = &self.serving {
            // No lock relies on the text, and a full filesystem is no reason not to open an image.
            let _ = Record::write(file, boot, purpose);
        }
    }

    /// Keeps writers out while the image is served for reading; any number of readers may hold this.
    ///
    /// # Errors
    /// `Locked`, naming the holder.
    pub(crate) fn shared(dir: &dyn Directory) -> Result<Option<Self>> {
        let Some(own) = open(dir, Access::Read)? else {
            return Ok(None);
        };
        take(&own, libc::F_RDLCK, IN_USE)?;
        let lock = Self {
            in_use: OnceLock::new(),
            own,
            serving: None,
        };
        lock.hold_own()?;
        Ok(Some(lock))
    }

    /// The description that holds byte 0, to be shared with a frontend; `None` while a frontend of an earlier backend
    /// keeps it. Looks anew each time: that frontend may have ended.
    pub fn in_use(&self) -> Option<&File> {
        let kind = match self.serving {
            Some(_) => libc::F_WRLCK,
            None => libc::F_RDLCK,
        };
        if self.in_use.get().is_none() && set(&self.own, kind, IN_USE).is_ok() {
            // Without a descriptor left the lock is held all the same, and the next look tells so.
            let _ = self.hold_own();
        }
        // Again: a frontend that shares the description can drop its lock.
        self.in_use
            .get()
            .filter(|file| set(file, kind, IN_USE).is_ok())
    }

    /// Takes over what a frontend has kept of byte 0.
    ///
    /// # Errors
    /// `Io` if `kept` cannot be looked at, or is not open for writing.
    pub fn hand_back(&self, kept: OwnedFd) -> Result<HandedBack> {
        let kept = File::from(kept);
        let context = || "cannot look at the lock that was handed back".to_owned();
        let (theirs, ours) = (kept.metadata(), self.own.metadata());
        let (theirs, ours) = (theirs.context(context)?, ours.context(context)?);
        if (theirs.dev(), theirs.ino()) != (ours.dev(), ours.ino()) {
            return Ok(HandedBack::OtherFile);
        }
        // Succeeds if this description has the byte already, or nobody has it. Then nobody else can have it, so that a
        // description that is noted already is this one.
        match set(&kept, libc::F_WRLCK, IN_USE) {
            Ok(()) => {
                let _ = self.in_use.set(kept);
                Ok(HandedBack::Taken)
            }
            Err(e) if is_conflict(&e) => Ok(HandedBack::Busy),
            Err(e) => Err(e).context(context),
        }
    }
}

/// Who has an image for writing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// The process that serves or changes it, as it says of itself.
    Writer(Record),
    /// A frontend whose backend has ended.
    Frontend,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Writer(record) => &record.name,
            Self::Frontend => "a virtual machine whose backend has ended",
        })
    }
}

/// Who has the image for writing now.
///
/// # Errors
/// `Io` if the lock file cannot be read.
pub fn holder(dir: &dyn Directory) -> Result<Option<Holder>> {
    let Some(file) = open(dir, Access::Read)? else {
        return Ok(None);
    };
    if is_write_locked(&file, SERVING)? {
        return Ok(Some(Holder::Writer(Record::read(&file))));
    }
    Ok(is_write_locked(&file, IN_USE)?.then_some(Holder::Frontend))
}

/// `None` on a medium without locks.
fn open(dir: &dyn Directory, access: Access) -> Result<Option<File>> {
    let file = dir
        .open(LOCK_FILE, access)
        .context(|| "cannot open the image's lock file".to_owned())?;
    file.as_real()
        .map(File::try_clone)
        .transpose()
        .context(|| "cannot duplicate the lock file".to_owned())
}

fn take(file: &File, kind: i32, byte: i64) -> Result<()> {
    let deadline = Instant::now() + GRACE;
    loop {
        match set(file, kind, byte) {
            Ok(()) => return Ok(()),
            Err(e) if !is_conflict(&e) => {
                return Err(Error::new(ErrorKind::Io, "cannot lock the image").caused_by(e));
            }
            Err(_) if Instant::now() < deadline => std::thread::sleep(GRACE / 20),
            Err(_) => return Err(conflict(file, kind, byte)?),
        }
    }
}

/// Says who has the image. What is seen now may be another than the one who was in the way, which is as good an answer.
fn conflict(file: &File, kind: i32, byte: i64) -> Result<Error> {
    // Who wants byte 0 for writing has byte 1 itself.
    let reads = kind == libc::F_RDLCK;
    if byte == SERVING || reads && is_write_locked(file, SERVING)? {
        let what = format!("the image is in use by {}", Record::read(file).name);
        return Ok(Error::new(ErrorKind::Locked, what));
    }
    if is_write_locked(file, IN_USE)? {
        let what = format!("the image is in use by {}", Holder::Frontend);
        return Ok(Error::new(ErrorKind::Orphaned, what));
    }
    let what = "the image is in use by processes that only read it";
    Ok(Error::new(ErrorKind::Locked, what))
}

fn set(file: &File, kind: i32, byte: i64) -> io::Result<()> {
    ofd_lock(file, libc::F_OFD_SETLK, &mut request(kind, byte)?)
}

fn is_conflict(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Whether another description has the byte for writing. Takes nothing, so that asking keeps nobody out.
fn is_write_locked(file: &File, byte: i64) -> Result<bool> {
    let context = || "cannot look at the image's lock".to_owned();
    // What a lock for reading would meet is a lock for writing.
    let mut lock = request(libc::F_RDLCK, byte).context(context)?;
    ofd_lock(file, libc::F_OFD_GETLK, &mut lock).context(context)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn request(kind: i32, byte: i64) -> io::Result<libc::flock> {
    Ok(libc::flock {
        l_type: i16::try_from(kind).map_err(io::Error::other)?,
        // SEEK_SET is 0 on Linux.
        l_whence: 0,
        l_start: byte,
        l_len: 1,
        // Must be 0 for locks of the open file description (fcntl(2)).
        l_pid: 0,
    })
}

fn ofd_lock(file: &File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the fd is open, and both commands read and write exactly one flock, which outlives the call.
        let r = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *lock) };
        if r == 0 {
            return Ok(());
        }
        // Also those that do not wait may be interrupted, on network filesystems above all (fcntl(2)).
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Creates the lock file of a new image.
pub(crate) fn create(dir: &dyn Directory) -> Result<()> {
    dir.create(Site("create.lock"), LOCK_FILE)
        .map(drop)
        .context(|| "cannot create the lock file".to_owned())
}
