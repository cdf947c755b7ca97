// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mapping thread: carries out the backend channel's requests, one after the other, in their order.
//!
//! It touches no guest memory and waits for nobody who may (F6). A request costs one receive, its own system calls, and a
//! reply only where one was asked for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::StopReason;
use super::attach::Notifier;
use super::bounce::Bounces;
use super::kept::Kept;
use super::link::Link;
use super::region::{FileMode, GuestRegion, try_scratch};
use super::watch::MoveGuard;
use crate::codec::{Connection, Received};
use crate::error::{Chain, Error, ErrorKind, Result};
use crate::message::{BackendReply, BackendRequest, RegionRange, Status};
use crate::session::{MappingAction, Mappings, Refusal};
use crate::wire::{Code, Quiesce};

/// Done, or the errno that the backend hears.
type Outcome = std::result::Result<(), Errno>;

/// How often the backend asked for what, since the frontend exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappingCounts {
    /// MAP requests carried out.
    pub maps: u64,
    /// UNMAP requests carried out.
    pub unmaps: u64,
    /// EVICT requests carried out.
    pub evicts: u64,
    /// BOUNCE requests carried out.
    pub bounces: u64,
    /// BOUNCE requests that were answered with `EBUSY`.
    pub refused_bounces: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    maps: AtomicU64,
    unmaps: AtomicU64,
    evicts: AtomicU64,
    bounces: AtomicU64,
    refused_bounces: AtomicU64,
}

impl Counters {
    pub(super) fn snapshot(&self) -> MappingCounts {
        MappingCounts {
            maps: self.maps.load(Ordering::Relaxed),
            unmaps: self.unmaps.load(Ordering::Relaxed),
            evicts: self.evicts.load(Ordering::Relaxed),
            bounces: self.bounces.load(Ordering::Relaxed),
            refused_bounces: self.refused_bounces.load(Ordering::Relaxed),
        }
    }
}

/// The region as the mapping thread changes it, and between two sessions the keeping thread.
#[derive(Clone, Debug)]
pub(super) struct Surface {
    pub region: Arc<GuestRegion>,
    pub kept: Arc<Kept>,
    pub moves: MoveGuard,
    pub bounces: Arc<Bounces>,
    /// Where a STOP goes; without it the feature is not offered.
    pub stop: Option<Sender<StopReason>>,
    pub counters: Arc<Counters>,
}

impl Surface {
    /// MAP, then wake. A mapping that fails is turned into trap again before anybody hears of it.
    fn map(
        &self,
        file: BorrowedFd<'_>,
        mode: FileMode,
        file_offset: u64,
        range: RegionRange,
    ) -> Outcome {
        self.counters.maps.fetch_add(1, Ordering::Relaxed);
        self.bounces.end_within(range);
        let mapped = self.region.map(file, mode, file_offset, range);
        if mapped.is_err() {
            // The outcome is the mapping's own; `restore` aborts if guest memory is left with a hole.
            let _ = self.restore(range);
        }
        self.wake(range);
        mapped
    }

    /// UNMAP, then wake.
    fn unmap(&self, range: RegionRange) -> Outcome {
        self.counters.unmaps.fetch_add(1, Ordering::Relaxed);
        let restored = self.restore(range);
        self.wake(range);
        // Looked at afterwards: I/O that begins now meets the trap, and what had begun before has ended or is seen.
        match restored {
            Ok(()) if self.bounces.has_io() => Err(Errno::BUSY),
            other => other,
        }
    }

    /// RESET, then wake.
    fn reset(&self) -> Outcome {
        self.unmap(self.region.whole())
    }

    /// The same between two sessions.
    pub(super) fn start_anew(&self) -> Result<()> {
        self.bounces.end_all();
        self.moves
            .alone(|| self.region.restore_trap(self.region.whole()))?;
        // A fault that an old backend has read and not answered is raised again.
        self.region.wake_all()
    }

    /// EVICT; nobody waits for a page that is there, so nobody is woken.
    fn evict(&self, range: RegionRange) -> Outcome {
        self.counters.evicts.fetch_add(1, Ordering::Relaxed);
        self.region.evict(range)
    }

    /// BOUNCE: the moment begins, and who waits is woken in it.
    fn bounce(&self, page: RegionRange) -> Outcome {
        let opened = self.bounces.open(page);
        let counter = if opened.is_ok() {
            &self.counters.bounces
        } else {
            &self.counters.refused_bounces
        };
        counter.fetch_add(1, Ordering::Relaxed);
        opened
    }

    /// STOP. Sending never waits (F6).
    fn stop_machine(&self, reason: StopReason) {
        log::warn!("the backend wants the virtual machine stopped: {reason:?}");
        if let Some(stop) = &self.stop
            && stop.send(reason).is_err()
        {
            log::warn!("nobody listens to that");
        }
    }

    /// Makes the range trap again, or leaves it as it was.
    ///
    /// Aborts the process if it did neither: where nothing is mapped a guest dies in silence, or another mapping of this
    /// process takes the place and the guest writes into that.
    fn restore(&self, range: RegionRange) -> Outcome {
        // All, since the move may wait for the backend.
        self.bounces.end_all();
        let restored = self.moves.during(|| self.region.restore_trap(range));
        let Err(error) = restored else {
            return Ok(());
        };
        log::error!("cannot make {range:?} a trap again: {}", Chain(&error));
        if self.region.has_hole(range) {
            log::error!("guest memory has a hole at {range:?}; aborting");
            std::process::abort();
        }
        Err(error.errno().map_or(Errno::NOMEM, Errno::from_raw_os_error))
    }

    fn wake(&self, range: RegionRange) {
        if let Err(error) = self.region.wake(range) {
            log::error!("cannot wake {range:?}: {}", Chain(&error));
        }
    }
}

/// What the mapping thread of one session works with.
#[derive(Debug)]
pub(super) struct Mapper {
    pub channel: Connection<BackendRequest>,
    pub mappings: Mappings<OwnedFd>,
    pub notifier: Arc<Notifier>,
    /// The thread that waits for I/O to end.
    pub drainer: Option<JoinHandle<()>>,
    pub surface: Surface,
}

impl Mapper {
    /// Starts the thread; it ends with the session.
    pub(super) fn start(self, link: Arc<Link>) -> Result<JoinHandle<()>> {
        std::thread::Builder::new()
            .name("pcow-mapper".into())
            .spawn(move || self.run(&link))
            .map_err(|e| Error::io("start the mapping thread", e))
    }

    fn run(mut self, link: &Link) {
        let ended = loop {
            if let Err(error) = self.serve_one() {
                break error;
            }
        };
        self.surface.bounces.end_all();
        link.end(ended.to_string());
        // The end of the session is a CANCEL.
        self.surface.bounces.gate().release_any();
        if let Some(drainer) = self.drainer.take() {
            join_drainer(drainer);
        }
    }

    /// The next request. While a moment is open, waits no longer than it may last.
    fn receive(&mut self) -> Result<Received<BackendRequest>> {
        while let Some(until) = self.surface.bounces.end_late() {
            match self.channel.recv_until(until) {
                Err(error) if error.kind() == ErrorKind::TimedOut => {}
                other => return other,
            }
        }
        self.channel.recv()
    }

    fn serve_one(&mut self) -> Result<()> {
        let received = self.receive()?;
        let code = received.message.code();
        let reply_wanted = received.reply_wanted;
        let (status, violation) = match self.carry_out(received) {
            Ok(()) => (Status::OK, None),
            Err(Refusal::Status(status)) => (status, None),
            Err(Refusal::Violation(violation)) => {
                (Status::from_errno(libc::EINVAL), Some(violation))
            }
        };
        if reply_wanted {
            self.channel
                .send(&BackendReply { code, status }.encode(), &[])?;
        }
        violation.map_or(Ok(()), |v| {
            Err(Error::violation(format!("serve {}", code.name()), v))
        })
    }

    fn carry_out(
        &mut self,
        received: Received<BackendRequest>,
    ) -> std::result::Result<(), Refusal> {
        let Received {
            message,
            reply_wanted,
            mut fds,
        } = received;
        let surface = &self.surface;
        let gate = surface.bounces.gate();
        let done = match self.mappings.request(&message, reply_wanted)? {
            MappingAction::Register(register) => {
                let file = fds
                    .pop()
                    .expect("the codec delivers REGISTER_FD with one descriptor");
                let mode = FileMode {
                    writable: register.writable(),
                    sync: register.sync(),
                };
                try_scratch(file.as_fd(), mode).map(|()| self.mappings.insert(&register, file))
            }
            MappingAction::Forgotten(file) => {
                drop(file);
                Ok(())
            }
            MappingAction::Map {
                file,
                sync,
                file_offset,
                range,
                writable,
            } => surface.map(
                file.as_fd(),
                FileMode { writable, sync },
                file_offset,
                range,
            ),
            MappingAction::Unmap(range) => surface.unmap(range),
            MappingAction::Evict(range) => surface.evict(range),
            MappingAction::Bounce(page) => surface.bounce(page),
            MappingAction::BounceEnd(page) => {
                surface.bounces.end(page);
                Ok(())
            }
            MappingAction::Reset => {
                let outcome = surface.reset();
                if matches!(outcome, Ok(()) | Err(Errno::BUSY)) {
                    self.mappings.forget_all();
                }
                outcome
            }
            MappingAction::Quiesce(quiesce) => self.quiesce(&quiesce),
            MappingAction::Resume(resume) => {
                if gate.release(resume.id) {
                    surface.kept.note_layer(resume.layer);
                }
                Ok(())
            }
            MappingAction::Cancel(id) => {
                gate.release(id);
                Ok(())
            }
            MappingAction::Stop(reason) => {
                surface.stop_machine(reason.into());
                Ok(())
            }
        };
        done.map_err(|errno| Refusal::Status(Status::from_errno(errno.raw_os_error())))
    }

    /// Begins to hold I/O; a thread waits for what is under way, so that MAP can go on.
    fn quiesce(&mut self, quiesce: &Quiesce) -> Outcome {
        if let Some(drainer) = self.drainer.take_if(|drainer| drainer.is_finished()) {
            join_drainer(drainer);
        }
        if self.drainer.is_some() {
            return Err(Errno::BUSY); // of a quiesce that was cancelled, and about to end
        }
        let draining = self.surface.bounces.gate().hold(quiesce.id)?;
        let deadline = Instant::now() + Duration::from_millis(quiesce.deadline_ms.into());
        let (bounces, id) = (Arc::clone(&self.surface.bounces), quiesce.id);
        let notifier = Arc::clone(&self.notifier);
        let drain = move || {
            let Some(outcome) = bounces.gate().drain(draining, deadline) else {
                return;
            };
            let errno = outcome.err().map(Errno::raw_os_error);
            let status = errno.map_or(Status::OK, Status::from_errno);
            if let Err(error) = notifier.quiesced(id, status) {
                log::debug!("cannot answer a quiesce: {}", Chain(&error));
            }
        };
        let thread = std::thread::Builder::new().name("pcow-quiesce".into());
        match thread.spawn(drain) {
            Ok(drainer) => self.drainer = Some(drainer),
            Err(_) => {
                self.surface.bounces.gate().release(id);
                return Err(Errno::AGAIN);
            }
        }
        Ok(())
    }
}

fn join_drainer(drainer: JoinHandle<()>) {
    if drainer.join().is_err() {
        log::error!("the draining thread panicked");
    }
}
