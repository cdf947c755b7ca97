// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The least that a fault can cost with pcow's division of work, to compare with: this process has the memory and a
//! thread that maps, another one reads the event and sends eight bytes. No look-up, no image, no bookkeeping, no answer.
//!
//! ```text
//! touch ──▶ userfaultfd ──▶ handler process ──▶ (copy 64 KiB) ──▶ socket ──▶ mapping thread: mmap, wake
//! ```

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use pcow_protocol::uffd::{Event, EventBuffer, Uffd};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::CLUSTER;

/// First argument of the handler process.
pub const HANDLER: &str = "floor-handler";

/// Memory whose every cluster is mapped from a file at its first touch, by the shortest way.
#[derive(Debug)]
pub struct Floor {
    memory: Arc<Trap>,
    handler: Child,
    mapper: Option<JoinHandle<()>>,
}

impl Floor {
    /// Over the file `target` of `bytes` bytes; with `base`, each cluster is copied from there first.
    pub fn start(target: &Path, base: Option<&Path>, bytes: u64) -> Self {
        let memory = Arc::new(Trap::new(usize::try_from(bytes).unwrap()));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let uffd = memory.uffd.as_fd().try_clone_to_owned().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([HANDLER, &memory.base().to_string()])
            .arg(target)
            .args(base)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::from(uffd));
        let handler = command.spawn().unwrap();
        // The command's copy of the socket is the handler's alone, or its end would not be seen.
        drop(command);
        let file = open(target);
        let trap = Arc::clone(&memory);
        let mapper = std::thread::spawn(move || trap.map_on_demand(&file, ours));
        Self {
            memory,
            handler,
            mapper: Some(mapper),
        }
    }

    /// Stores into the cluster at `offset`.
    pub fn touch(&self, offset: u64) {
        self.memory.word(offset).store(1, Ordering::Relaxed);
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.handler.kill().unwrap();
        self.handler.wait().unwrap();
        self.mapper.take().map(JoinHandle::join);
    }
}

/// The handler process: its standard input is the socket, its standard output the userfaultfd.
pub fn handle(arguments: &[String]) {
    let base_address: u64 = arguments[0].parse().unwrap();
    let target = open(Path::new(&arguments[1]));
    let base = arguments.get(2).map(|path| open(Path::new(path)));
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut socket = UnixStream::from(stdin);
    let stdout = std::io::stdout().as_fd().try_clone_to_owned().unwrap();
    let uffd = Uffd::from_peer(stdout).unwrap();
    // Waiting in the read saves a poll.
    rustix::io::ioctl_fionbio(uffd.as_fd(), false).unwrap();
    let mut events = EventBuffer::default();
    let mut buffer = vec![0; usize::try_from(CLUSTER).unwrap()];
    loop {
        for event in uffd.read_events(&mut events).unwrap() {
            let Event::Fault { address, .. } = event else {
                continue;
            };
            let offset = (address - base_address) / CLUSTER * CLUSTER;
            if let Some(base) = &base {
                base.read_exact_at(&mut buffer, offset).unwrap();
                target.write_all_at(&buffer, offset).unwrap();
            }
            socket.write_all(&offset.to_ne_bytes()).unwrap();
        }
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Anonymous memory registered with a userfaultfd.
#[derive(Debug)]
struct Trap {
    uffd: Uffd,
    address: usize,
    bytes: usize,
}

impl Trap {
    fn new(bytes: usize) -> Self {
        let uffd = Uffd::create(None).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is given, so the kernel takes a free one; nothing that exists is replaced.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, flags) }.unwrap();
        let trap = Self {
            uffd,
            address: start.expose_provenance(),
            bytes,
        };
        trap.uffd
            .register(trap.base(), u64::try_from(bytes).unwrap())
            .unwrap();
        trap
    }

    fn base(&self) -> u64 {
        u64::try_from(self.address).unwrap()
    }

    /// The mapping thread: until the handler is gone.
    fn map_on_demand(&self, file: &File, mut socket: UnixStream) {
        let mut raw = [0; 8];
        let length = usize::try_from(CLUSTER).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        while socket.read_exact(&mut raw).is_ok() {
            let offset = u64::from_ne_bytes(raw);
            let place = usize::try_from(offset).unwrap();
            assert!(place + length <= self.bytes);
            let address = std::ptr::with_exposed_provenance_mut(self.address + place);
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: the assertion keeps the range inside of the trap, which is only accessed through atomics.
            unsafe { mmap(address, length, access, flags, file, offset) }.unwrap();
            self.uffd.wake(self.base() + offset, CLUSTER).unwrap();
        }
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        let offset = usize::try_from(offset).unwrap();
        assert!(offset + 8 <= self.bytes && offset.is_multiple_of(8));
        let address = std::ptr::with_exposed_provenance_mut(self.address + offset);
        // SAFETY: inside of the trap (asserted), which is mapped for as long as `self`; aligned; only ever accessed so.
        unsafe { AtomicU64::from_ptr(address) }
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        let address = std::ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: the range was mapped by `new`, and nothing refers to it any more.
        unsafe { munmap(address, self.bytes) }.unwrap();
    }
}
