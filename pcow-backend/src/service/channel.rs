// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The backend channel with what the service knows of the frontend's side: slots, mapped runs, answers to come.
//!
//! What is noted here and what is sent change together under one lock, so that the notes are in the order of the
//! channel, which is the order in which the frontend acts.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pcow_format::medium::Domain;
use pcow_protocol::codec::{Outbox, Sent};
use pcow_protocol::message::{BackendReply, BackendRequest, Map, RegionRange};
use pcow_protocol::wire::{Quiesce, REGISTER_SYNC, REGISTER_WRITABLE, Register, Resume};
use pcow_protocol::{Error, ErrorKind, Result};
use rustix::event::{EventfdFlags, eventfd};

use super::bounces::PAGE_BYTES;
use super::mappings::Mappings;
use crate::disk::{Disk, FileKey};

const SLOTS: usize = 256;

/// What an answer of the frontend speaks of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// A file was registered or forgotten.
    Slot,
    /// These bytes were mapped.
    Mapped(Range<u64>),
    /// A run was unmapped.
    Unmapped,
    /// A read copy was evicted.
    Evicted,
    /// The moment of the page at this offset was opened.
    Bounced(u64),
    /// The whole region became trap.
    Reset,
    /// Device I/O is being drained.
    Quiescing,
}

#[derive(Debug)]
struct Notes {
    mappings: Mappings,
    /// Files by slot, with the most recently used last.
    slots: VecDeque<(u8, FileKey)>,
    /// MAPs that the frontend has not confirmed yet.
    unconfirmed: Vec<Range<u64>>,
    /// How many UNMAPs were sent, and how many of them answered, in this order.
    unmaps: (u64, u64),
    /// The UNMAPs that somebody waits for, by their number, and how they were answered.
    awaited: HashMap<u64, Option<Unmapped>>,
    /// How the last RESET and the last QUIESCE were answered: an errno, or 0.
    reset: Option<i32>,
    quiescing: Option<i32>,
    over: bool,
}

/// The sending side of one session's backend channel.
#[derive(Debug)]
pub struct Channel {
    outbox: Outbox<Asked>,
    notes: Mutex<Notes>,
    answered: Condvar,
    kick: std::os::fd::OwnedFd,
}

impl Channel {
    /// A channel over `socket` to a frontend that allows `mapping_limit` mappings.
    ///
    /// # Errors
    /// `Io` if there is no descriptor left.
    pub fn new(socket: UnixStream, mapping_limit: u32) -> Result<Self> {
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("create an eventfd", e))?;
        Ok(Self {
            outbox: Outbox::new(socket),
            notes: Mutex::new(Notes {
                mappings: Mappings::new(mapping_limit),
                slots: VecDeque::new(),
                unconfirmed: Vec::new(),
                unmaps: (0, 0),
                awaited: HashMap::new(),
                reset: None,
                quiescing: None,
                over: false,
            }),
            answered: Condvar::new(),
            kick,
        })
    }

    /// The socket.
    pub fn socket(&self) -> &UnixStream {
        self.outbox.socket()
    }

    /// Becomes readable when [`Channel::kick`] was called.
    pub fn kicked(&self) -> impl AsFd + '_ {
        &self.kick
    }

    /// Makes the leader look again.
    pub fn kick(&self) {
        // The counter cannot overflow; and an eventfd that is readable already does its work.
        let _ = rustix::io::write(&self.kick, &1_u64.to_ne_bytes());
    }

    /// Takes a kick back.
    pub fn clear_kick(&self) {
        // EAGAIN: somebody else was faster.
        let _ = rustix::io::read(&self.kick, &mut [0; 8]);
    }

    /// Whether messages wait for the socket to take them.
    pub fn is_waiting(&self) -> bool {
        self.outbox.is_waiting()
    }

    /// Sends what waits.
    ///
    /// # Errors
    /// The session is over.
    pub fn flush(&self) -> Result<()> {
        self.outbox.flush().map(drop)
    }

    /// Whether the byte at `offset` is mapped, and whether the frontend has confirmed that.
    pub fn mapped(&self, offset: u64) -> Mapped {
        let notes = self.notes();
        if !notes.mappings.covers(offset) {
            Mapped::No
        } else if notes.unconfirmed.iter().any(|r| r.contains(&offset)) {
            Mapped::Ordered
        } else {
            Mapped::Yes
        }
    }

    /// Orders the part of `bytes` around `offset` that is not mapped yet to be mapped.
    ///
    /// # Errors
    /// The session is over.
    pub fn map(
        &self,
        disk: &dyn Disk,
        file: FileKey,
        bytes: &Range<u64>,
        offset: u64,
    ) -> Result<()> {
        let mut notes = self.notes();
        let slot = self.slot(&mut notes, disk, file)?;
        let gap = notes.mappings.gap_around(offset, bytes);
        notes.mappings.insert(gap.clone(), file);
        notes.unconfirmed.push(gap.clone());
        let request = BackendRequest::Map(Map {
            slot,
            file_offset: gap.start,
            range: region_range(&gap),
            writable: !disk.read_only(),
        });
        self.send(&request, None, Asked::Mapped(gap))
    }

    /// Keeps room for one more run, which the caller's order to map, or to unmap and wait, then uses. Returns the run that
    /// must go before if the budget is used up and `may_overdraw` is not set.
    pub fn keep_room(&self, may_overdraw: bool) -> Option<Range<u64>> {
        let mut notes = self.notes();
        let is_full = notes.mappings.is_full() && !may_overdraw;
        let victim = is_full.then(|| notes.mappings.victim()).flatten();
        if victim.is_none() {
            notes.mappings.keep_room();
        }
        victim
    }

    /// Orders `bytes`, which the caller has claimed, to become trap again.
    ///
    /// # Errors
    /// The session is over.
    pub fn unmap(&self, bytes: &Range<u64>) -> Result<()> {
        let mut notes = self.notes();
        notes.mappings.remove(bytes);
        self.order_unmap(&mut notes, bytes)
    }

    fn order_unmap(&self, notes: &mut Notes, bytes: &Range<u64>) -> Result<()> {
        notes.unmaps.0 += 1;
        let request = BackendRequest::Unmap(region_range(bytes));
        self.send(&request, None, Asked::Unmapped)
    }

    /// As [`Channel::unmap`], of what may be in the middle of a run (see [`Channel::keep_room`]), and waits for the frontend's
    /// answer.
    ///
    /// # Errors
    /// The session is over.
    pub fn unmap_and_wait(&self, bytes: &Range<u64>, patience: Duration) -> Result<Unmapped> {
        let mut notes = self.notes();
        notes.mappings.remove_part(bytes);
        self.order_unmap(&mut notes, bytes)?;
        let mine = notes.unmaps.0;
        notes.awaited.insert(mine, None);
        let unanswered = |n: &mut Notes| n.awaited.get(&mine) == Some(&None) && !n.over;
        let waited = self
            .answered
            .wait_timeout_while(notes, patience, unanswered);
        let (mut notes, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let answer = notes.awaited.remove(&mine).flatten();
        Ok(answer.unwrap_or(Unmapped::Unknown))
    }

    /// The session is over: nobody waits any longer.
    pub fn end(&self) {
        self.notes().over = true;
        self.answered.notify_all();
        self.kick();
    }

    /// Orders the whole region, in which nobody is at work, to become trap, and waits for the errno that the frontend
    /// answers, 0 for success; `None` if none comes in time.
    ///
    /// # Errors
    /// The session is over.
    pub fn reset_and_wait(&self, patience: Duration) -> Result<Option<i32>> {
        let mut notes = self.notes();
        notes.reset = None;
        self.send(&BackendRequest::Reset, None, Asked::Reset)?;
        self.wait_for(notes, patience, |n| n.reset)
    }

    /// Orders device I/O to be drained and held, and waits for what the frontend says to that, as above.
    ///
    /// # Errors
    /// The session is over.
    pub fn quiesce_and_wait(
        &self,
        id: u64,
        deadline_ms: u32,
        patience: Duration,
    ) -> Result<Option<i32>> {
        let mut notes = self.notes();
        notes.quiescing = None;
        let request = BackendRequest::Quiesce(Quiesce {
            id,
            deadline_ms,
            reserved: 0,
        });
        self.send(&request, None, Asked::Quiescing)?;
        self.wait_for(notes, patience, |n| n.quiescing)
    }

    fn wait_for(
        &self,
        notes: MutexGuard<'_, Notes>,
        patience: Duration,
        answer: impl Fn(&Notes) -> Option<i32>,
    ) -> Result<Option<i32>> {
        let unanswered = |n: &mut Notes| answer(n).is_none() && !n.over;
        let waited = self
            .answered
            .wait_timeout_while(notes, patience, unanswered);
        let (notes, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if notes.over && answer(&notes).is_none() {
            return Err(Error::new(ErrorKind::Closed, "wait for the frontend"));
        }
        Ok(answer(&notes))
    }

    /// Lets device I/O go on, and tells the frontend which layer is active. Waits for no answer.
    ///
    /// # Errors
    /// The session is over.
    pub fn resume(&self, id: u64, layer: [u8; 16]) -> Result<()> {
        self.tell(&BackendRequest::Resume(Resume { id, layer }))
    }

    /// Lets device I/O go on. Waits for no answer.
    ///
    /// # Errors
    /// The session is over.
    pub fn cancel(&self, id: u64) -> Result<()> {
        self.tell(&BackendRequest::Cancel(id))
    }

    /// Has the virtual machine stopped. Waits for no answer.
    ///
    /// # Errors
    /// The session is over.
    pub fn stop_machine(&self, reason: u32) -> Result<()> {
        self.tell(&BackendRequest::Stop(reason))
    }

    /// Orders a moment of the page at `offset`.
    ///
    /// # Errors
    /// The session is over.
    pub fn bounce(&self, offset: u64) -> Result<()> {
        let page = page_at(offset);
        self.send(
            &BackendRequest::Bounce(page),
            None,
            Asked::Bounced(page.offset),
        )
    }

    /// Orders the end of that moment.
    ///
    /// # Errors
    /// The session is over.
    pub fn end_bounce(&self, offset: u64) -> Result<()> {
        self.tell(&BackendRequest::BounceEnd(page_at(offset)))
    }

    fn tell(&self, request: &BackendRequest) -> Result<()> {
        if self.outbox.send(request, None, None)? == Sent::Later {
            self.kick();
        }
        Ok(())
    }

    /// Orders the read copies in `bytes`, which the caller has claimed, to be given up.
    ///
    /// # Errors
    /// The session is over.
    pub fn evict(&self, bytes: &Range<u64>) -> Result<()> {
        // The lock keeps the order between what is noted and what is sent, as everywhere here.
        let _notes = self.notes();
        self.send(
            &BackendRequest::Evict(region_range(bytes)),
            None,
            Asked::Evicted,
        )
    }

    /// Registers `file` ahead of its first use.
    ///
    /// # Errors
    /// The session is over.
    pub fn register(&self, disk: &dyn Disk, file: FileKey) -> Result<()> {
        self.slot(&mut self.notes(), disk, file).map(drop)
    }

    /// What `reply` answers.
    ///
    /// # Errors
    /// It answers nothing: the session is over.
    pub fn answered(&self, reply: &BackendReply) -> Result<Asked> {
        let asked = self.outbox.answered(reply)?;
        match asked {
            Asked::Unmapped => self.unmap_answered(reply.status.errno()),
            Asked::Reset => self.reset_answered(reply.status.errno()),
            Asked::Quiescing => {
                self.notes().quiescing = Some(reply.status.errno().unwrap_or(0));
                self.answered.notify_all();
            }
            _ => {}
        }
        if let Asked::Mapped(bytes) = &asked {
            let mut notes = self.notes();
            // Answers come in the order of the requests.
            if let Some(i) = notes.unconfirmed.iter().position(|r| r == bytes) {
                notes.unconfirmed.remove(i);
            }
            if reply.status.errno().is_some() {
                // The frontend has put the trap back, so the next touch is a fault again.
                notes.mappings.remove(bytes);
                notes.mappings.shrink_budget();
            }
        }
        Ok(asked)
    }

    /// Answers come in the order of the requests. A refusal leaves the mapping as it was, and is the end of the session.
    fn unmap_answered(&self, errno: Option<i32>) {
        let mut notes = self.notes();
        notes.unmaps.1 += 1;
        let number = notes.unmaps.1;
        if let Some(answer) = notes.awaited.get_mut(&number) {
            *answer = match errno {
                None => Some(Unmapped::Quiet),
                Some(libc::EBUSY) => Some(Unmapped::Busy),
                Some(_) => Some(Unmapped::Unknown),
            };
        }
        self.answered.notify_all();
    }

    /// `EBUSY` says that it was carried out all the same. What was ordered before is answered already.
    fn reset_answered(&self, errno: Option<i32>) {
        let mut notes = self.notes();
        if matches!(errno, None | Some(libc::EBUSY)) {
            notes.mappings.remove(&(0..u64::MAX));
            notes.slots.clear();
        }
        notes.reset = Some(errno.unwrap_or(0));
        self.answered.notify_all();
    }

    /// How many runs are mapped.
    pub fn run_count(&self) -> usize {
        self.notes().mappings.count()
    }

    fn slot(&self, notes: &mut Notes, disk: &dyn Disk, file: FileKey) -> Result<u8> {
        if let Some(i) = notes.slots.iter().position(|(_, f)| *f == file) {
            let used = notes.slots.remove(i).unwrap_or((0, file));
            notes.slots.push_back(used);
            return Ok(used.0);
        }
        let slot = self.free_slot(notes)?;
        let source = disk.file(file);
        // What was promised of a writable image is not asked again: a frontend that cannot have it refuses the file.
        let sync = if disk.read_only() {
            source.domain().is_ok_and(|d| d == Domain::Dax)
        } else {
            disk.is_dax()
        };
        let mut flags = if sync { REGISTER_SYNC } else { 0 };
        if !disk.read_only() {
            flags |= REGISTER_WRITABLE;
        }
        let fd = source
            .as_real()
            .ok_or_else(|| Error::new(ErrorKind::Io, "the image is not on a real filesystem"))?;
        let register = Register {
            slot: slot.into(),
            flags,
            length: disk.mappable_bytes(file),
        };
        self.send(&BackendRequest::RegisterFd(register), Some(fd), Asked::Slot)?;
        notes.slots.push_back((slot, file));
        Ok(slot)
    }

    fn free_slot(&self, notes: &mut Notes) -> Result<u8> {
        if notes.slots.len() < SLOTS {
            return u8::try_from(notes.slots.len())
                .map_err(|e| Error::io("choose a slot", std::io::Error::other(e)));
        }
        let (slot, _) = notes.slots.pop_front().unwrap_or((0, FileKey::Active));
        self.send(&BackendRequest::ForgetFd(slot.into()), None, Asked::Slot)?;
        Ok(slot)
    }

    fn send(
        &self,
        request: &BackendRequest,
        fd: Option<&std::fs::File>,
        asked: Asked,
    ) -> Result<()> {
        if self
            .outbox
            .send(request, fd.map(AsFd::as_fd), Some(asked))?
            == Sent::Later
        {
            self.kick();
        }
        Ok(())
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        // A panic between noting and sending ends the process's session anyway.
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of an UNMAP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmapped {
    /// Nobody can store into the pages that were there any more.
    Quiet,
    /// It is trap again, but device I/O may still have the pages that were there.
    Busy,
    /// It may not be trap.
    Unknown,
}

/// Whether a place is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapped {
    /// No.
    No,
    /// MAP was sent; its wake-up is still to come.
    Ordered,
    /// Yes.
    Yes,
}

fn page_at(offset: u64) -> RegionRange {
    RegionRange {
        offset: offset / PAGE_BYTES * PAGE_BYTES,
        len: PAGE_BYTES,
    }
}

fn region_range(bytes: &Range<u64>) -> RegionRange {
    RegionRange {
        offset: bytes.start,
        len: bytes.end - bytes.start,
    }
}
