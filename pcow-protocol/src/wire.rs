// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bytes on the wire: numbers, header, payload layouts and limits, as the tables of `protocol.md` have them.
//!
//! Knows nothing of sockets, sessions or memory. What means the same as in vhost-user is taken from the `vhost` crate.
#![allow(unsafe_code)] // `ByteValued` for the payloads that are pcow's own

use std::mem::{offset_of, size_of};

use vhost::vhost_user::message::{BackendReq, FrontendReq, VhostUserHeaderFlag};
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vm_memory::ByteValued;

pub use vhost::vhost_user::message::{
    MAX_MSG_SIZE, VhostUserMMap, VhostUserMMapFlags, VhostUserU64,
};

/// The only message version (section 2.1).
pub const VERSION: u32 = 1;
/// Header bits that hold the version.
pub const FLAG_VERSION_MASK: u32 = VhostUserHeaderFlag::VERSION.bits();
/// Header bit 2: this is a reply.
pub const FLAG_REPLY: u32 = VhostUserHeaderFlag::REPLY.bits();
/// Header bit 3: a reply is wanted.
pub const FLAG_NEED_REPLY: u32 = VhostUserHeaderFlag::NEED_REPLY.bits();
/// Header bits that must be clear.
pub const FLAG_RESERVED: u32 = VhostUserHeaderFlag::RESERVED_BITS.bits();

/// File descriptors that are accepted with one message (section 2.1).
pub const MAX_FDS: usize = 8;
/// Bytes of the longest payload that pcow defines.
pub const MAX_PAYLOAD: usize = size_of::<Region>();
/// Bytes of the longest message that pcow defines.
pub const MAX_MESSAGE: usize = size_of::<Header>() + MAX_PAYLOAD;

/// The one bit of vhost-user's first feature set that pcow uses (section 3).
pub const FEATURE_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Protocol feature: header bit 3 asks for a status.
pub const FEATURE_REPLY_ACK: u64 = VhostUserProtocolFeatures::REPLY_ACK.bits();
/// Protocol feature: there is a backend channel.
pub const FEATURE_BACKEND_REQ: u64 = VhostUserProtocolFeatures::BACKEND_REQ.bits();
/// Protocol feature: the backend sends file descriptors.
pub const FEATURE_BACKEND_SEND_FD: u64 = VhostUserProtocolFeatures::BACKEND_SEND_FD.bits();
/// Protocol feature: the peer speaks `protocol.md`.
pub const FEATURE_PCOW: u64 = 1 << 56;
/// Protocol feature: the frontend can let a kernel thread's request for write access fail (section 5.2, BOUNCE).
pub const FEATURE_BOUNCE: u64 = 1 << 57;
/// Protocol feature: the frontend carries out RESET and can hand the lock back (section 6.1).
pub const FEATURE_RESET: u64 = 1 << 58;
/// Protocol feature: the frontend carries out QUIESCE, RESUME and CANCEL (section 5.4). Needs [`FEATURE_RESET`].
pub const FEATURE_QUIESCE: u64 = 1 << 59;
/// Protocol feature: the frontend carries out STOP.
pub const FEATURE_STOP: u64 = 1 << 60;
/// The protocol features without which there is no session.
pub const NEEDED_FEATURES: u64 =
    FEATURE_REPLY_ACK | FEATURE_BACKEND_REQ | FEATURE_BACKEND_SEND_FD | FEATURE_PCOW;

/// Every protocol feature of this version.
pub const KNOWN_FEATURES: u64 =
    NEEDED_FEATURES | FEATURE_BOUNCE | FEATURE_RESET | FEATURE_QUIESCE | FEATURE_STOP;

/// Bytes that a region's size and address are a multiple of.
pub const REGION_ALIGNMENT: u64 = 2 << 20;
/// Bytes of the largest region.
pub const MAX_REGION_SIZE: u64 = (8 << 40) - REGION_ALIGNMENT;
/// The smallest mapping limit that a frontend may grant.
pub const MIN_MAPPING_LIMIT: u32 = 16;

/// Moments of BOUNCE that may be open at once.
pub const MAX_MOMENTS: u32 = 64;

/// Region flag: nothing will be mapped writable.
pub const REGION_READ_ONLY: u32 = 1 << 0;
/// Region flag: files are mapped with `MAP_SYNC`.
pub const REGION_DAX: u32 = 1 << 1;
/// Region flag: the first file descriptor is the image's lock.
pub const REGION_LOCK: u32 = 1 << 2;
/// Region flag: the next file descriptor is an open `/dev/userfaultfd`.
pub const REGION_UFFD_DEVICE: u32 = 1 << 3;
/// All region flags.
pub const REGION_FLAGS: u32 = REGION_READ_ONLY | REGION_DAX | REGION_LOCK | REGION_UFFD_DEVICE;

/// Register flag: the file may be mapped writable.
pub const REGISTER_WRITABLE: u32 = 1 << 0;
/// Register flag: the file is mapped with `MAP_SYNC`.
pub const REGISTER_SYNC: u32 = 1 << 1;
/// All register flags.
pub const REGISTER_FLAGS: u32 = REGISTER_WRITABLE | REGISTER_SYNC;

/// Reason of a STOP: there is no space left.
pub const STOP_NO_SPACE: u32 = 1;

/// Mmap flag: map writable.
pub const MMAP_RW: u64 = VhostUserMMapFlags::WRITABLE.bits();

/// The head of every message.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Number of the request.
    pub request: u32,
    /// Version, reply and need-reply bits.
    pub flags: u32,
    /// Bytes of payload that follow.
    pub size: u32,
}

/// The reply to GET_REGION.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Bytes; a multiple of [`REGION_ALIGNMENT`], at most [`MAX_REGION_SIZE`].
    pub size: u64,
    /// Bytes; [`REGION_ALIGNMENT`].
    pub alignment: u64,
    /// `REGION_*` bits.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
    /// UUID of the image, bytes in RFC 9562 order.
    pub image: [u8; 16],
    /// UUID of the active layer.
    pub layer: [u8; 16],
}

/// The payload of SET_FAULT_FD.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultFd {
    /// Address of the region in the frontend.
    pub base: u64,
    /// Bytes; the region's size.
    pub size: u64,
    /// Memory mappings that the backend may cause in the frontend's process.
    pub mapping_limit: u32,
    /// 0.
    pub reserved: u32,
}

/// The payload of REGISTER_FD and FORGET_FD.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Register {
    /// 0 to 255.
    pub slot: u32,
    /// `REGISTER_*` bits.
    pub flags: u32,
    /// Bytes of the file that may be mapped.
    pub length: u64,
}

impl Register {
    /// Whether the file may be mapped writable.
    pub fn writable(&self) -> bool {
        self.flags & REGISTER_WRITABLE != 0
    }

    /// Whether the file is mapped with `MAP_SYNC`.
    pub fn sync(&self) -> bool {
        self.flags & REGISTER_SYNC != 0
    }
}

/// The payload of HAND_BACK.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// UUID of the image, bytes in RFC 9562 order.
    pub image: [u8; 16],
    /// UUID of the layer that the frontend last knew as active.
    pub layer: [u8; 16],
    /// 0.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}

/// The payload of QUIESCED.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quiesced {
    /// That of the QUIESCE; not 0.
    pub id: u64,
    /// 0: I/O is drained and held; else an errno, and nothing is held.
    pub error: u32,
    /// 0.
    pub reserved: u32,
}

/// The payload of RESET.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reset {
    /// 0.
    pub reserved: u64,
}

/// The payload of QUIESCE.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quiesce {
    /// Not 0, and greater than that of any QUIESCE before it in the session.
    pub id: u64,
    /// Milliseconds that draining may take.
    pub deadline_ms: u32,
    /// 0.
    pub reserved: u32,
}

/// The payload of RESUME.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resume {
    /// That of the QUIESCE.
    pub id: u64,
    /// UUID of the layer that is active from now on.
    pub layer: [u8; 16],
}

/// The payload of CANCEL.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cancel {
    /// That of the QUIESCE.
    pub id: u64,
}

/// The payload of STOP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stop {
    /// [`STOP_NO_SPACE`], or a reason that this version does not know.
    pub reason: u32,
    /// 0.
    pub reserved: u32,
}

// The layouts of protocol.md sections 2.1 and 5. No implicit padding: each size is the sum of its fields.
const _: () = {
    assert!(size_of::<Header>() == 12);
    assert!(offset_of!(Header, request) == 0);
    assert!(offset_of!(Header, flags) == 4);
    assert!(offset_of!(Header, size) == 8);
    assert!(size_of::<Region>() == 56);
    assert!(offset_of!(Region, size) == 0);
    assert!(offset_of!(Region, alignment) == 8);
    assert!(offset_of!(Region, flags) == 16);
    assert!(offset_of!(Region, reserved) == 20);
    assert!(offset_of!(Region, image) == 24);
    assert!(offset_of!(Region, layer) == 40);
    assert!(size_of::<FaultFd>() == 24);
    assert!(offset_of!(FaultFd, base) == 0);
    assert!(offset_of!(FaultFd, size) == 8);
    assert!(offset_of!(FaultFd, mapping_limit) == 16);
    assert!(offset_of!(FaultFd, reserved) == 20);
    assert!(size_of::<Register>() == 16);
    assert!(offset_of!(Register, slot) == 0);
    assert!(offset_of!(Register, flags) == 4);
    assert!(offset_of!(Register, length) == 8);
    assert!(size_of::<Held>() == 40);
    assert!(offset_of!(Held, image) == 0);
    assert!(offset_of!(Held, layer) == 16);
    assert!(offset_of!(Held, flags) == 32);
    assert!(offset_of!(Held, reserved) == 36);
    assert!(size_of::<Quiesced>() == 16);
    assert!(offset_of!(Quiesced, id) == 0);
    assert!(offset_of!(Quiesced, error) == 8);
    assert!(offset_of!(Quiesced, reserved) == 12);
    assert!(size_of::<Reset>() == 8);
    assert!(size_of::<Quiesce>() == 16);
    assert!(offset_of!(Quiesce, id) == 0);
    assert!(offset_of!(Quiesce, deadline_ms) == 8);
    assert!(offset_of!(Quiesce, reserved) == 12);
    assert!(size_of::<Resume>() == 24);
    assert!(offset_of!(Resume, id) == 0);
    assert!(offset_of!(Resume, layer) == 8);
    assert!(size_of::<Cancel>() == 8);
    assert!(size_of::<Stop>() == 8);
    assert!(offset_of!(Stop, reason) == 0);
    assert!(offset_of!(Stop, reserved) == 4);
    assert!(size_of::<VhostUserMMap>() == 40);
    assert!(offset_of!(VhostUserMMap, shmid) == 0);
    assert!(offset_of!(VhostUserMMap, padding) == 1);
    assert!(offset_of!(VhostUserMMap, fd_offset) == 8);
    assert!(offset_of!(VhostUserMMap, shm_offset) == 16);
    assert!(offset_of!(VhostUserMMap, len) == 24);
    assert!(offset_of!(VhostUserMMap, flags) == 32);
    assert!(size_of::<VhostUserU64>() == 8);
    assert!(MAX_PAYLOAD <= MAX_MSG_SIZE);
};

// SAFETY: three integers, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for Header {}
// SAFETY: integers and byte arrays, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for Region {}
// SAFETY: integers, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for FaultFd {}
// SAFETY: integers, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for Register {}
// SAFETY: integers and byte arrays, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for Held {}
// SAFETY: integers, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for Quiesced {}
// SAFETY: integers, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for Reset {}
// SAFETY: integers, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for Quiesce {}
// SAFETY: integers and byte arrays, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for Resume {}
// SAFETY: integers, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for Cancel {}
// SAFETY: integers, `repr(C)`, no padding (asserted above), any bit pattern is valid.
unsafe impl ByteValued for Stop {}

/// A payload layout of section 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// No payload.
    None,
    /// One u64: a value or a status.
    U64,
    /// [`Region`].
    Region,
    /// [`FaultFd`].
    FaultFd,
    /// [`Register`].
    Register,
    /// [`VhostUserMMap`].
    Mmap,
    /// [`Held`].
    Held,
    /// [`Quiesced`].
    Quiesced,
    /// [`Reset`].
    Reset,
    /// [`Quiesce`].
    Quiesce,
    /// [`Resume`].
    Resume,
    /// [`Cancel`].
    Cancel,
    /// [`Stop`].
    Stop,
}

impl Layout {
    /// Bytes of the payload.
    pub const fn size(self) -> u32 {
        match self {
            Self::None => 0,
            Self::U64 | Self::Reset | Self::Cancel | Self::Stop => 8,
            Self::Register | Self::Quiesced | Self::Quiesce => 16,
            Self::FaultFd | Self::Resume => 24,
            Self::Mmap | Self::Held => 40,
            Self::Region => 56,
        }
    }
}

/// Requests of the main channel (section 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FrontendCode {
    /// Offer of vhost-user features.
    GetFeatures = FrontendReq::GET_FEATURES as u32,
    /// Choice of vhost-user features.
    SetFeatures = FrontendReq::SET_FEATURES as u32,
    /// Offer of protocol features.
    GetProtocolFeatures = FrontendReq::GET_PROTOCOL_FEATURES as u32,
    /// Choice of protocol features.
    SetProtocolFeatures = FrontendReq::SET_PROTOCOL_FEATURES as u32,
    /// The backend's end of the backend channel.
    SetBackendReqFd = FrontendReq::SET_BACKEND_REQ_FD as u32,
    /// What the backend serves.
    GetRegion = 1000,
    /// The userfaultfd and where the region is.
    SetFaultFd = 1001,
    /// The lock that was kept from an earlier session.
    HandBack = 1002,
    /// Make what was stored durable.
    Flush = 1003,
    /// I/O is drained and held, or could not be.
    Quiesced = 1004,
}

/// Requests of the backend channel (section 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum BackendCode {
    /// Keep a file descriptor under a slot.
    RegisterFd = 1000,
    /// Close a slot's file descriptor.
    ForgetFd = 1001,
    /// Map a piece of a file and wake.
    Map = 1002,
    /// Make a piece a trap again and wake.
    Unmap = 1003,
    /// Drop read copies.
    Evict = 1004,
    /// Make a page read-only for a moment and wake.
    Bounce = 1005,
    /// End that moment and wake.
    BounceEnd = 1006,
    /// Make everything a trap again, forget all slots, and wake.
    Reset = 1007,
    /// Drain and hold I/O.
    Quiesce = 1008,
    /// Let I/O go on, with a new active layer.
    Resume = 1009,
    /// Let I/O go on.
    Cancel = 1010,
    /// Stop the virtual machine.
    Stop = 1011,
}

// The private numbers of both channels do not meet vhost-user's.
const _: () = {
    assert!((FrontendReq::GET_SHMEM_CONFIG as u32) < FrontendCode::GetRegion as u32);
    assert!((BackendReq::SHMEM_UNMAP as u32) < BackendCode::RegisterFd as u32);
};

/// What a channel's request numbers have in common.
pub trait Code: Copy + Eq + std::fmt::Debug + 'static {
    /// Every request of the channel.
    const ALL: &'static [Self];

    /// The request's number on the wire.
    fn number(self) -> u32;

    /// The request's name in `protocol.md`.
    fn name(self) -> &'static str;

    /// Layout of the request's payload.
    fn request(self) -> Layout;

    /// Layout of the reply's payload.
    fn reply(self) -> Layout;

    /// File descriptors that come with the request.
    fn request_fds(self) -> usize;

    /// Whether the request must ask for its status.
    fn must_ask(self) -> bool;

    /// The request with this number.
    fn from_number(number: u32) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.number() == number)
    }
}

impl Code for FrontendCode {
    const ALL: &'static [Self] = &[
        Self::GetFeatures,
        Self::SetFeatures,
        Self::GetProtocolFeatures,
        Self::SetProtocolFeatures,
        Self::SetBackendReqFd,
        Self::GetRegion,
        Self::SetFaultFd,
        Self::HandBack,
        Self::Flush,
        Self::Quiesced,
    ];

    fn number(self) -> u32 {
        self as u32
    }

    fn name(self) -> &'static str {
        match self {
            Self::GetFeatures => "GET_FEATURES",
            Self::SetFeatures => "SET_FEATURES",
            Self::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
            Self::SetProtocolFeatures => "SET_PROTOCOL_FEATURES",
            Self::SetBackendReqFd => "SET_BACKEND_REQ_FD",
            Self::GetRegion => "GET_REGION",
            Self::SetFaultFd => "SET_FAULT_FD",
            Self::HandBack => "HAND_BACK",
            Self::Flush => "FLUSH",
            Self::Quiesced => "QUIESCED",
        }
    }

    fn request(self) -> Layout {
        match self {
            Self::SetFeatures | Self::SetProtocolFeatures => Layout::U64,
            Self::SetFaultFd => Layout::FaultFd,
            Self::HandBack => Layout::Held,
            Self::Quiesced => Layout::Quiesced,
            Self::GetFeatures
            | Self::GetProtocolFeatures
            | Self::SetBackendReqFd
            | Self::GetRegion
            | Self::Flush => Layout::None,
        }
    }

    fn reply(self) -> Layout {
        match self {
            Self::GetRegion => Layout::Region,
            _ => Layout::U64,
        }
    }

    fn request_fds(self) -> usize {
        match self {
            Self::SetBackendReqFd | Self::SetFaultFd | Self::HandBack => 1,
            _ => 0,
        }
    }

    fn must_ask(self) -> bool {
        matches!(self, Self::SetFaultFd | Self::HandBack | Self::Flush)
    }
}

impl Code for BackendCode {
    const ALL: &'static [Self] = &[
        Self::RegisterFd,
        Self::ForgetFd,
        Self::Map,
        Self::Unmap,
        Self::Evict,
        Self::Bounce,
        Self::BounceEnd,
        Self::Reset,
        Self::Quiesce,
        Self::Resume,
        Self::Cancel,
        Self::Stop,
    ];

    fn number(self) -> u32 {
        self as u32
    }

    fn name(self) -> &'static str {
        match self {
            Self::RegisterFd => "REGISTER_FD",
            Self::ForgetFd => "FORGET_FD",
            Self::Map => "MAP",
            Self::Unmap => "UNMAP",
            Self::Evict => "EVICT",
            Self::Bounce => "BOUNCE",
            Self::BounceEnd => "BOUNCE_END",
            Self::Reset => "RESET",
            Self::Quiesce => "QUIESCE",
            Self::Resume => "RESUME",
            Self::Cancel => "CANCEL",
            Self::Stop => "STOP",
        }
    }

    fn request(self) -> Layout {
        match self {
            Self::RegisterFd | Self::ForgetFd => Layout::Register,
            Self::Map | Self::Unmap | Self::Evict | Self::Bounce | Self::BounceEnd => Layout::Mmap,
            Self::Reset => Layout::Reset,
            Self::Quiesce => Layout::Quiesce,
            Self::Resume => Layout::Resume,
            Self::Cancel => Layout::Cancel,
            Self::Stop => Layout::Stop,
        }
    }

    fn reply(self) -> Layout {
        Layout::U64
    }

    fn request_fds(self) -> usize {
        usize::from(self == Self::RegisterFd)
    }

    fn must_ask(self) -> bool {
        matches!(
            self,
            Self::RegisterFd | Self::Bounce | Self::Reset | Self::Quiesce
        )
    }
}
