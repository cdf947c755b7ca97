// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages as values: requests and replies of both channels, to bytes and from bytes.
//!
//! Decoding checks what can be seen without knowing the session: version, flags, number, size, reserved fields. What a
//! message means in a session is in [`crate::session`]; file descriptors are in [`crate::codec`].

use std::fmt;

use vm_memory::ByteValued;

use crate::error::Violation;
use crate::wire::{
    self, BackendCode, Cancel, Code, FLAG_NEED_REPLY, FLAG_REPLY, FLAG_RESERVED, FLAG_VERSION_MASK,
    FaultFd, FrontendCode, Header, Held, MAX_MESSAGE, Quiesce, Quiesced, Region, Register, Reset,
    Resume, Stop, VERSION, VhostUserMMap, VhostUserU64,
};

const HEADER: usize = size_of::<Header>();

/// The bytes of one message, ready to send.
#[derive(Clone, Copy)]
pub struct Frame {
    bytes: [u8; MAX_MESSAGE],
    len: usize,
}

impl Frame {
    fn new(request: u32, flags: u32, payload: &[u8]) -> Self {
        let size = u32::try_from(payload.len()).expect("payloads are at most MAX_PAYLOAD bytes");
        let header = Header {
            request,
            flags: VERSION | flags,
            size,
        };
        let mut bytes = [0; MAX_MESSAGE];
        let len = HEADER + payload.len();
        bytes[..HEADER].copy_from_slice(header.as_slice());
        bytes[HEADER..len].copy_from_slice(payload);
        Self { bytes, len }
    }

    fn request<C: Code>(code: C, reply_wanted: bool, payload: &[u8]) -> Self {
        let flags = if reply_wanted { FLAG_NEED_REPLY } else { 0 };
        Self::new(code.number(), flags, payload)
    }

    fn reply<C: Code>(code: C, payload: &[u8]) -> Self {
        Self::new(code.number(), FLAG_REPLY, payload)
    }

    /// Header and payload.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Frame").field(&self.as_bytes()).finish()
    }
}

/// The outcome of a request: 0, or a Linux errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(u64);

impl Status {
    /// Done.
    pub const OK: Self = Self(0);

    /// Not done, because of `errno` (positive).
    pub fn from_errno(errno: i32) -> Self {
        let errno = u64::try_from(errno).ok().filter(|errno| *errno != 0);
        Self(errno.unwrap_or(libc::EIO.unsigned_abs().into()))
    }

    /// Why the request was not done; `None` if it was. A number that is no errno counts as `EIO`.
    pub fn errno(self) -> Option<i32> {
        (self != Self::OK).then(|| i32::try_from(self.0).unwrap_or(libc::EIO))
    }
}

/// A piece of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionRange {
    /// Bytes from the region's start.
    pub offset: u64,
    /// Bytes; a MAP, UNMAP or EVICT of 0 bytes is refused.
    pub len: u64,
}

impl RegionRange {
    /// The first byte after the range; `None` if that is no u64.
    pub fn end(self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }
}

/// A MAP request: a piece of a slot's file, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// The slot of the file.
    pub slot: u8,
    /// Bytes from the file's start.
    pub file_offset: u64,
    /// Where in the region.
    pub range: RegionRange,
    /// Map for stores too.
    pub writable: bool,
}

/// A request of the frontend, on the main channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontendRequest {
    /// GET_FEATURES.
    GetFeatures,
    /// SET_FEATURES.
    SetFeatures(u64),
    /// GET_PROTOCOL_FEATURES.
    GetProtocolFeatures,
    /// SET_PROTOCOL_FEATURES.
    SetProtocolFeatures(u64),
    /// SET_BACKEND_REQ_FD; the channel's end is its file descriptor.
    SetBackendReqFd,
    /// GET_REGION.
    GetRegion,
    /// SET_FAULT_FD; the userfaultfd is its file descriptor.
    SetFaultFd(FaultFd),
    /// HAND_BACK; the lock is its file descriptor.
    HandBack(Held),
    /// FLUSH.
    Flush,
    /// QUIESCED.
    Quiesced(Quiesced),
}

impl FrontendRequest {
    /// The request's number.
    pub fn code(&self) -> FrontendCode {
        match self {
            Self::GetFeatures => FrontendCode::GetFeatures,
            Self::SetFeatures(_) => FrontendCode::SetFeatures,
            Self::GetProtocolFeatures => FrontendCode::GetProtocolFeatures,
            Self::SetProtocolFeatures(_) => FrontendCode::SetProtocolFeatures,
            Self::SetBackendReqFd => FrontendCode::SetBackendReqFd,
            Self::GetRegion => FrontendCode::GetRegion,
            Self::SetFaultFd(_) => FrontendCode::SetFaultFd,
            Self::HandBack(_) => FrontendCode::HandBack,
            Self::Flush => FrontendCode::Flush,
            Self::Quiesced(_) => FrontendCode::Quiesced,
        }
    }

    /// The request's bytes; `reply_wanted` sets header bit 3.
    pub fn encode(&self, reply_wanted: bool) -> Frame {
        let frame = |payload: &[u8]| Frame::request(self.code(), reply_wanted, payload);
        match self {
            Self::SetFeatures(bits) | Self::SetProtocolFeatures(bits) => {
                frame(VhostUserU64::new(*bits).as_slice())
            }
            Self::SetFaultFd(fault_fd) => frame(fault_fd.as_slice()),
            Self::HandBack(held) => frame(held.as_slice()),
            Self::Quiesced(quiesced) => frame(quiesced.as_slice()),
            Self::GetFeatures
            | Self::GetProtocolFeatures
            | Self::SetBackendReqFd
            | Self::GetRegion
            | Self::Flush => frame(&[]),
        }
    }
}

/// The backend's reply to a request of the main channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontendReply {
    /// Feature bits: the reply to GET_FEATURES and GET_PROTOCOL_FEATURES.
    Features(FrontendCode, u64),
    /// The reply to GET_REGION; its file descriptors are the lock and the userfaultfd device, as its flags say.
    Region(Region),
    /// The outcome of any other request.
    Status(FrontendCode, Status),
}

impl FrontendReply {
    /// The number of the request that this answers.
    pub fn code(&self) -> FrontendCode {
        match self {
            Self::Features(code, _) | Self::Status(code, _) => *code,
            Self::Region(_) => FrontendCode::GetRegion,
        }
    }

    /// The reply's bytes.
    pub fn encode(&self) -> Frame {
        match self {
            Self::Features(code, bits) => Frame::reply(*code, VhostUserU64::new(*bits).as_slice()),
            Self::Region(region) => Frame::reply(FrontendCode::GetRegion, region.as_slice()),
            Self::Status(code, status) => {
                Frame::reply(*code, VhostUserU64::new(status.0).as_slice())
            }
        }
    }
}

/// A request of the backend, on the backend channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendRequest {
    /// REGISTER_FD; the file is its file descriptor.
    RegisterFd(Register),
    /// FORGET_FD of this slot.
    ForgetFd(u32),
    /// MAP.
    Map(Map),
    /// UNMAP.
    Unmap(RegionRange),
    /// EVICT.
    Evict(RegionRange),
    /// BOUNCE.
    Bounce(RegionRange),
    /// BOUNCE_END.
    BounceEnd(RegionRange),
    /// RESET.
    Reset,
    /// QUIESCE.
    Quiesce(Quiesce),
    /// RESUME.
    Resume(Resume),
    /// CANCEL of the QUIESCE with this id.
    Cancel(u64),
    /// STOP for this reason.
    Stop(u32),
}

impl BackendRequest {
    /// The request's number.
    pub fn code(&self) -> BackendCode {
        match self {
            Self::RegisterFd(_) => BackendCode::RegisterFd,
            Self::ForgetFd(_) => BackendCode::ForgetFd,
            Self::Map(_) => BackendCode::Map,
            Self::Unmap(_) => BackendCode::Unmap,
            Self::Evict(_) => BackendCode::Evict,
            Self::Bounce(_) => BackendCode::Bounce,
            Self::BounceEnd(_) => BackendCode::BounceEnd,
            Self::Reset => BackendCode::Reset,
            Self::Quiesce(_) => BackendCode::Quiesce,
            Self::Resume(_) => BackendCode::Resume,
            Self::Cancel(_) => BackendCode::Cancel,
            Self::Stop(_) => BackendCode::Stop,
        }
    }

    /// The request's bytes; `reply_wanted` sets header bit 3.
    pub fn encode(&self, reply_wanted: bool) -> Frame {
        let frame = |payload: &[u8]| Frame::request(self.code(), reply_wanted, payload);
        match self {
            Self::RegisterFd(register) => frame(register.as_slice()),
            Self::ForgetFd(slot) => frame(
                Register {
                    slot: *slot,
                    ..Register::default()
                }
                .as_slice(),
            ),
            Self::Map(map) => frame(mmap_of_map(map).as_slice()),
            Self::Unmap(range)
            | Self::Evict(range)
            | Self::Bounce(range)
            | Self::BounceEnd(range) => frame(mmap_of_range(*range).as_slice()),
            Self::Reset => frame(Reset::default().as_slice()),
            Self::Quiesce(quiesce) => frame(quiesce.as_slice()),
            Self::Resume(resume) => frame(resume.as_slice()),
            Self::Cancel(id) => frame(Cancel { id: *id }.as_slice()),
            Self::Stop(reason) => frame(
                Stop {
                    reason: *reason,
                    reserved: 0,
                }
                .as_slice(),
            ),
        }
    }
}

/// The frontend's reply to a request of the backend channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendReply {
    /// The number of the request that this answers.
    pub code: BackendCode,
    /// Its outcome.
    pub status: Status,
}

impl BackendReply {
    /// The reply's bytes.
    pub fn encode(&self) -> Frame {
        Frame::reply(self.code, VhostUserU64::new(self.status.0).as_slice())
    }
}

/// What may arrive at one end of one channel.
pub trait Incoming: Sized {
    /// The request numbers of the channel.
    type Code: Code;

    /// Checks a header before anything of its payload is read.
    ///
    /// Returns the code and the bytes of payload that follow.
    ///
    /// # Errors
    /// A wrong version, flag, number or size, or a reply for a request (or the reverse).
    fn check_header(header: &Header) -> Result<(Self::Code, usize), Violation>;

    /// Decodes a payload of exactly the size that [`Incoming::check_header`] returned.
    ///
    /// # Errors
    /// A reserved field that is not zero.
    fn decode(code: Self::Code, payload: &[u8]) -> Result<Self, Violation>;

    /// File descriptors that belong to this message.
    fn fd_count(&self) -> usize;
}

impl Incoming for FrontendRequest {
    type Code = FrontendCode;

    fn check_header(header: &Header) -> Result<(FrontendCode, usize), Violation> {
        check_request(header)
    }

    fn decode(code: FrontendCode, payload: &[u8]) -> Result<Self, Violation> {
        Ok(match code {
            FrontendCode::GetFeatures => Self::GetFeatures,
            FrontendCode::SetFeatures => Self::SetFeatures(u64_of(payload)),
            FrontendCode::GetProtocolFeatures => Self::GetProtocolFeatures,
            FrontendCode::SetProtocolFeatures => Self::SetProtocolFeatures(u64_of(payload)),
            FrontendCode::SetBackendReqFd => Self::SetBackendReqFd,
            FrontendCode::GetRegion => Self::GetRegion,
            FrontendCode::SetFaultFd => Self::SetFaultFd(decode_fault_fd(payload)?),
            FrontendCode::HandBack => Self::HandBack(decode_held(payload)?),
            FrontendCode::Flush => Self::Flush,
            FrontendCode::Quiesced => Self::Quiesced(decode_quiesced(payload)?),
        })
    }

    fn fd_count(&self) -> usize {
        self.code().request_fds()
    }
}

impl Incoming for FrontendReply {
    type Code = FrontendCode;

    fn check_header(header: &Header) -> Result<(FrontendCode, usize), Violation> {
        check_reply(header)
    }

    fn decode(code: FrontendCode, payload: &[u8]) -> Result<Self, Violation> {
        Ok(match code {
            FrontendCode::GetRegion => Self::Region(decode_region(payload)?),
            FrontendCode::GetFeatures | FrontendCode::GetProtocolFeatures => {
                Self::Features(code, u64_of(payload))
            }
            _ => Self::Status(code, Status(u64_of(payload))),
        })
    }

    fn fd_count(&self) -> usize {
        match self {
            Self::Region(region) => region_fd_count(region),
            Self::Features(..) | Self::Status(..) => 0,
        }
    }
}

impl Incoming for BackendRequest {
    type Code = BackendCode;

    fn check_header(header: &Header) -> Result<(BackendCode, usize), Violation> {
        check_request(header)
    }

    fn decode(code: BackendCode, payload: &[u8]) -> Result<Self, Violation> {
        Ok(match code {
            BackendCode::RegisterFd => Self::RegisterFd(decode_register(payload)?),
            BackendCode::ForgetFd => Self::ForgetFd(decode_forget(payload)?),
            BackendCode::Map => Self::Map(decode_map(payload)?),
            BackendCode::Unmap => Self::Unmap(decode_range(payload)?),
            BackendCode::Evict => Self::Evict(decode_range(payload)?),
            BackendCode::Bounce => Self::Bounce(decode_range(payload)?),
            BackendCode::BounceEnd => Self::BounceEnd(decode_range(payload)?),
            BackendCode::Reset => decode_reset(payload)?,
            BackendCode::Quiesce => Self::Quiesce(decode_quiesce(payload)?),
            BackendCode::Resume => Self::Resume(value_of(payload)),
            BackendCode::Cancel => Self::Cancel(value_of::<Cancel>(payload).id),
            BackendCode::Stop => Self::Stop(decode_stop(payload)?),
        })
    }

    fn fd_count(&self) -> usize {
        self.code().request_fds()
    }
}

impl Incoming for BackendReply {
    type Code = BackendCode;

    fn check_header(header: &Header) -> Result<(BackendCode, usize), Violation> {
        check_reply(header)
    }

    fn decode(code: BackendCode, payload: &[u8]) -> Result<Self, Violation> {
        Ok(Self {
            code,
            status: Status(u64_of(payload)),
        })
    }

    fn fd_count(&self) -> usize {
        0
    }
}

/// How many file descriptors the flags of a region announce.
pub fn region_fd_count(region: &Region) -> usize {
    usize::from(region.flags & wire::REGION_LOCK != 0)
        + usize::from(region.flags & wire::REGION_UFFD_DEVICE != 0)
}

fn check_request<C: Code>(header: &Header) -> Result<(C, usize), Violation> {
    let code = check_flags(header)?;
    if header.flags & FLAG_REPLY != 0 {
        return Err(Violation::UnexpectedReply(header.request));
    }
    check_size(header, code, C::request(code))
}

fn check_reply<C: Code>(header: &Header) -> Result<(C, usize), Violation> {
    let code = check_flags(header)?;
    if header.flags & FLAG_REPLY == 0 {
        return Err(Violation::NotAReply(header.request));
    }
    if header.flags & FLAG_NEED_REPLY != 0 {
        return Err(Violation::Flags(header.flags));
    }
    check_size(header, code, C::reply(code))
}

fn check_flags<C: Code>(header: &Header) -> Result<C, Violation> {
    let version = header.flags & FLAG_VERSION_MASK;
    if version != VERSION {
        return Err(Violation::Version(version));
    }
    if header.flags & FLAG_RESERVED != 0 {
        return Err(Violation::Flags(header.flags));
    }
    C::from_number(header.request).ok_or(Violation::UnknownRequest(header.request))
}

fn check_size<C: Code>(
    header: &Header,
    code: C,
    layout: wire::Layout,
) -> Result<(C, usize), Violation> {
    let expected = layout.size();
    if header.size != expected {
        return Err(Violation::Size {
            name: code.name(),
            size: header.size,
            expected,
        });
    }
    let size = usize::try_from(expected).map_err(|_| Violation::OutOfRange("size"))?;
    Ok((code, size))
}

/// Copies a payload whose size was checked against `T` by its layout.
fn value_of<T: ByteValued + Default>(payload: &[u8]) -> T {
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(payload);
    value
}

/// The header in exactly its own bytes.
pub(crate) fn header_of(bytes: &[u8]) -> Header {
    value_of(bytes)
}

fn u64_of(payload: &[u8]) -> u64 {
    value_of::<VhostUserU64>(payload).value
}

fn reserved(clear: bool, field: &'static str) -> Result<(), Violation> {
    if clear {
        Ok(())
    } else {
        Err(Violation::Reserved(field))
    }
}

fn decode_region(payload: &[u8]) -> Result<Region, Violation> {
    let region: Region = value_of(payload);
    reserved(region.reserved == 0, "region.reserved")?;
    reserved(region.flags & !wire::REGION_FLAGS == 0, "region.flags")?;
    Ok(region)
}

fn decode_fault_fd(payload: &[u8]) -> Result<FaultFd, Violation> {
    let fault_fd: FaultFd = value_of(payload);
    reserved(fault_fd.reserved == 0, "fault_fd.reserved")?;
    Ok(fault_fd)
}

fn decode_held(payload: &[u8]) -> Result<Held, Violation> {
    let held: Held = value_of(payload);
    reserved(held.flags == 0, "held.flags")?;
    reserved(held.reserved == 0, "held.reserved")?;
    Ok(held)
}

fn decode_quiesced(payload: &[u8]) -> Result<Quiesced, Violation> {
    let quiesced: Quiesced = value_of(payload);
    reserved(quiesced.reserved == 0, "quiesced.reserved")?;
    Ok(quiesced)
}

fn decode_reset(payload: &[u8]) -> Result<BackendRequest, Violation> {
    let reset: Reset = value_of(payload);
    reserved(reset.reserved == 0, "reset.reserved")?;
    Ok(BackendRequest::Reset)
}

fn decode_quiesce(payload: &[u8]) -> Result<Quiesce, Violation> {
    let quiesce: Quiesce = value_of(payload);
    reserved(quiesce.reserved == 0, "quiesce.reserved")?;
    Ok(quiesce)
}

fn decode_stop(payload: &[u8]) -> Result<u32, Violation> {
    let stop: Stop = value_of(payload);
    reserved(stop.reserved == 0, "stop.reserved")?;
    Ok(stop.reason)
}

fn decode_register(payload: &[u8]) -> Result<Register, Violation> {
    let register: Register = value_of(payload);
    reserved(
        register.flags & !wire::REGISTER_FLAGS == 0,
        "register.flags",
    )?;
    Ok(register)
}

fn decode_forget(payload: &[u8]) -> Result<u32, Violation> {
    let register: Register = value_of(payload);
    reserved(register.flags == 0, "register.flags")?;
    reserved(register.length == 0, "register.length")?;
    Ok(register.slot)
}

fn decode_map(payload: &[u8]) -> Result<Map, Violation> {
    let mmap: VhostUserMMap = value_of(payload);
    reserved(mmap.padding == [0; 7], "mmap.padding")?;
    reserved(mmap.flags & !wire::MMAP_RW == 0, "mmap.flags")?;
    Ok(Map {
        slot: mmap.shmid,
        file_offset: mmap.fd_offset,
        range: RegionRange {
            offset: mmap.shm_offset,
            len: mmap.len,
        },
        writable: mmap.flags & wire::MMAP_RW != 0,
    })
}

fn decode_range(payload: &[u8]) -> Result<RegionRange, Violation> {
    let mmap: VhostUserMMap = value_of(payload);
    reserved(mmap.shmid == 0, "mmap.shmid")?;
    reserved(mmap.padding == [0; 7], "mmap.padding")?;
    reserved({ mmap.fd_offset } == 0, "mmap.fd_offset")?;
    reserved({ mmap.flags } == 0, "mmap.flags")?;
    Ok(RegionRange {
        offset: mmap.shm_offset,
        len: mmap.len,
    })
}

fn mmap_of_map(map: &Map) -> VhostUserMMap {
    VhostUserMMap {
        shmid: map.slot,
        fd_offset: map.file_offset,
        flags: if map.writable { wire::MMAP_RW } else { 0 },
        ..mmap_of_range(map.range)
    }
}

fn mmap_of_range(range: RegionRange) -> VhostUserMMap {
    VhostUserMMap {
        shm_offset: range.offset,
        len: range.len,
        ..VhostUserMMap::default()
    }
}
