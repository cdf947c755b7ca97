// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who may use an image: open-file-description locks on two bytes of its `lock` file.
//!
//! Byte 0, *in use*, is shared with the frontend, which keeps it while it has memory of the image mapped, even if the
//! backend dies. Byte 1, *serving*, is held through a second open that never leaves this process, and is taken before
//! anything of the image is read: two live backends are impossible. Nothing may depend on byte 0 alone, since any
//! holder of the description can drop it.
//!
//! The file is never replaced, linked or removed: a lock on a file that lost its name would exclude nobody.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::medium::{Access, Directory, Site};

/// Name of the lock file in the image's directory.
pub const LOCK_FILE: &str = "lock";
const IN_USE: i64 = 0;
const SERVING: i64 = 1;
/// How long a lock may still be held by nobody that matters: a child that a threaded program starts has copies of its
/// descriptors, and so of its locks, until it executes its own program.
const GRACE: Duration = Duration::from_millis(200);
/// Longest text of a holder that is read.
const MAX_HOLDER_BYTES: usize = 256;

/// The right to use an image, as long as it lives.
#[derive(Debug)]
pub struct ImageLock {
    in_use: File,
    serving: Option<File>,
}

impl ImageLock {
    /// Takes the image for writing.
    ///
    /// # Errors
    /// `Locked`, naming the holder; `Linked` if the lock file has several names (a copy made with `cp -al`).
    pub(crate) fn exclusive(dir: &dyn Directory) -> Result<Option<Self>> {
        let Some(serving) = open(dir, Access::Write)? else {
            return Ok(None);
        };
        if serving
            .metadata()
            .context(|| "cannot inspect the lock file".to_owned())?
            .nlink()
            != 1
        {
            let what = "the image's lock file has more than one name";
            return Err(Error::new(ErrorKind::Linked, what));
        }
        lock(&serving, libc::F_WRLCK, SERVING)?;
        let Some(in_use) = open(dir, Access::Write)? else {
            return Ok(None);
        };
        lock(&in_use, libc::F_WRLCK, IN_USE)?;
        Ok(Some(Self {
            in_use,
            serving: Some(serving),
        }))
    }

    /// Leaves a text that names this process, for people and messages only.
    pub(crate) fn record_holder(&self) {
        if let Some(file) = &self.serving {
            // Nothing relies on the text, and a full filesystem is no reason not to open an image.
            let _ = record_holder(file);
        }
    }

    /// Keeps writers out while the image is served for reading; any number of readers may hold this.
    ///
    /// # Errors
    /// `Locked`, naming the holder.
    pub(crate) fn shared(dir: &dyn Directory) -> Result<Option<Self>> {
        let Some(in_use) = open(dir, Access::Read)? else {
            return Ok(None);
        };
        lock(&in_use, libc::F_RDLCK, IN_USE)?;
        Ok(Some(Self {
            in_use,
            serving: None,
        }))
    }

    /// The description that holds byte 0, to be shared with a frontend.
    pub fn in_use(&self) -> &File {
        &self.in_use
    }
}

/// The text that the present holder left, if anybody holds the image for writing.
///
/// # Errors
/// `Io` if the lock file cannot be read.
pub fn holder(dir: &dyn Directory) -> Result<Option<String>> {
    let Some(file) = open(dir, Access::Read)? else {
        return Ok(None);
    };
    let held = is_held(&file).context(|| "cannot look at the image's lock".to_owned())?;
    Ok(held.then(|| holder_text(&file)))
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

fn lock(file: &File, kind: i32, byte: i64) -> Result<()> {
    let deadline = Instant::now() + GRACE;
    loop {
        match set(file, kind, byte) {
            Ok(()) => return Ok(()),
            Err(e) if !matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Err(Error::new(ErrorKind::Io, "cannot lock the image").caused_by(e));
            }
            Err(_) if Instant::now() < deadline => std::thread::sleep(GRACE / 20),
            Err(_) => {
                let what = format!("the image is in use by {}", holder_text(file));
                return Err(Error::new(ErrorKind::Locked, what));
            }
        }
    }
}

fn set(file: &File, kind: i32, byte: i64) -> io::Result<()> {
    ofd_lock(file, libc::F_OFD_SETLK, &mut request(kind, byte)?)
}

/// Whether somebody holds the image for writing. Takes nothing, so that asking keeps nobody out.
fn is_held(file: &File) -> io::Result<bool> {
    let mut lock = request(libc::F_RDLCK, IN_USE)?;
    ofd_lock(file, libc::F_OFD_GETLK, &mut lock)?;
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
    // SAFETY: the fd is open, and both commands read and write exactly one flock, which outlives the call.
    let r = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *lock) };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn record_holder(file: &File) -> io::Result<()> {
    let host = rustix::system::uname();
    let text = format!(
        "process {} on {}\n",
        std::process::id(),
        host.nodename().to_string_lossy()
    );
    file.set_len(0)?;
    file.write_all_at(text.as_bytes(), 0)
}

fn holder_text(file: &File) -> String {
    let mut raw = [0; MAX_HOLDER_BYTES];
    let got = file.read_at(&mut raw, 0).unwrap_or(0);
    let text = String::from_utf8_lossy(&raw[..got]);
    let line = text.lines().next().unwrap_or("").trim();
    if line.is_empty() {
        "another process".to_owned()
    } else {
        line.escape_debug().to_string()
    }
}

/// Creates the lock file of a new image.
pub(crate) fn create(dir: &dyn Directory) -> Result<()> {
    dir.create(Site("create.lock"), LOCK_FILE)
        .map(drop)
        .context(|| "cannot create the lock file".to_owned())
}
