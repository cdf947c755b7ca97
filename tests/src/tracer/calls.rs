// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which system calls can fail, and what file a call of a traced thread is about.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use libc::c_long;
use nix::libc::user_regs_struct as Registers;
use nix::unistd::Pid;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// How a call names its file: by the place of an argument.
#[derive(Debug, Clone, Copy)]
enum Names {
    /// A descriptor.
    Descriptor(usize),
    /// A path.
    Path(usize),
    /// The descriptor of a directory, and a path from there in the next argument.
    At(usize),
    /// It is about none.
    Nothing,
}

/// How a call says how many bytes it wants moved.
#[derive(Debug, Clone, Copy)]
enum Amount {
    /// It moves none, or cannot move fewer.
    None,
    /// An argument.
    Argument(usize),
    /// The first of some pieces of memory that arguments 1 and 2 tell of (`struct iovec`).
    Pieces,
}

use Amount::{Argument, Pieces};
use Names::{At, Descriptor, Nothing, Path as Named};

/// A system call, its name, and what its arguments mean. Not there are
/// - `close`: it never leaves the descriptor open (close(2)), so that one that is not carried out shows a kernel that does not
///   exist;
/// - memory of no file: whoever gets none for an allocation ends, which is the allocator's way and that of a killed process;
/// - what cannot fail for want of something, such as `futex`, and what only the runtime calls before `main`, as `poll`.
#[rustfmt::skip]
const KNOWN: [(c_long, &str, Names, Amount); 72] = [
    (libc::SYS_clone3, "clone3", Nothing, Amount::None),
    (libc::SYS_eventfd2, "eventfd2", Nothing, Amount::None),
    (libc::SYS_signalfd4, "signalfd4", Nothing, Amount::None),
    (libc::SYS_memfd_create, "memfd_create", Nothing, Amount::None),
    (libc::SYS_pipe2, "pipe2", Nothing, Amount::None),
    (libc::SYS_ppoll, "ppoll", Nothing, Amount::None),
    (libc::SYS_socket, "socket", Nothing, Amount::None),
    (libc::SYS_socketpair, "socketpair", Nothing, Amount::None),
    (libc::SYS_bind, "bind", Descriptor(0), Amount::None),
    (libc::SYS_listen, "listen", Descriptor(0), Amount::None),
    (libc::SYS_connect, "connect", Descriptor(0), Amount::None),
    (libc::SYS_accept4, "accept4", Descriptor(0), Amount::None),
    (libc::SYS_setsockopt, "setsockopt", Descriptor(0), Amount::None),
    (libc::SYS_getsockopt, "getsockopt", Descriptor(0), Amount::None),
    (libc::SYS_read, "read", Descriptor(0), Argument(2)),
    (libc::SYS_pread64, "pread64", Descriptor(0), Argument(2)),
    (libc::SYS_readv, "readv", Descriptor(0), Pieces),
    (libc::SYS_preadv, "preadv", Descriptor(0), Pieces),
    (libc::SYS_preadv2, "preadv2", Descriptor(0), Pieces),
    (libc::SYS_write, "write", Descriptor(0), Argument(2)),
    (libc::SYS_pwrite64, "pwrite64", Descriptor(0), Argument(2)),
    (libc::SYS_writev, "writev", Descriptor(0), Pieces),
    (libc::SYS_pwritev, "pwritev", Descriptor(0), Pieces),
    (libc::SYS_pwritev2, "pwritev2", Descriptor(0), Pieces),
    (libc::SYS_copy_file_range, "copy_file_range", Descriptor(2), Argument(4)),
    (libc::SYS_sendfile, "sendfile", Descriptor(0), Argument(3)),
    (libc::SYS_splice, "splice", Descriptor(2), Argument(4)),
    (libc::SYS_fsync, "fsync", Descriptor(0), Amount::None),
    (libc::SYS_fdatasync, "fdatasync", Descriptor(0), Amount::None),
    (libc::SYS_sync_file_range, "sync_file_range", Descriptor(0), Amount::None),
    (libc::SYS_syncfs, "syncfs", Descriptor(0), Amount::None),
    (libc::SYS_fallocate, "fallocate", Descriptor(0), Amount::None),
    (libc::SYS_ftruncate, "ftruncate", Descriptor(0), Amount::None),
    (libc::SYS_lseek, "lseek", Descriptor(0), Amount::None),
    (libc::SYS_fcntl, "fcntl", Descriptor(0), Amount::None),
    (libc::SYS_flock, "flock", Descriptor(0), Amount::None),
    (libc::SYS_ioctl, "ioctl", Descriptor(0), Amount::None),
    (libc::SYS_mmap, "mmap", Descriptor(4), Amount::None),
    (libc::SYS_sendmsg, "sendmsg", Descriptor(0), Amount::None),
    (libc::SYS_recvmsg, "recvmsg", Descriptor(0), Amount::None),
    (libc::SYS_sendto, "sendto", Descriptor(0), Amount::None),
    (libc::SYS_recvfrom, "recvfrom", Descriptor(0), Amount::None),
    (libc::SYS_fstat, "fstat", Descriptor(0), Amount::None),
    (libc::SYS_fstatfs, "fstatfs", Descriptor(0), Amount::None),
    (libc::SYS_getdents64, "getdents64", Descriptor(0), Amount::None),
    (libc::SYS_fchmod, "fchmod", Descriptor(0), Amount::None),
    (libc::SYS_fchown, "fchown", Descriptor(0), Amount::None),
    (libc::SYS_open, "open", Named(0), Amount::None),
    (libc::SYS_stat, "stat", Named(0), Amount::None),
    (libc::SYS_lstat, "lstat", Named(0), Amount::None),
    (libc::SYS_statfs, "statfs", Named(0), Amount::None),
    (libc::SYS_access, "access", Named(0), Amount::None),
    (libc::SYS_readlink, "readlink", Named(0), Amount::None),
    (libc::SYS_rename, "rename", Named(0), Amount::None),
    (libc::SYS_link, "link", Named(0), Amount::None),
    (libc::SYS_unlink, "unlink", Named(0), Amount::None),
    (libc::SYS_mkdir, "mkdir", Named(0), Amount::None),
    (libc::SYS_rmdir, "rmdir", Named(0), Amount::None),
    (libc::SYS_chmod, "chmod", Named(0), Amount::None),
    (libc::SYS_openat, "openat", At(0), Amount::None),
    (libc::SYS_openat2, "openat2", At(0), Amount::None),
    (libc::SYS_newfstatat, "newfstatat", At(0), Amount::None),
    (libc::SYS_statx, "statx", At(0), Amount::None),
    (libc::SYS_faccessat, "faccessat", At(0), Amount::None),
    (libc::SYS_readlinkat, "readlinkat", At(0), Amount::None),
    (libc::SYS_renameat, "renameat", At(0), Amount::None),
    (libc::SYS_renameat2, "renameat2", At(0), Amount::None),
    (libc::SYS_linkat, "linkat", At(0), Amount::None),
    (libc::SYS_unlinkat, "unlinkat", At(0), Amount::None),
    (libc::SYS_mkdirat, "mkdirat", At(0), Amount::None),
    (libc::SYS_fchmodat, "fchmodat", At(0), Amount::None),
    (libc::SYS_utimensat, "utimensat", At(0), Amount::None),
];

/// Stops a thread at each of these calls.
pub(super) fn filter() -> BpfProgram {
    let rules = KNOWN.iter().map(|known| (known.0, Vec::new())).collect();
    let (others, these) = (SeccompAction::Allow, SeccompAction::Trace(0));
    let filter = SeccompFilter::new(rules, others, these, TargetArch::x86_64).unwrap();
    filter.try_into().unwrap()
}

/// Longest path that the kernel takes (`PATH_MAX`).
const PATH_BYTES: u64 = 4096;

/// A call that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Its name, as in the manual.
    pub name: &'static str,
    /// The file, from the folder on; empty if it is about none.
    pub file: PathBuf,
    /// How many bytes it wants moved at least; 0 for one that moves none.
    pub amount: u64,
}

/// A call as its thread makes it, with its registers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entered {
    pub(super) thread: Pid,
    pub(super) registers: Registers,
    known: &'static (c_long, &'static str, Names, Amount),
}

impl Entered {
    /// The call that `thread` is about to make, if it is known here.
    pub(super) fn new(thread: Pid, registers: Registers) -> Option<Self> {
        let number = c_long::try_from(registers.orig_rax).ok()?;
        let known = KNOWN.iter().find(|known| known.0 == number)?;
        Some(Self {
            thread,
            registers,
            known,
        })
    }

    /// What it is, if its file is below `folder`, a socket or a userfaultfd, or if it is about none.
    pub(super) fn call(&self, folder: &Path) -> Option<Call> {
        if matches!(self.known.2, Nothing) {
            return Some(Call {
                name: self.known.1,
                file: PathBuf::new(),
                amount: 0,
            });
        }
        let file = self.file()?;
        let is = |kind| file.to_string_lossy().starts_with(kind);
        let (file, amount) = if is("anon_inode:[userfaultfd]") {
            // An event is never read in part.
            (Path::new("userfaultfd"), 0)
        } else if is("socket:[") {
            (Path::new("socket"), self.amount())
        } else {
            (file.strip_prefix(folder).ok()?, self.amount())
        };
        Some(Call {
            name: self.known.1,
            file: file.to_owned(),
            amount,
        })
    }

    fn file(&self) -> Option<PathBuf> {
        match self.known.2 {
            Descriptor(place) => self.descriptor(place),
            Named(place) => Some(self.current_folder()?.join(self.path(place)?)),
            At(place) => {
                let path = self.path(place + 1)?;
                if path.is_absolute() {
                    return Some(path);
                }
                Some(self.folder(place)?.join(path))
            }
            Nothing => None,
        }
    }

    fn folder(&self, place: usize) -> Option<PathBuf> {
        if as_int(self.argument(place)) == libc::AT_FDCWD {
            return self.current_folder();
        }
        self.descriptor(place)
    }

    fn descriptor(&self, place: usize) -> Option<PathBuf> {
        let number = as_int(self.argument(place));
        fs::read_link(format!("/proc/{}/fd/{number}", self.thread)).ok()
    }

    fn current_folder(&self) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/cwd", self.thread)).ok()
    }

    fn path(&self, place: usize) -> Option<PathBuf> {
        use std::os::unix::ffi::OsStringExt;
        let (mut path, mut at) = (Vec::new(), self.argument(place));
        let memory = self.memory(false)?;
        while !path.contains(&0) && at < self.argument(place).checked_add(PATH_BYTES)? {
            // The next page may not be there.
            let mut piece = [0; 64];
            let wanted = usize::try_from(64 - at % 64).ok()?;
            let got = memory.read_at(&mut piece[..wanted], at).ok()?;
            path.extend_from_slice(&piece[..got]);
            at = at.checked_add(u64::try_from(got).ok()?)?;
        }
        let end = path.iter().position(|byte| *byte == 0)?;
        path.truncate(end);
        Some(std::ffi::OsString::from_vec(path).into())
    }

    fn memory(&self, write: bool) -> Option<File> {
        let mut options = File::options();
        let path = format!("/proc/{}/mem", self.thread);
        options.read(true).write(write).open(path).ok()
    }

    /// Argument `place`, from 0.
    fn argument(&self, place: usize) -> u64 {
        let r = &self.registers;
        [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9][place]
    }

    fn set_argument(&mut self, place: usize, value: u64) {
        let r = &mut self.registers;
        let all = [
            &mut r.rdi, &mut r.rsi, &mut r.rdx, &mut r.r10, &mut r.r8, &mut r.r9,
        ];
        *all.into_iter().nth(place).unwrap() = value;
    }

    fn amount(&self) -> u64 {
        match self.known.3 {
            Amount::None => 0,
            Argument(place) => self.argument(place),
            Pieces => self.first_piece().unwrap_or(0),
        }
    }

    /// Address of the length of the first piece.
    fn first_length(&self) -> u64 {
        self.argument(1) + 8
    }

    fn first_piece(&self) -> Option<u64> {
        let mut length = [0; 8];
        let memory = self.memory(false)?;
        memory
            .read_exact_at(&mut length, self.first_length())
            .ok()?;
        Some(u64::from_ne_bytes(length))
    }

    /// Has the kernel do nothing, and say why. The registers are for the caller to set.
    pub(super) fn fail(&mut self, number: i32) {
        // A number that no call has.
        self.registers.orig_rax = u64::MAX;
        self.registers.rax = i64::from(number).wrapping_neg().cast_unsigned();
    }

    /// Has the kernel move half as many bytes. The registers are for the caller to set; what is changed in the thread's
    /// memory has to be put back after the call.
    pub(super) fn halve(&mut self) -> Option<Lent> {
        let half = self.amount() / 2;
        match self.known.3 {
            Amount::None => None,
            Argument(place) => {
                self.set_argument(place, half);
                None
            }
            Pieces => {
                let lent = Lent {
                    address: self.first_length(),
                    bytes: self.amount().to_ne_bytes(),
                };
                let memory = self.memory(true).unwrap();
                let written = memory.write_all_at(&half.to_ne_bytes(), lent.address);
                written.unwrap();
                self.set_argument(2, 1);
                Some(lent)
            }
        }
    }

    /// Puts back what was changed in the thread's memory.
    pub(super) fn put_back(&self, lent: Lent) {
        let memory = self.memory(true).unwrap();
        memory.write_all_at(&lent.bytes, lent.address).unwrap();
    }
}

/// What stood somewhere in a traced thread's memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lent {
    address: u64,
    bytes: [u8; 8],
}

/// The lower half of a register, as the kernel takes an argument that is an `int`.
fn as_int(register: u64) -> i32 {
    let [a, b, c, d, ..] = register.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}
