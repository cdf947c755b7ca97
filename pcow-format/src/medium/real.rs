// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The operating system's files behind the seam. Content is read and written with `pread` and `pwrite` only, so that a
//! truncated or poisoned file is an error, never a signal; mappings are for the words of a DAX file, and to write lines of one back.
//!
//! A call that may be interrupted by its manual (open, statfs, fsync, fallocate, everything that moves bytes) is made again.

use std::any::Any;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, FallocateFlags, Mode, OFlags, RenameFlags, ResolveFlags, SeekFrom, StatxFlags,
};
use rustix::io::{Errno, retry_on_intr};

use super::{
    Access, Directory, Domain, File, Identity, Lease, Site, Status, copy_by_hand, dax, extents,
    lease,
};
use crate::units::{bytes, len};

/// Least free space that is left on a filesystem.
const MIN_RESERVE_BYTES: u64 = 1 << 20;
/// Most free space that is left, however large the filesystem is.
const MAX_RESERVE_BYTES: u64 = 64 << 20;
/// Space is low when no more than so many reserves are left: a guest that is stopped then has most of that for what it
/// still touches until it has stopped.
const LOW_WATER_RESERVES: u64 = 4;

/// Most bytes that the kernel is asked to copy in one call, so that a signal is heard in between.
const COPY_STEP_BYTES: u64 = 64 << 20;

/// What zeros are written from, many times over in one call.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// How many of them in one call: 4 MiB, far below the kernel's limit of pieces (1,024).
const ZEROS_PER_CALL: usize = 64;

fn open_path(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(retry_on_intr(|| {
        rustix::fs::open(path, flags, Mode::empty())
    })?)
}

/// A directory of a mounted filesystem.
#[derive(Debug)]
pub struct RealDirectory {
    fd: OwnedFd,
    path: PathBuf,
}

impl RealDirectory {
    /// Opens the directory at `path`, following symbolic links on the way: the caller trusts its own path.
    ///
    /// # Errors
    /// As open(2); `ENOTDIR` if it is something else.
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = open_path(path, flags)?;
        Ok(Arc::new(Self {
            fd,
            path: path.to_owned(),
        }))
    }

    /// The path under which it was opened, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open directory.
    pub fn as_fd(&self) -> impl AsFd + '_ {
        &self.fd
    }

    /// Opens an entry without leaving the directory and without following any link.
    fn open_entry(&self, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mode = if flags.contains(OFlags::CREATE) {
            Mode::RUSR | Mode::WUSR
        } else {
            Mode::empty()
        };
        let open = || rustix::fs::openat2(&self.fd, name, flags, mode, resolve);
        Ok(retry_on_intr(open)?)
    }
}

impl Directory for RealDirectory {
    fn open(&self, name: &str, access: Access) -> io::Result<Arc<dyn File>> {
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::RDWR,
        };
        // NONBLOCK: a hostile directory may hold a FIFO, whose open would wait for a writer.
        let file = fs::File::from(self.open_entry(name, flags | OFlags::NONBLOCK)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(Arc::new(RealFile::new(file)))
    }

    fn create(&self, _: Site, name: &str) -> io::Result<Arc<dyn File>> {
        let fd = self.open_entry(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
        Ok(Arc::new(RealFile::new(fs::File::from(fd))))
    }

    fn rename(&self, _: Site, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.fd, from, &self.fd, to)?)
    }

    fn link(&self, _: Site, source: &dyn Directory, from: &str, to: &str) -> io::Result<()> {
        let source = source
            .as_real()
            .ok_or_else(|| io::Error::from(io::ErrorKind::CrossesDevices))?;
        Ok(rustix::fs::linkat(
            &source.fd,
            from,
            &self.fd,
            to,
            AtFlags::empty(),
        )?)
    }

    fn unlink(&self, _: Site, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())?)
    }

    fn sync(&self, _: Site) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::fsync(&self.fd))?)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in retry_on_intr(|| rustix::fs::Dir::read_from(&self.fd))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn open_dir(&self, name: &str) -> io::Result<Arc<dyn Directory>> {
        let fd = self.open_entry(name, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(Arc::new(Self {
            fd,
            path: self.path.join(name),
        }))
    }

    fn create_dir(&self, _: Site, name: &str) -> io::Result<Arc<dyn Directory>> {
        rustix::fs::mkdirat(&self.fd, name, Mode::RWXU | Mode::RWXG | Mode::RWXO)?;
        self.open_dir(name).inspect_err(|_| {
            // Best effort: it is empty, and nobody knows of it.
            let _ = rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR);
        })
    }

    fn rename_dir(&self, _: Site, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(
            &self.fd,
            from,
            &self.fd,
            to,
            RenameFlags::NOREPLACE,
        )?)
    }

    fn remove_dir(&self, _: Site, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR)?)
    }

    fn as_real(&self) -> Option<&RealDirectory> {
        Some(self)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Space of a filesystem, in bytes.
struct Room {
    /// What is not taken.
    reserve: u64,
    /// What is left, the reserve included.
    free: u64,
}

/// A regular file of a mounted filesystem.
#[derive(Debug)]
pub struct RealFile {
    file: fs::File,
    /// Cleared when the filesystem says that it knows no shared blocks, so that it is asked once.
    may_share_blocks: AtomicBool,
    /// Made at the first word store; only DAX files get one.
    words: OnceLock<dax::SyncMapping>,
}

impl RealFile {
    fn new(file: fs::File) -> Self {
        Self {
            file,
            may_share_blocks: AtomicBool::new(true),
            words: OnceLock::new(),
        }
    }

    /// Opens a file of the user's (a raw base) for reading.
    ///
    /// # Errors
    /// As open(2).
    pub fn open_raw(path: &Path) -> io::Result<Arc<dyn File>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = fs::File::from(open_path(path, flags)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(Arc::new(Self::new(file)))
    }

    /// Creates a file of the user's that must not exist, for writing.
    ///
    /// # Errors
    /// As open(2).
    pub fn create_raw(path: &Path) -> io::Result<Arc<dyn File>> {
        let mut options = fs::File::options();
        let file = options.read(true).write(true).create_new(true).open(path)?;
        Ok(Arc::new(Self::new(file)))
    }

    /// Opens a file of the user's for writing.
    ///
    /// # Errors
    /// As open(2).
    pub fn open_raw_for_writing(path: &Path) -> io::Result<Arc<dyn File>> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = fs::File::from(open_path(path, flags)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(Arc::new(Self::new(file)))
    }

    /// What is left of the filesystem. `None` for one that tells no size (an unlimited tmpfs): that has no last block.
    fn room(&self) -> io::Result<Option<Room>> {
        let fs = retry_on_intr(|| rustix::fs::fstatvfs(&self.file))?;
        let size = fs.f_blocks.saturating_mul(fs.f_frsize);
        Ok((size > 0).then(|| Room {
            reserve: (size / 128).clamp(MIN_RESERVE_BYTES, MAX_RESERVE_BYTES),
            free: fs.f_bavail.saturating_mul(fs.f_frsize),
        }))
    }

    fn words(&self) -> io::Result<&dax::SyncMapping> {
        if let Some(words) = self.words.get() {
            return Ok(words);
        }
        let mapping = dax::SyncMapping::new(&self.file, self.file.metadata()?.len())?;
        // Two threads may both have made one; the loser's is unmapped at once, both show the same file.
        Ok(self.words.get_or_init(|| mapping))
    }

    /// Writes some of `pieces`, durably; returns how many bytes.
    fn write_some_durable(&self, pieces: &[io::IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let flags = rustix::io::ReadWriteFlags::DSYNC;
        let write = || rustix::io::pwritev2(&self.file, pieces, offset, flags);
        match retry_on_intr(write)? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            written => Ok(written),
        }
    }

    fn fallocate(&self, flags: FallocateFlags, range: &Range<u64>) -> rustix::io::Result<()> {
        let length = range.end - range.start;
        retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, range.start, length))
    }
}

impl File for RealFile {
    fn status(&self) -> io::Result<Status> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let s = rustix::fs::statx(&self.file, "", AtFlags::EMPTY_PATH, mask)?;
        let birth = if s.stx_mask & StatxFlags::BTIME.bits() == 0 {
            0
        } else {
            nanoseconds(&s.stx_btime)
        };
        Ok(Status {
            identity: Identity {
                device: rustix::fs::makedev(s.stx_dev_major, s.stx_dev_minor),
                inode: s.stx_ino,
                birth_ns: u64::try_from(birth).unwrap_or(0),
            },
            len: s.stx_size,
            allocated: s.stx_blocks.saturating_mul(512),
            links: u64::from(s.stx_nlink),
            mtime_ns: nanoseconds(&s.stx_mtime),
        })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + bytes(done)) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn write_at(&self, _: Site, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn write_durable_at(&self, _: Site, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let rest = [io::IoSlice::new(&buf[done..])];
            done += self.write_some_durable(&rest, offset + bytes(done))?;
        }
        Ok(())
    }

    fn copy_from(&self, site: Site, source: &dyn File, range: Range<u64>) -> io::Result<()> {
        let Some(from) = source.as_real() else {
            return copy_by_hand(self, site, source, range);
        };
        let (mut here, mut there) = (range.start, range.start);
        while there < range.end {
            let wanted = len((range.end - there).min(COPY_STEP_BYTES));
            // Shares the blocks where the filesystem can (copy_file_range(2)).
            match rustix::fs::copy_file_range(
                from,
                Some(&mut there),
                &self.file,
                Some(&mut here),
                wanted,
            ) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    return copy_by_hand(self, site, source, there..range.end);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn set_len(&self, _: Site, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    /// Storage that is reserved is not yet written: the first store to a
    /// page of it may split an extent, and a filesystem without a block for that ends the guest with SIGBUS.
    ///
    /// A range that holds something may already have all its blocks, and must not wait for space that it does not need:
    /// half of the reserve is for such.
    fn leave_room(&self, range: &Range<u64>) -> io::Result<()> {
        let Some(Room { reserve, free }) = self.room()? else {
            return Ok(());
        };
        if free >= reserve.saturating_add(range.end - range.start) {
            return Ok(());
        }
        let is_hole = self
            .next_data(range.start)?
            .is_none_or(|d| d.start >= range.end);
        if is_hole || free < reserve / 2 {
            return Err(Errno::NOSPC.into());
        }
        Ok(())
    }

    fn is_low_on_space(&self) -> io::Result<bool> {
        let room = self.room()?;
        Ok(room.is_some_and(|room| room.free < room.reserve * LOW_WATER_RESERVES))
    }

    fn reserve(&self, _: Site, range: Range<u64>) -> io::Result<()> {
        self.leave_room(&range)?;
        // A shared (reflinked) block counts as allocated, but a store to it needs a new one. Unsharing promises that
        // no later write fails for want of space (fallocate(2)), so it allocates holes as well.
        if self.may_share_blocks.load(Ordering::Relaxed) {
            match self.fallocate(FallocateFlags::UNSHARE_RANGE, &range) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::INVAL) => {
                    self.may_share_blocks.store(false, Ordering::Relaxed);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(self.fallocate(FallocateFlags::empty(), &range)?)
    }

    fn zero(&self, site: Site, range: Range<u64>) -> io::Result<()> {
        self.leave_room(&range)?;
        match self.fallocate(FallocateFlags::ZERO_RANGE, &range) {
            Err(Errno::OPNOTSUPP) => {
                self.punch(site, range.clone())?;
                self.reserve(site, range)
            }
            other => Ok(other?),
        }
    }

    fn write_zeros_durable(&self, _: Site, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            // As much as possible in one call: each ends with a commit of the filesystem's journal.
            let mut left = len(range.end - at).min(ZEROS.len() * ZEROS_PER_CALL);
            let mut pieces = Vec::with_capacity(left.div_ceil(ZEROS.len()));
            while left > 0 {
                let piece = left.min(ZEROS.len());
                pieces.push(io::IoSlice::new(&ZEROS[..piece]));
                left -= piece;
            }
            at += bytes(self.write_some_durable(&pieces, at)?);
        }
        Ok(())
    }

    fn prefer_extents(&self, bytes: u64) -> io::Result<()> {
        extents::prefer(&self.file, bytes)
    }

    fn has_own_storage(&self, range: Range<u64>) -> io::Result<bool> {
        extents::are_settled(&self.file, range)
    }

    fn punch(&self, _: Site, range: Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(self.fallocate(flags, &range)?)
    }

    fn share_storage(&self, _: Site, source: &dyn File) -> io::Result<bool> {
        let Some(source) = source.as_real() else {
            return Ok(false);
        };
        match rustix::fs::ioctl_ficlone(&self.file, source) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        // `seek` moves the shared file position, which nothing else uses.
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?;
        Ok(Some(start..end))
    }

    fn sync_data(&self, _: Site) -> io::Result<()> {
        self.file.sync_data()
    }

    fn sync_all(&self, _: Site) -> io::Result<()> {
        self.file.sync_all()
    }

    fn domain(&self) -> io::Result<Domain> {
        Ok(if dax::is_dax(&self.file)? {
            Domain::Dax
        } else {
            Domain::PageCache
        })
    }

    fn store_word(&self, _: Site, offset: u64, word: u64) -> io::Result<()> {
        self.words()?.store(offset, word)
    }

    fn write_back(&self, _: Site, offset: u64) -> io::Result<()> {
        self.words()?.write_back(offset)
    }

    fn fence(&self, _: Site) {
        dax::fence();
    }

    fn take_lease(&self) -> io::Result<Lease> {
        lease::take(&self.file)
    }

    fn lease_holds(&self) -> io::Result<bool> {
        lease::holds(&self.file)
    }

    fn end_lease(&self) {
        lease::end(&self.file);
    }

    fn as_real(&self) -> Option<&fs::File> {
        Some(&self.file)
    }
}

fn nanoseconds(t: &rustix::fs::StatxTimestamp) -> i128 {
    i128::from(t.tv_sec) * 1_000_000_000 + i128::from(t.tv_nsec)
}
