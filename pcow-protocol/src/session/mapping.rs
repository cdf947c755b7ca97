// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a frontend does with each request of the backend channel: the slots, and the limits that a backend must keep.
//!
//! Knows no memory and no socket; `F` is what stands for a file (a descriptor, or nothing in a table test).

use crate::error::Violation;
use crate::message::{BackendRequest, Map, RegionRange, Status};
use crate::wire::{
    BackendCode, Code, FEATURE_BOUNCE, FEATURE_QUIESCE, FEATURE_RESET, FEATURE_STOP, Quiesce,
    Register, Resume,
};

/// How many slots there are.
const SLOTS: usize = 256;

/// What the frontend has to do now.
#[derive(Debug, PartialEq, Eq)]
pub enum MappingAction<'a, F> {
    /// The slot is free: try the descriptor at a scratch address, then [`Mappings::insert`] it.
    Register(Register),
    /// Nothing more: the slot is empty now.
    Forgotten(F),
    /// Map a piece of this file, then wake.
    Map {
        /// The slot's file.
        file: &'a F,
        /// With `MAP_SYNC`.
        sync: bool,
        /// Bytes from the file's start.
        file_offset: u64,
        /// Where in the region.
        range: RegionRange,
        /// For stores too.
        writable: bool,
    },
    /// Make this a trap again, then wake.
    Unmap(RegionRange),
    /// Drop read copies.
    Evict(RegionRange),
    /// Make this page read-only, then wake.
    Bounce(RegionRange),
    /// End that, then wake.
    BounceEnd(RegionRange),
    /// Make the whole region a trap; when that is done, [`Mappings::forget_all`]; then wake.
    Reset,
    /// Begin to drain and hold I/O, in another thread.
    Quiesce(Quiesce),
    /// Let I/O go on if it is held for this id, and remember the active layer.
    Resume(Resume),
    /// Let I/O go on if it is held for this id.
    Cancel(u64),
    /// Stop the virtual machine for this reason.
    Stop(u32),
}

/// Why a request is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Answer with this status and go on.
    Status(Status),
    /// Answer with `EINVAL` if an answer was asked for, and end the session.
    Violation(Violation),
}

impl From<Violation> for Refusal {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

#[derive(Debug)]
struct Slot<F> {
    file: F,
    writable: bool,
    sync: bool,
    length: u64,
}

/// What the requests of a session are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Bytes of the region.
    pub region_size: u64,
    /// Whether every writable slot is refused.
    pub read_only: bool,
    /// Bytes of a page.
    pub page_size: u64,
    /// The optional features that were agreed on.
    pub features: u64,
}

/// The slots of a session, and the rules for its requests.
#[derive(Debug)]
pub struct Mappings<F> {
    slots: Vec<Option<Slot<F>>>,
    rules: Rules,
    /// The id of the last QUIESCE.
    last_quiesce: u64,
}

impl<F> Mappings<F> {
    /// No slot is in use yet.
    pub fn new(rules: Rules) -> Self {
        let slots = std::iter::repeat_with(|| None).take(SLOTS).collect();
        Self {
            slots,
            rules,
            last_quiesce: 0,
        }
    }

    /// Decides what to do with a request.
    ///
    /// # Errors
    /// A [`Refusal`]: nothing of the request may be carried out.
    pub fn request(
        &mut self,
        request: &BackendRequest,
        reply_wanted: bool,
    ) -> Result<MappingAction<'_, F>, Refusal> {
        let code = request.code();
        if self.rules.features & feature_of(code) != feature_of(code) {
            return Err(Violation::UnknownRequest(code.number()).into());
        }
        if code.must_ask() && !reply_wanted {
            return Err(Violation::ReplyNotWanted(code.name()).into());
        }
        match request {
            BackendRequest::RegisterFd(register) => self.register(register),
            BackendRequest::ForgetFd(slot) => self.forget(*slot),
            BackendRequest::Map(map) => self.map(map),
            BackendRequest::Unmap(range) => Ok(MappingAction::Unmap(self.checked(*range)?)),
            BackendRequest::Evict(range) => Ok(MappingAction::Evict(self.checked(*range)?)),
            BackendRequest::Bounce(page) => Ok(MappingAction::Bounce(self.bounced(code, *page)?)),
            BackendRequest::BounceEnd(page) => {
                Ok(MappingAction::BounceEnd(self.bounced(code, *page)?))
            }
            BackendRequest::Reset => Ok(MappingAction::Reset),
            BackendRequest::Quiesce(quiesce) => self.quiesce(quiesce),
            BackendRequest::Resume(resume) => Ok(MappingAction::Resume(*resume)),
            BackendRequest::Cancel(id) => Ok(MappingAction::Cancel(*id)),
            BackendRequest::Stop(reason) => Ok(MappingAction::Stop(*reason)),
        }
    }

    /// Empties all slots, after a RESET.
    pub fn forget_all(&mut self) {
        self.slots.fill_with(|| None);
    }

    /// Fills the slot of a [`MappingAction::Register`] whose descriptor has proved itself.
    pub fn insert(&mut self, register: &Register, file: F) {
        let slot = Slot {
            file,
            writable: register.writable(),
            sync: register.sync(),
            length: register.length,
        };
        let index = usize::try_from(register.slot).expect("the slot was checked");
        self.slots[index] = Some(slot);
    }

    fn register(&self, register: &Register) -> Result<MappingAction<'_, F>, Refusal> {
        let index = slot_index(register.slot)?;
        if register.length == 0 || !register.length.is_multiple_of(self.rules.page_size) {
            return Err(Violation::OutOfRange("register.length").into());
        }
        if register.writable() && self.rules.read_only {
            return Err(Violation::OutOfRange("register.flags").into());
        }
        if self.slots[usize::from(index)].is_some() {
            return Err(Refusal::Status(Status::from_errno(libc::EEXIST)));
        }
        Ok(MappingAction::Register(*register))
    }

    fn forget(&mut self, slot: u32) -> Result<MappingAction<'_, F>, Refusal> {
        let index = slot_index(slot)?;
        match self.slots[usize::from(index)].take() {
            Some(slot) => Ok(MappingAction::Forgotten(slot.file)),
            None => Err(Refusal::Status(Status::from_errno(libc::ENOENT))),
        }
    }

    fn map(&self, map: &Map) -> Result<MappingAction<'_, F>, Refusal> {
        let range = self.checked(map.range)?;
        let slot = self.slots[usize::from(map.slot)].as_ref();
        let slot = slot.ok_or(Violation::OutOfRange("mmap.shmid"))?;
        let end = map
            .file_offset
            .checked_add(range.len)
            .filter(|end| *end <= slot.length);
        if end.is_none() || !map.file_offset.is_multiple_of(self.rules.page_size) {
            return Err(Violation::OutOfRange("mmap.fd_offset").into());
        }
        if map.writable && !slot.writable {
            return Err(Violation::OutOfRange("mmap.flags").into());
        }
        Ok(MappingAction::Map {
            file: &slot.file,
            sync: slot.sync,
            file_offset: map.file_offset,
            range,
            writable: map.writable,
        })
    }

    fn quiesce(&mut self, quiesce: &Quiesce) -> Result<MappingAction<'_, F>, Refusal> {
        if quiesce.id <= self.last_quiesce {
            return Err(Violation::OutOfRange("quiesce.id").into());
        }
        self.last_quiesce = quiesce.id;
        Ok(MappingAction::Quiesce(*quiesce))
    }

    /// One page. Nothing of a read-only region is ever stored to.
    fn bounced(&self, code: BackendCode, page: RegionRange) -> Result<RegionRange, Violation> {
        if self.rules.read_only {
            return Err(Violation::UnknownRequest(code.number()));
        }
        if page.len != self.rules.page_size {
            return Err(Violation::OutOfRange("mmap.len"));
        }
        self.checked(page)
    }

    /// A range of whole pages inside the region.
    fn checked(&self, range: RegionRange) -> Result<RegionRange, Violation> {
        let whole = range.offset.is_multiple_of(self.rules.page_size)
            && range.len.is_multiple_of(self.rules.page_size)
            && range.len != 0;
        match range
            .end()
            .filter(|end| whole && *end <= self.rules.region_size)
        {
            Some(_) => Ok(range),
            None => Err(Violation::OutOfRange("mmap range")),
        }
    }
}

/// The features that a request needs.
fn feature_of(code: BackendCode) -> u64 {
    match code {
        BackendCode::Bounce | BackendCode::BounceEnd => FEATURE_BOUNCE,
        BackendCode::Reset => FEATURE_RESET,
        BackendCode::Quiesce | BackendCode::Resume | BackendCode::Cancel => FEATURE_QUIESCE,
        BackendCode::Stop => FEATURE_STOP,
        BackendCode::RegisterFd
        | BackendCode::ForgetFd
        | BackendCode::Map
        | BackendCode::Unmap
        | BackendCode::Evict => 0,
    }
}

fn slot_index(slot: u32) -> Result<u8, Violation> {
    u8::try_from(slot).map_err(|_| Violation::OutOfRange("register.slot"))
}
