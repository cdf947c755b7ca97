// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual machine monitor links to use a backend: guest memory whose contents are an image.
//!
//! Knows no image format and no hypervisor.
//!
//! ```text
//!             Frontend
//!   for life ├── GuestRegion   addresses, userfaultfd, lock
//!            ├── Watch         reads the event of a late move
//!   session  └── Session       main channel; Link; mapping thread ── backend channel
//! ```
//!
//! The upper half outlives the session: when the backend goes, what is mapped goes on working and other touches wait.

mod attach;
mod bounce;
mod limit;
mod link;
mod mapper;
mod region;
mod segv;
mod watch;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uuid::Uuid;

use self::attach::{MainChannel, Offer, connect_until};
use self::limit::mapping_limit;
use self::link::Link;
use self::mapper::{Counters, Mapper, Surface};
use self::watch::Watch;
use crate::codec::Connection;
use crate::error::{Error, ErrorKind, Result};
use crate::session::{Mappings, Rules};
use crate::uffd::Uffd;
use crate::wire::{self, FaultFd};

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
}

impl Default for FrontendOptions {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            mapping_limit: None,
            bounce: true,
        }
    }
}

/// A region of guest memory and the backend that serves it.
///
/// Dropping it detaches; the memory itself goes with the last `Arc` of [`Frontend::region`]. No thread may be waiting
/// inside a touch then, since nobody is left who could serve it.
#[derive(Debug)]
pub struct Frontend {
    session: Session,
    // After the session, whose mapping thread it helps.
    _watch: Watch,
    region: Arc<GuestRegion>,
    bounces: Arc<Bounces>,
    counters: Arc<Counters>,
    offered: wire::Region,
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
        Self::attach(stream, options, deadline)
    }

    /// Attaches over a socket that is connected to a backend and in blocking mode.
    ///
    /// # Errors
    /// As [`Frontend::connect`].
    pub fn from_stream(stream: UnixStream, options: &FrontendOptions) -> Result<Self> {
        Self::attach(stream, options, Instant::now() + options.handshake_timeout)
    }

    fn attach(stream: UnixStream, options: &FrontendOptions, deadline: Instant) -> Result<Self> {
        let features = if options.bounce {
            wire::FEATURE_BOUNCE
        } else {
            0
        };
        let (main, offer) = MainChannel::negotiate(stream, features, deadline)?;
        let mapping_limit = mapping_limit(options.mapping_limit)?;
        let offered = offer.region;
        let region = Arc::new(reserve(offer)?);
        let watch = Watch::start(Arc::clone(&region))?;
        let bounces = Bounces::new(
            Arc::clone(&region),
            offered.flags & wire::REGION_READ_ONLY != 0,
        );
        let counters = Arc::new(Counters::default());
        let surface = Surface {
            region: Arc::clone(&region),
            moves: watch.guard(),
            bounces: Arc::clone(&bounces),
            counters: Arc::clone(&counters),
        };
        let session = Session::open(main, surface, &offered, mapping_limit, deadline)?;
        Ok(Self {
            session,
            _watch: watch,
            region,
            bounces,
            counters,
            offered,
        })
    }

    /// The guest's memory. Clone the `Arc` for threads that may outlive this value.
    pub fn region(&self) -> &Arc<GuestRegion> {
        &self.region
    }

    /// The moments in which a page of the region cannot be stored to; for monitors that use KVM.
    pub fn bounces(&self) -> &Arc<Bounces> {
        &self.bounces
    }

    /// Whether the image is served read-only: stores must not reach the region.
    pub fn is_read_only(&self) -> bool {
        self.offered.flags & wire::REGION_READ_ONLY != 0
    }

    /// Whether the guest's own cache flushes make its stores durable; if not, only [`Frontend::flush`] does.
    pub fn is_dax(&self) -> bool {
        self.offered.flags & wire::REGION_DAX != 0
    }

    /// The image that is served.
    pub fn image_uuid(&self) -> Uuid {
        Uuid::from_bytes(self.offered.image)
    }

    /// Makes everything durable that was stored before the call. Waits for as long as the backend needs, and returns
    /// when the session ends.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if the backend could not; once a flush has failed, every later one fails too.
    /// [`ErrorKind::Detached`] if no backend is attached.
    pub fn flush(&self) -> Result<()> {
        self.session.flush()
    }

    /// Whether the backend is attached.
    pub fn status(&self) -> LinkStatus {
        self.session.link.status()
    }

    /// Waits for the backend's loss; false if it is still attached after `timeout`.
    pub fn wait_detached(&self, timeout: Duration) -> bool {
        self.session.link.wait_ended(timeout)
    }

    /// What the backend has asked for so far.
    pub fn mapping_counts(&self) -> MappingCounts {
        self.counters.snapshot()
    }
}

/// Reserves what the backend offers.
fn reserve(offer: Offer) -> Result<GuestRegion> {
    let too_large = |_| {
        Error::new(
            ErrorKind::Io,
            "reserve a region larger than this process can address",
        )
    };
    let size = usize::try_from(offer.region.size).map_err(too_large)?;
    let alignment = usize::try_from(offer.region.alignment).map_err(too_large)?;
    let uffd = Uffd::create(offer.device.as_ref().map(AsFd::as_fd))?;
    GuestRegion::reserve(size, alignment, uffd, offer.lock)
}

/// One connection to a backend, from the handshake to its end.
#[derive(Debug)]
struct Session {
    main: Mutex<MainChannel>,
    link: Arc<Link>,
    mapper: Option<JoinHandle<()>>,
}

impl Session {
    /// Serves the backend channel, then hands over the userfaultfd.
    fn open(
        main: MainChannel,
        surface: Surface,
        offered: &wire::Region,
        mapping_limit: u32,
        deadline: Instant,
    ) -> Result<Self> {
        let (ours, theirs) =
            UnixStream::pair().map_err(|e| Error::io("create the backend channel", e))?;
        let ours_clone = ours
            .try_clone()
            .map_err(|e| Error::io("duplicate the backend channel", e))?;
        let link = Arc::new(Link::new(main.try_clone_stream()?, ours_clone));
        let region = Arc::clone(&surface.region);
        let rules = Rules {
            region_size: offered.size,
            read_only: offered.flags & wire::REGION_READ_ONLY != 0,
            page_size: rustix::param::page_size() as u64,
            features: main.features(),
        };
        let mapper = Mapper {
            channel: Connection::new(ours),
            mappings: Mappings::new(rules),
            surface,
        };
        let mapper = Some(mapper.start(Arc::clone(&link))?);
        let session = Self {
            main: Mutex::new(main),
            link,
            mapper,
        };
        let fault_fd = FaultFd {
            base: region.as_ptr().addr() as u64,
            size: offered.size,
            mapping_limit,
            reserved: 0,
        };
        session.hand_over(fault_fd, theirs.into(), &region, deadline)?;
        Ok(session)
    }

    fn hand_over(
        &self,
        fault_fd: FaultFd,
        channel: OwnedFd,
        region: &GuestRegion,
        deadline: Instant,
    ) -> Result<()> {
        let mut main = self.main.lock().unwrap_or_else(PoisonError::into_inner);
        main.hand_over(fault_fd, channel, region.uffd().as_fd(), deadline)
    }

    fn flush(&self) -> Result<()> {
        let mut main = self.main.lock().unwrap_or_else(PoisonError::into_inner);
        if let LinkStatus::Detached(reason) = self.link.status() {
            return Err(Error::new(ErrorKind::Detached, format!("flush ({reason})")));
        }
        main.flush().map_err(|error| match error.kind() {
            ErrorKind::Refused(_) => error,
            _ => {
                self.link.end(error.to_string());
                Error::new(ErrorKind::Detached, format!("flush ({error})"))
            }
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.link.end("the frontend left");
        if let Some(mapper) = self.mapper.take()
            && mapper.join().is_err()
        {
            log::error!("the mapping thread panicked");
        }
    }
}
