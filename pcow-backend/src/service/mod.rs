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
mod bounces;
mod channel;
mod cut;
mod handle;
mod leader;
mod low_space;
mod mappings;
mod origin;
mod preparer;
mod read_copies;
mod reclaim;
mod resolver;

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pcow_protocol::uffd::Uffd;
use pcow_protocol::wire::FaultFd;
use pcow_protocol::{Error, ErrorKind, Result};

use crate::control::events::Events;
use crate::disk::{Disk, FileKey};
use board::{Board, Touch};
use bounces::Bounces;
use channel::Channel;
use cut::Quiesces;
pub use cut::{Cut, CutTimes};
pub use handle::{Figures, Handle};
use leader::Leader;
use low_space::LowSpace;
use origin::{Origin, Origins};
use preparer::Preparer;
use read_copies::ReadCopies;
use reclaim::Reclaimer;

/// Threads that read and resolve. One leads, the others may all wait for a disk.
const CREW: usize = 4;

/// How often it is asked whether an address space is gone.
const ORPHANED_INTERVAL: Duration = Duration::from_millis(20);

/// Limits that the operator sets.
#[derive(Debug, Clone, Copy)]
pub struct Budgets {
    /// Bytes of read copies.
    pub cache_bytes: u64,
    /// Mappings in the frontend's process, if less than it allows.
    pub mappings: Option<u32>,
    /// Whether the virtual machine is stopped before the filesystem is full.
    pub stop_on_low_space: bool,
}

/// How often things happened since the session began.
#[derive(Debug, Default)]
pub struct Counters {
    /// Fault events that are loads.
    pub loads: AtomicU64,
    /// Fault events that are stores.
    pub stores: AtomicU64,
    /// Fault events that ask for write access and may be loads.
    pub unknown: AtomicU64,
    /// Requests of kernel workers for write access, and of those who cannot be seen.
    pub workers: AtomicU64,
    /// See `workers`.
    pub unclear: AtomicU64,
    /// Of the unknown ones, those that were bounced.
    pub bounced: AtomicU64,
    /// The ones that came again after a bounce, and were served as stores.
    pub second: AtomicU64,
    /// The ones that were served as stores at once.
    pub on_touch: AtomicU64,
    /// Bytes that became data for what may have been a load, and of those, what was given back.
    pub maybe_clean: AtomicU64,
    /// See `maybe_clean`.
    pub given_back: AtomicU64,
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

    fn add_fault(&self, touch: Touch) {
        Self::add(match touch {
            Touch::Load => &self.loads,
            Touch::Store { sure: true } => &self.stores,
            Touch::Store { sure: false } | Touch::Unknown { .. } => &self.unknown,
        });
        if touch == (Touch::Store { sure: false }) {
            Self::add(&self.on_touch);
        }
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
    bounces: Bounces,
    /// Whether the frontend carries out BOUNCE.
    may_bounce: bool,
    /// Whether it carries out RESET, QUIESCE, RESUME and CANCEL.
    may_quiesce: bool,
    quiesces: Quiesces,
    low_space: LowSpace,
    origins: Mutex<Origins>,
    told_of_workers: Once,
    told_of_strangers: Once,
    counters: Counters,
    reclaimer: Reclaimer,
    preparer: Preparer,
    /// Why the session ended, if not by the frontend's own wish.
    failure: Mutex<Option<Error>>,
    /// The frontend's process; 0 if it cannot be seen.
    process: u32,
    events: Arc<Events>,
    /// The main channel, shut down when the backend channel ends first.
    main: UnixStream,
}

impl Shared {
    /// Ends the session: the crew stops, and whoever reads the main channel sees its end.
    fn end(&self, failure: Option<Error>) {
        if let Some(failure) = failure {
            // The first reason counts.
            self.failure().get_or_insert(failure);
        }
        self.board.stop();
        self.channel.end();
        self.preparer.stop();
        self.bounces.stop();
        self.reclaimer.stop();
        self.quiesces.end();
        // It may be closed already, which is the wanted state.
        let _ = self.main.shutdown(std::net::Shutdown::Both);
    }

    /// Keeps room for one more run. The budget is overdrawn only if somebody is at work in every single run.
    fn make_room_for_a_run(&self) -> Result<()> {
        // Runs that were found busy come last, so after so many every one of them was.
        let mut tries = self.channel.run_count();
        while let Some(victim) = self.channel.keep_room(tries == 0) {
            tries -= 1;
            if let Some(_claim) = self.board.try_claim(victim.clone()) {
                self.channel.unmap(&victim)?;
                Counters::add(&self.counters.unmaps);
            }
        }
        Ok(())
    }

    fn failure(&self) -> MutexGuard<'_, Option<Error>> {
        // It is set as a whole.
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn origins(&self) -> MutexGuard<'_, Origins> {
        // A panic inside leaves an incomplete list at worst, which is listed again.
        self.origins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says once for each kind of `origin` what becomes of requests for write access that may be loads.
    fn tell_how_loads_are_known(&self, origin: Origin) {
        match origin {
            Origin::Storing => {}
            Origin::Worker => self.told_of_workers.call_once(|| {
                let how = if self.may_bounce {
                    "loads are told from stores by BOUNCE"
                } else {
                    "the frontend has no BOUNCE, so loads copy and allocate, too; what is only read is given back at the \
                     end. Exact without it: QEMU's -overcommit cpu-pm=on -cpu host,kvm-asyncpf=off,kvm-asyncpf-int=off"
                };
                log::info!("KVM's workers ask for write access even for a load: {how}");
            }),
            Origin::Unclear => self.told_of_strangers.call_once(|| {
                log::info!(
                    "somebody asks for write access who cannot be seen to be a thread of the frontend's (another PID \
                     namespace, hidepid, another process): if that is a worker of KVM's, loads copy and allocate, too; what \
                     is only read is given back at the end"
                );
            }),
        }
    }
}

/// The frontend that is to be served, as it presented itself.
#[derive(Debug)]
pub struct Peer {
    /// The main channel.
    pub main: UnixStream,
    /// The backend channel.
    pub channel: UnixStream,
    /// Its userfaultfd.
    pub uffd: Uffd,
    /// Its region.
    pub fault_fd: FaultFd,
    /// Whether it carries out BOUNCE.
    pub bounce: bool,
    /// Whether it carries out RESET and QUIESCE.
    pub quiesce: bool,
    /// Whether it carries out STOP.
    pub stop: bool,
    /// The process that connected; 0 if it is in a namespace that is not visible from here.
    pub process: u32,
}

/// A running fault service. Dropping it ends the session and gives the userfaultfd back.
#[derive(Debug)]
pub struct FaultService {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl FaultService {
    /// Starts to serve `disk` to `peer`; what operators should know is told to `events`.
    ///
    /// # Errors
    /// The frontend refused the disk's file, or there is no thread or descriptor left.
    pub fn start(
        disk: Arc<dyn Disk>,
        peer: Peer,
        budgets: Budgets,
        events: Arc<Events>,
    ) -> Result<Self> {
        let allowed = peer.fault_fd.mapping_limit;
        let limit = budgets.mappings.map_or(allowed, |m| m.min(allowed));
        let board = Board::new(disk.unit());
        let shared = Arc::new(Shared {
            base: peer.fault_fd.base,
            channel: Channel::new(peer.channel, limit)?,
            copies: ReadCopies::new(disk.unit(), budgets.cache_bytes),
            bounces: Bounces::new(disk.unit()),
            may_bounce: peer.bounce,
            may_quiesce: peer.quiesce,
            quiesces: Quiesces::default(),
            low_space: LowSpace::new(budgets.stop_on_low_space, peer.stop),
            origins: Mutex::new(Origins::new(peer.process)),
            told_of_workers: Once::new(),
            told_of_strangers: Once::new(),
            preparer: Preparer::new(Arc::clone(&board), Arc::clone(&disk)),
            reclaimer: Reclaimer::default(),
            board,
            uffd: peer.uffd,
            disk,
            counters: Counters::default(),
            failure: Mutex::default(),
            process: peer.process,
            events,
            main: peer.main,
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
        self.spawn("prepare".into(), move || shared.preparer.work())?;
        let shared = Arc::clone(&self.shared);
        self.spawn("give-back".into(), move || reclaim::work(&shared))?;
        if !self.shared.may_bounce {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        self.spawn("bounce".into(), move || {
            shared.bounces.work(|page| {
                if let Err(e) = shared.channel.end_bounce(page) {
                    shared.end((e.kind() != ErrorKind::Closed).then_some(e));
                }
            });
        })
    }

    fn spawn(&mut self, name: String, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(work)
            .map_err(|e| Error::io("start a thread", e))?;
        self.threads.push(thread);
        Ok(())
    }

    /// A way to reach the service, for as long as it runs.
    pub fn handle(&self) -> Handle {
        Handle::new(&self.shared)
    }

    /// Ends the service and waits for its threads.
    pub fn stop(mut self) -> Stopped {
        self.finish();
        Stopped(Arc::clone(&self.shared))
    }

    fn finish(&mut self) {
        self.shared.end(None);
        if self.threads.is_empty() {
            return; // done, or nothing has begun
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of the fault service panicked");
            }
        }
        // Nobody reads events here any more: what was read and not answered is raised again, for the next backend.
        let (base, size) = (self.shared.base, self.shared.disk.size());
        if let Err(e) = self.shared.uffd.wake(base, size) {
            log::debug!("{e}");
        }
    }
}

/// A service that has ended.
#[derive(Debug)]
pub struct Stopped(Arc<Shared>);

impl Stopped {
    /// Gives back what was only read, if the frontend's address space is gone within `patience`: mappings outlive a session,
    /// and a guest may go on storing through them.
    pub fn give_back(&self, patience: Duration) {
        let bytes = self.0.disk.maybe_clean_bytes();
        if bytes == 0 {
            return;
        }
        if self.is_orphaned(patience) {
            reclaim::give_back_unmapped(&self.0);
        } else {
            // The next frontend knows nothing of this one's mappings.
            self.0.disk.forget_maybe_clean();
            log::info!(
                "the frontend's memory is still there: {} KiB that it may only have read stay data",
                bytes >> 10
            );
        }
    }

    /// A process closes its sockets after it has left its address space, but others may keep that for a moment: a kernel
    /// worker, or who reads its files in /proc.
    fn is_orphaned(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let orphaned = self.0.uffd.is_orphaned(self.0.base, bounces::PAGE_BYTES);
            match orphaned {
                Ok(true) => return true,
                Ok(false) if Instant::now() < deadline => std::thread::sleep(ORPHANED_INTERVAL),
                Ok(false) => return false,
                Err(e) => {
                    log::warn!("{e}: nothing is given back");
                    return false;
                }
            }
        }
    }

    /// Logs what the session did.
    pub fn report(&self) {
        let c = &self.0.counters;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        log::info!(
            "session over: {} faults ({} reads, {} stores, {} of unknown direction), {} maps, {} unmaps, {} read copies, \
             {} evictions; {} runs mapped and {} KiB copied at the end",
            of(&c.loads) + of(&c.stores) + of(&c.unknown),
            of(&c.loads),
            of(&c.stores),
            of(&c.unknown),
            of(&c.maps),
            of(&c.unmaps),
            of(&c.copies),
            of(&c.evictions),
            self.0.channel.run_count(),
            self.0.copies.bytes() >> 10,
        );
        let cluster = self.0.disk.scope(0).end;
        log::info!(
            "loads and stores told apart: {}; unknown direction: {} bounced, {} taken for stores after a bounce, {} copied \
             on touch; {} clusters maybe clean, {} given back",
            handle::direction(c, self.0.may_bounce).name(),
            of(&c.bounced),
            of(&c.second),
            of(&c.on_touch),
            of(&c.maybe_clean) / cluster,
            of(&c.given_back) / cluster,
        );
    }

    /// Why the session ended, if not by the frontend's own wish. Told once.
    pub fn take_failure(&self) -> Option<Error> {
        self.0.failure().take()
    }
}

impl Drop for FaultService {
    fn drop(&mut self) {
        self.finish();
    }
}
