// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault service of one session: every touch of a place that is not mapped becomes an event here, and leaves as a
//! mapping or a read copy.
//!
//! ```text
//! userfaultfd ──▶ leader ──▶ board ──▶ resolver ──▶ disk (look up, reserve, copy, commit)
//!                   ▲                     │
//!     answers ──────┘                     ├──▶ channel: MAP, UNMAP, EVICT, in order
//!                                         └──▶ userfaultfd: read copies
//! ```

pub mod board;
mod channel;
mod leader;
mod mappings;
mod preparer;
mod read_copies;
mod resolver;

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use pcow_protocol::uffd::Uffd;
use pcow_protocol::wire::FaultFd;
use pcow_protocol::{Error, Result};

use crate::disk::{Disk, FileKey};
use board::Board;
use channel::Channel;
use leader::Leader;
use preparer::Preparer;
use read_copies::ReadCopies;

/// Threads that read and resolve. One leads, the others may all wait for a disk.
const CREW: usize = 4;

/// Limits that the operator sets.
#[derive(Debug, Clone, Copy)]
pub struct Budgets {
    /// Bytes of read copies.
    pub cache_bytes: u64,
    /// Mappings in the frontend's process, if less than it allows.
    pub mappings: Option<u32>,
}

/// How often things happened since the session began.
#[derive(Debug, Default)]
pub struct Counters {
    /// Fault events read.
    pub faults: AtomicU64,
    /// MAPs sent.
    pub maps: AtomicU64,
    /// Read copies made.
    pub copies: AtomicU64,
    /// Read copies evicted.
    pub evictions: AtomicU64,
    /// Runs unmapped for the budget.
    pub unmaps: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64) {
        // Only ever read for display.
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the threads of one session share.
#[derive(Debug)]
struct Shared {
    disk: Arc<dyn Disk>,
    base: u64,
    uffd: Uffd,
    board: Arc<Board>,
    channel: Channel,
    copies: ReadCopies,
    counters: Counters,
    preparer: Preparer,
    /// Why the session ended, if not by the frontend's own wish.
    failure: OnceLock<Error>,
    /// The main channel, shut down when the backend channel ends first.
    main: UnixStream,
}

impl Shared {
    /// Ends the session: the crew stops, and whoever reads the main channel sees its end.
    fn end(&self, failure: Option<Error>) {
        if let Some(failure) = failure {
            // The first reason counts.
            let _ = self.failure.set(failure);
        }
        self.board.stop();
        self.channel.kick();
        self.preparer.stop();
        // It may be closed already, which is the wanted state.
        let _ = self.main.shutdown(std::net::Shutdown::Both);
    }
}

/// A running fault service. Dropping it ends the session and gives the userfaultfd back.
#[derive(Debug)]
pub struct FaultService {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl FaultService {
    /// Starts to serve `disk` to the frontend behind `main` and `channel`, whose region `fault_fd` describes.
    ///
    /// # Errors
    /// The frontend refused the disk's file, or there is no thread or descriptor left.
    pub fn start(
        disk: Arc<dyn Disk>,
        main: UnixStream,
        channel: UnixStream,
        (uffd, fault_fd): (Uffd, FaultFd),
        budgets: Budgets,
    ) -> Result<Self> {
        let limit = budgets
            .mappings
            .map_or(fault_fd.mapping_limit, |m| m.min(fault_fd.mapping_limit));
        let board = Board::new(disk.unit());
        let shared = Arc::new(Shared {
            base: fault_fd.base,
            channel: Channel::new(channel, limit)?,
            copies: ReadCopies::new(disk.unit(), budgets.cache_bytes),
            preparer: Preparer::new(Arc::clone(&board), Arc::clone(&disk)),
            board,
            uffd,
            disk,
            counters: Counters::default(),
            failure: OnceLock::new(),
            main,
        });
        let leader = Leader::new(Arc::clone(&shared))?;
        if !shared.disk.read_only() {
            // Before the first fault: a file that cannot be mapped as it must be is an error now, not then.
            leader.register_and_wait(FileKey::Active)?;
        }
        let mut service = Self {
            shared,
            threads: Vec::new(),
        };
        service.spawn_all(&Arc::new(leader))?;
        Ok(service)
    }

    fn spawn_all(&mut self, leader: &Arc<Leader>) -> Result<()> {
        for i in 0..CREW {
            let (shared, leader) = (Arc::clone(&self.shared), Arc::clone(leader));
            self.spawn(format!("fault-{i}"), move || {
                resolver::work(&shared, &leader)
            })?;
        }
        let shared = Arc::clone(&self.shared);
        self.spawn("prepare".into(), move || shared.preparer.work())
    }

    fn spawn(&mut self, name: String, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(work)
            .map_err(|e| Error::io("start a thread", e))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Ends the service and waits for its threads; says why it ended, if it was not the frontend's own wish.
    pub fn stop(mut self) -> Option<Error> {
        self.finish();
        let c = &self.shared.counters;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        log::info!(
            "session over: {} faults, {} maps, {} unmaps, {} read copies, {} evictions; {} runs mapped and {} KiB copied at the end",
            of(&c.faults),
            of(&c.maps),
            of(&c.unmaps),
            of(&c.copies),
            of(&c.evictions),
            self.shared.channel.run_count(),
            self.shared.copies.bytes() >> 10,
        );
        Arc::get_mut(&mut self.shared).and_then(|s| s.failure.take())
    }

    fn finish(&mut self) {
        self.shared.end(None);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of the fault service panicked");
            }
        }
    }
}

impl Drop for FaultService {
    fn drop(&mut self) {
        self.finish();
    }
}
