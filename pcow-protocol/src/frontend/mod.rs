// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual machine monitor links to use a backend: guest memory whose contents are an image.
//!
//! Knows no image format and no hypervisor.
//!
//! ```text
//!             Frontend
//!   for life ├── GuestRegion   addresses, userfaultfd; Kept: lock, which image
//!            ├── Watch         reads the event of a late move, or of one without a backend
//!            └── Keeper        connects again when a session ends
//!   session       └── Session  main channel; Link; mapping thread ── backend channel
//! ```
//!
//! The upper half outlives the session: when the backend goes, what is mapped goes on working and other touches wait. The
//! keeper looks for the next one, makes sure that it serves the same image, and hands the region over.

mod attach;
mod bounce;
mod keeper;
mod kept;
mod limit;
mod link;
mod mapper;
mod quiesce;
mod region;
mod segv;
mod session;
mod watch;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use uuid::Uuid;

use self::attach::{MainChannel, Offer, connect_until};
use self::keeper::Keeper;
use self::kept::Kept;
use self::limit::mapping_limit;
use self::mapper::Surface;
use self::session::Session;
use self::watch::Watch;
use crate::error::{Error, ErrorKind, Result};
use crate::uffd::Uffd;
use crate::wire;

pub use self::bounce::{Bounces, IoGuard};
pub use self::link::LinkStatus;
pub use self::mapper::MappingCounts;
pub use self::region::GuestRegion;
pub use self::segv::repeat_stores_in_bounces;

/// How to attach.
#[derive(Clone, Debug)]
pub struct FrontendOptions {
    /// How long everything from connecting to the first served fault may take. Default: 10 s.
    pub handshake_timeout: Duration,
    /// How many memory mappings the backend may cause in this process, at least 16. Default: half of
    /// `vm.max_map_count`, less those that the process has when it attaches.
    pub mapping_limit: Option<u32>,
    /// Whether the backend may ask for BOUNCE, which tells loads from stores under KVM on x86. Default: yes; it is never
    /// asked for without KVM. A virtual machine monitor that uses KVM must do what [`Bounces`] says, or switch it off.
    pub bounce: bool,
    /// Whether the backend may hold device I/O for the moment of a snapshot. Default: yes. A virtual machine monitor that
    /// hands addresses of the region to system calls must wrap those in [`Bounces::begin_io`], or switch it off.
    pub quiesce: bool,
    /// Where it is told that the backend wants the virtual machine stopped, as by a disk with `werror=stop`; its user may
    /// continue it. Default: nowhere, and the backend knows that it cannot ask.
    pub stop: Option<Sender<StopReason>>,
    /// Whether to look for another backend when a session ends, at the path that was given to [`Frontend::connect`].
    /// Default: yes.
    pub reconnect: bool,
}

impl Default for FrontendOptions {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            mapping_limit: None,
            bounce: true,
            quiesce: true,
            stop: None,
            reconnect: true,
        }
    }
}

/// Why a backend wants the virtual machine stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// There is no space left for what the guest stores.
    NoSpace,
    /// One that this version does not know: the machine is stopped all the same.
    Other(u32),
}

impl From<u32> for StopReason {
    fn from(reason: u32) -> Self {
        match reason {
            wire::STOP_NO_SPACE => Self::NoSpace,
            other => Self::Other(other),
        }
    }
}

/// A region of guest memory and the backend that serves it.
///
/// Dropping it detaches; the memory itself goes with the last `Arc` of [`Frontend::region`]. No thread may be waiting
/// inside a touch then, since nobody is left who could serve it.
#[derive(Debug)]
pub struct Frontend {
    keeper: Keeper,
    // After the keeper, whose moves it helps, and those of its session's mapping thread.
    _watch: Watch,
    surface: Surface,
}

impl Frontend {
    /// Connects to the backend that listens at `path`, and attaches.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] after [`FrontendOptions::handshake_timeout`]; [`ErrorKind::NotPcow`];
    /// [`ErrorKind::Refused`] with `EBUSY` if the backend serves another frontend; [`ErrorKind::MappingLimit`];
    /// [`ErrorKind::Io`] for what the operating system refuses (no such socket, no userfaultfd, no address space); else
    /// what breaks the protocol.
    pub fn connect(path: &Path, options: &FrontendOptions) -> Result<Self> {
        let deadline = Instant::now() + options.handshake_timeout;
        let stream = connect_until(path, deadline)?;
        Self::attach(stream, Some(path), options, deadline)
    }

    /// Attaches over a socket that is connected to a backend and in blocking mode. There is no way to another backend.
    ///
    /// # Errors
    /// As [`Frontend::connect`].
    pub fn from_stream(stream: UnixStream, options: &FrontendOptions) -> Result<Self> {
        let deadline = Instant::now() + options.handshake_timeout;
        Self::attach(stream, None, options, deadline)
    }

    fn attach(
        stream: UnixStream,
        path: Option<&Path>,
        options: &FrontendOptions,
        deadline: Instant,
    ) -> Result<Self> {
        let (main, offer) = MainChannel::negotiate(stream, wanted_features(options), deadline)?;
        let mapping_limit = mapping_limit(options.mapping_limit)?;
        let offered = offer.region;
        let (region, kept) = reserve(offer)?;
        let watch = Watch::start(Arc::clone(&region))?;
        let bounces = Bounces::new(Arc::clone(&region), kept.is_read_only());
        let surface = Surface {
            region,
            kept,
            moves: watch.guard(),
            bounces,
            stop: options.stop.clone(),
            counters: Arc::default(),
        };
        let session = Session::open(main, surface.clone(), &offered, mapping_limit, deadline)?;
        Ok(Self {
            keeper: Keeper::start(path, options.clone(), surface.clone(), session)?,
            _watch: watch,
            surface,
        })
    }

    /// The guest's memory. Clone the `Arc` for threads that may outlive this value.
    pub fn region(&self) -> &Arc<GuestRegion> {
        &self.surface.region
    }

    /// The moments in which a page of the region cannot be stored to; for monitors that use KVM.
    pub fn bounces(&self) -> &Arc<Bounces> {
        &self.surface.bounces
    }

    /// Whether the image is served read-only: stores must not reach the region.
    pub fn is_read_only(&self) -> bool {
        self.surface.kept.is_read_only()
    }

    /// Whether the guest's own cache flushes make its stores durable; if not, only [`Frontend::flush`] does. Another backend
    /// may find the image moved.
    pub fn is_dax(&self) -> bool {
        self.surface.kept.region().flags & wire::REGION_DAX != 0
    }

    /// The image that is served.
    pub fn image_uuid(&self) -> Uuid {
        Uuid::from_bytes(self.surface.kept.region().image)
    }

    /// Makes everything durable that was stored before the call. Waits for as long as the backend needs, and for the next
    /// one if it is lost meanwhile and [`FrontendOptions::reconnect`] is set.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if the backend could not; once a flush has failed, every later one fails too.
    /// [`ErrorKind::Detached`] if no backend is attached and there will be none.
    pub fn flush(&self) -> Result<()> {
        self.keeper.flush()
    }

    /// Whether a backend is attached, and if not, since when and why.
    pub fn status(&self) -> LinkStatus {
        self.keeper.status()
    }

    /// Waits for the loss of the present backend; false if it is still attached after `timeout`.
    pub fn wait_detached(&self, timeout: Duration) -> bool {
        self.keeper.wait_detached(timeout)
    }

    /// Waits until a backend is attached; false if none is after `timeout`.
    pub fn wait_attached(&self, timeout: Duration) -> bool {
        self.keeper.wait_attached(timeout)
    }

    /// What the backend has asked for so far.
    pub fn mapping_counts(&self) -> MappingCounts {
        self.surface.counters.snapshot()
    }
}

/// Reserves what the backend offers.
fn reserve(offer: Offer) -> Result<(Arc<GuestRegion>, Arc<Kept>)> {
    let too_large = |_| {
        Error::new(
            ErrorKind::Io,
            "reserve a region larger than this process can address",
        )
    };
    let size = usize::try_from(offer.region.size).map_err(too_large)?;
    let alignment = usize::try_from(offer.region.alignment).map_err(too_large)?;
    let uffd = Uffd::create(offer.device.as_ref().map(AsFd::as_fd))?;
    let kept = Arc::new(Kept::new(offer.region, offer.lock));
    let region = GuestRegion::reserve(size, alignment, uffd, Arc::clone(&kept))?;
    Ok((Arc::new(region), kept))
}

/// The optional features of the protocol that this frontend carries out.
fn wanted_features(options: &FrontendOptions) -> u64 {
    let mut features = wire::FEATURE_RESET;
    if options.bounce {
        features |= wire::FEATURE_BOUNCE;
    }
    if options.quiesce {
        features |= wire::FEATURE_QUIESCE;
    }
    if options.stop.is_some() {
        features |= wire::FEATURE_STOP;
    }
    features
}
