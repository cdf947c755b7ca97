// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One fault, from the look-up to its answer, inside its claim (F1).

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pcow_protocol::uffd::{CopyMode, CopyOutcome};
use pcow_protocol::wire::STOP_NO_SPACE;
use pcow_protocol::{Error, ErrorKind, Result};

use super::board::{Claim, Duty, Fault, Touch};
use super::bounces::PAGE_BYTES;
use super::channel::Mapped;
use super::leader::Leader;
use super::{Counters, Shared};
use crate::connection::{chain, with_advice};
use crate::control::events::Event;
use crate::disk::{Access, Answer, FileKey, Scratch};

/// About as long as a frontend needs to move a piece of trap.
const MOVE_PAUSE: Duration = Duration::from_micros(50);

/// The work of one thread of the crew, until the session ends.
pub(super) fn work(shared: &Shared, leader: &Leader) {
    let scope = |offset| shared.disk.scope(offset);
    let mut scratch = Scratch::default();
    loop {
        let job = match shared.board.next_duty(&scope) {
            Duty::Lead => leader.lead(),
            Duty::Resolve(fault, claim) => Some((fault, claim)),
            Duty::Stop => return,
        };
        if let Some((fault, claim)) = job {
            let mut resolver = Resolver {
                shared,
                fault,
                claim,
            };
            if let Err(e) = resolver.resolve(&mut scratch) {
                shared.end((e.kind() != ErrorKind::Closed).then_some(e));
            }
        }
    }
}

struct Resolver<'a> {
    shared: &'a Shared,
    fault: Fault,
    claim: Claim,
}

impl Resolver<'_> {
    fn resolve(&mut self, scratch: &mut Scratch) -> Result<()> {
        let s = self.shared;
        match s.channel.mapped(self.fault.offset) {
            Mapped::No => {}
            // The wake-up that comes with the mapping is still ahead of the waiting thread.
            Mapped::Ordered => return self.wake_companions(),
            // The event is older than the mapping; a wake-up too many does no harm.
            Mapped::Yes => return self.wake(),
        }
        let access = self.access();
        let answer = s
            .disk
            .resolve(self.fault.offset, access, &mut self.claim, scratch);
        match answer {
            Ok(Answer::Map { bytes, file, fresh }) => {
                if fresh && self.fault.touch != (Touch::Store { sure: true }) {
                    s.disk.note_maybe_clean(&bytes);
                    // Only ever read for display.
                    s.counters
                        .maybe_clean
                        .fetch_add(bytes.end - bytes.start, Ordering::Relaxed);
                }
                self.map(&bytes, file, access)?;
                self.look_at_space()
            }
            Ok(Answer::Copy(bytes)) => match self.fault.touch {
                Touch::Unknown {
                    worker,
                    present: true,
                } => self.bounce(worker, &bytes),
                _ => self.copy(&bytes, scratch),
            },
            Err(e) => {
                self.stall(&e);
                Ok(())
            }
        }
    }

    /// After the answer, which need not wait for it.
    fn look_at_space(&self) -> Result<()> {
        let s = self.shared;
        if !s.low_space.has_fallen(s.disk.as_ref()) {
            return Ok(());
        }
        log::warn!(
            "the filesystem is nearly full: the virtual machine is stopped; free space, then continue it"
        );
        s.events.tell(&Event::SpaceLow);
        s.channel.stop_machine(STOP_NO_SPACE)
    }

    /// What the fault is served as. The first request of workers for a page is bounced; one after its moment is a store.
    fn access(&self) -> Access {
        let s = self.shared;
        match self.fault.touch {
            Touch::Load => Access::Read,
            Touch::Store { .. } => Access::Write,
            // A page that is missing again has lost its read copy since.
            Touch::Unknown { present, .. } if present && s.bounces.is_store(self.fault.offset) => {
                Counters::add(&s.counters.second);
                Access::Write
            }
            Touch::Unknown { .. } => Access::Read,
        }
    }

    fn map(&mut self, bytes: &Range<u64>, file: FileKey, access: Access) -> Result<()> {
        let s = self.shared;
        s.make_room_for_a_run()?;
        if access == Access::Write {
            // Before the guest is woken: its next touch is another thread's, and must not be noted first.
            s.preparer.allocated(bytes);
        }
        s.channel
            .map(s.disk.as_ref(), file, bytes, self.fault.offset)?;
        Counters::add(&s.counters.maps);
        self.resolved();
        self.wake_companions()
    }

    fn copy(&mut self, bytes: &Range<u64>, scratch: &mut Scratch) -> Result<()> {
        let s = self.shared;
        if !self.admit(bytes)? {
            return Ok(());
        }
        let buf = &mut scratch.copy;
        buf.resize(usize_of(bytes.end - bytes.start), 0);
        if let Err(e) = s.disk.read(bytes.start, buf) {
            s.copies.cancel(bytes.start);
            self.stall(&e);
            return Ok(());
        }
        if !self.install(bytes.start, buf)? {
            s.copies.cancel(bytes.start);
            return Ok(());
        }
        Counters::add(&s.counters.copies);
        self.resolved();
        match self.fault.touch {
            Touch::Unknown { worker, .. } => self.bounce(worker, bytes),
            _ => self.wake_companions(),
        }
    }

    /// Lets the worker's request for write access fail, so that its vCPU comes back by itself, and wakes everybody else
    /// who waits in `bytes`.
    fn bounce(&self, worker: u32, bytes: &Range<u64>) -> Result<()> {
        let s = self.shared;
        let page = self.fault.offset / PAGE_BYTES * PAGE_BYTES;
        let after = page + PAGE_BYTES;
        for others in [bytes.start..page, after..bytes.end] {
            if !others.is_empty() {
                s.uffd
                    .wake(s.base + others.start, others.end - others.start)?;
            }
        }
        let worker = s.origins().worker(worker);
        let Some(worker) = worker else {
            // It is gone, and so is what it waited for.
            return s.uffd.wake(s.base + page, PAGE_BYTES);
        };
        Counters::add(&s.counters.bounced);
        let moment = s.bounces.begin(page, worker);
        s.channel.bounce(page)?;
        s.bounces.watch(moment);
        Ok(())
    }

    /// Waits until there is room for the read copy; false if the session ends first.
    fn admit(&self, bytes: &Range<u64>) -> Result<bool> {
        let s = self.shared;
        while !s.copies.admit(bytes.start) {
            self.evict_some()?;
            s.copies.wait();
            if s.board.is_stopping() {
                return Ok(false);
            }
            if s.board.is_held() {
                // Nothing can be evicted now, and who holds the board waits for this claim.
                s.board.post(self.fault);
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn evict_some(&self) -> Result<()> {
        let s = self.shared;
        for victim in s.copies.victims() {
            if let Some(_claim) = s.board.try_claim(victim.clone()) {
                s.channel.evict(&victim)?;
                s.bounces.forget(&victim);
                Counters::add(&s.counters.evictions);
            } else {
                s.copies.stays(&victim);
            }
        }
        Ok(())
    }

    /// Puts the bytes of `buf` at `start`; false if the place must be looked up again or the peer is gone.
    fn install(&self, start: u64, buf: &[u8]) -> Result<bool> {
        let s = self.shared;
        let mode = CopyMode {
            write_protect: !s.disk.read_only(),
            dont_wake: matches!(self.fault.touch, Touch::Unknown { .. }),
        };
        let mut done = 0;
        let mut skipped = false;
        let mut most = buf.len();
        while done < buf.len() {
            let to = s.base + start + u64_of(done);
            let end = buf.len().min(done + most);
            match s.uffd.copy(to, &buf[done..end], mode)? {
                CopyOutcome::Done => done = end,
                CopyOutcome::Partial(bytes) => done += usize_of(bytes),
                // That page came with an earlier copy that was cut short; whoever waits for it is woken below.
                CopyOutcome::Exists => {
                    done += usize_of(PAGE_BYTES);
                    skipped = true;
                }
                // What was read may be stale by now (F3): the fault comes again with all its consequences, after the
                // frontend's move had time to end. Without the pause the tries would keep the processor from it.
                CopyOutcome::Again => {
                    std::thread::sleep(MOVE_PAUSE);
                    s.board.post(self.fault);
                    return Ok(false);
                }
                CopyOutcome::NoMemory => self.evict_some()?,
                // A page of it has a moment: that is a mapping of its own, and no copy crosses its edges (F3).
                CopyOutcome::NoEntry if most > usize_of(PAGE_BYTES) => most = usize_of(PAGE_BYTES),
                CopyOutcome::NoEntry => {
                    return Err(Error::io(
                        "copy outside of the trap",
                        rustix::io::Errno::NOENT,
                    ));
                }
                CopyOutcome::Gone => {
                    return Err(Error::new(ErrorKind::Closed, "the frontend's memory"));
                }
            }
            if s.board.is_stopping() {
                return Ok(false);
            }
        }
        if skipped && !mode.dont_wake {
            self.wake()?;
        }
        Ok(true)
    }

    /// Faults of one unit are parked as one. Read-only, an answer may cover a part of the unit only: whoever waits in the
    /// rest of it must report again.
    fn wake_companions(&self) -> Result<()> {
        if self.shared.disk.read_only() {
            self.wake()
        } else {
            Ok(())
        }
    }

    fn wake(&self) -> Result<()> {
        let s = self.shared;
        let unit = s.disk.unit();
        let start = self.fault.offset / unit * unit;
        s.uffd.wake(s.base + start, unit)
    }

    /// The guest waits: never wrong bytes, never an error that it cannot handle.
    fn stall(&self, error: &pcow_format::Error) {
        let s = self.shared;
        if s.board.stall(self.fault) {
            let offset = self.fault.offset;
            let told = with_advice(error);
            log::error!("the guest waits at offset {offset:#x}: {told}");
            s.events.tell(&Event::GuestWaits {
                no_space: error.kind() == pcow_format::ErrorKind::NoSpace,
                reason: chain(error),
            });
        }
        if error.kind() == pcow_format::ErrorKind::NoSpace {
            s.reclaimer.request();
        }
        // The leader polls without a time limit unless it knows that something is stalled.
        s.channel.kick();
    }

    fn resolved(&self) {
        if self.shared.board.recovered(self.fault.offset) {
            self.shared.events.tell(&Event::GuestGoesOn);
            log::warn!(
                "the guest goes on: what it waited for at offset {:#x} is there",
                self.fault.offset
            );
        }
    }
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a piece of at most one unit fits the address space")
}

fn u64_of(bytes: usize) -> u64 {
    u64::try_from(bytes).expect("usize is at most 64 bits")
}
