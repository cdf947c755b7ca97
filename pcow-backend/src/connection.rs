// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One frontend's connection: its requests on the main channel, from the first to the end of the session.
//! One bad peer costs one connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pcow_format::HandedBack;
use pcow_format::root::Proof;
use pcow_protocol::codec::{Connection as Codec, Received};
use pcow_protocol::message::{FrontendReply, FrontendRequest, Status};
use pcow_protocol::session::{BackendAction, BackendSession};
use pcow_protocol::uffd::Uffd;
use pcow_protocol::wire::{
    FEATURE_BOUNCE, FEATURE_QUIESCE, FEATURE_STOP, FaultFd, FrontendCode, Held, REGION_ALIGNMENT,
    REGION_DAX, REGION_LOCK, REGION_READ_ONLY, REGION_UFFD_DEVICE, Region,
};
use pcow_protocol::{Error, ErrorKind, Result};

use crate::control::events::{Event, Events};
use crate::disk::{Continuation, Disk};
use crate::endpoint::peer_process;
use crate::occupancy::Occupancy;
use crate::service::{Budgets, FaultService, Handle, Peer};
use crate::service_manager;

/// How long a frontend may take for one step of the handshake.
const HANDSHAKE_STEP: Duration = Duration::from_secs(30);

/// How long the address space of a frontend that has died may still be there.
const DEATH: Duration = Duration::from_secs(2);

/// What all connections share.
#[derive(Debug)]
pub struct Offer {
    /// What is served.
    pub disk: Arc<dyn Disk>,
    /// Limits of each session.
    pub budgets: Budgets,
    /// An open `/dev/userfaultfd`, for frontends that may not open it themselves.
    pub uffd_device: Option<OwnedFd>,
    /// The one place for a frontend.
    pub place: Occupancy,
    /// The service of the attached frontend, if there is one.
    pub session: Mutex<Handle>,
    /// Who wants to hear what happens.
    pub events: Arc<Events>,
    /// The process ends, and has flushed.
    pub ending: AtomicBool,
    /// Held while a layer is switched: no session is cleared away, and so no other one begins.
    pub switching: Mutex<()>,
}

impl Offer {
    /// What a frontend is told, and the descriptors that go with it.
    fn region(&self) -> (Region, Vec<BorrowedFd<'_>>) {
        let (image, layer) = self.disk.identity();
        // Asked once: a frontend that keeps the lock may end in between.
        let lock = self.disk.lock().map(AsFd::as_fd);
        let device = self.uffd_device.as_ref().map(AsFd::as_fd);
        let mut flags = 0;
        for (flag, set) in [
            (REGION_READ_ONLY, self.disk.read_only()),
            (REGION_DAX, self.disk.is_dax()),
            (REGION_LOCK, lock.is_some()),
            (REGION_UFFD_DEVICE, device.is_some()),
        ] {
            if set {
                flags |= flag;
            }
        }
        let region = Region {
            size: self.disk.size(),
            alignment: REGION_ALIGNMENT,
            flags,
            reserved: 0,
            image,
            layer,
        };
        (region, lock.into_iter().chain(device).collect())
    }

    /// Takes the lock that a frontend has kept from an earlier session.
    fn take_lock(&self, held: &Held, kept: OwnedFd) -> Status {
        let (image, _) = self.disk.identity();
        if held.image != image {
            log::warn!("a frontend was refused: its memory is of another image");
            return Status::from_errno(libc::ESTALE);
        }
        // Before its lock is taken: a frontend that is refused leaves nothing here.
        if let Err(status) = self.check_continuation(held.layer) {
            return status;
        }
        let refused = match self.disk.hand_back(kept) {
            Ok(Some(HandedBack::Taken)) => {
                log::info!("a frontend has come back with its memory");
                return Status::OK;
            }
            Ok(Some(HandedBack::OtherFile)) => (libc::ESTALE, "its memory is of a copy"),
            Ok(Some(HandedBack::Busy)) => (libc::EBUSY, "another process has the image"),
            Ok(None) => (libc::EINVAL, "this image has no lock that is handed back"),
            Err(e) => {
                log::warn!("a frontend was refused: {}", chain(&e));
                return Status::from_errno(libc::EINVAL);
            }
        };
        log::warn!("a frontend was refused: {}", refused.1);
        Status::from_errno(refused.0)
    }

    /// Whether a frontend that last knew `layer` as the active one can go on.
    fn check_continuation(&self, layer: [u8; 16]) -> std::result::Result<(), Status> {
        let (errno, why) = match self.disk.continuation(layer) {
            Ok(Continuation::Same) => return Ok(()),
            Ok(Continuation::Sealed(proof)) => {
                if proof == Proof::None {
                    log::warn!(
                        "leases do not work here: that nobody writes to the layer sealed last is not proved"
                    );
                }
                log::info!(
                    "the layer that a frontend knows was sealed before its backend could say so"
                );
                return Ok(());
            }
            Ok(Continuation::Changed) => (
                libc::ESTALE,
                "the image has changed since its backend ended".to_owned(),
            ),
            Err(e) if e.kind() == pcow_format::ErrorKind::Locked => (libc::EBUSY, chain(&e)),
            Err(e) => (libc::EIO, chain(&e)),
        };
        log::warn!("a frontend was refused: {why}");
        Err(Status::from_errno(errno))
    }

    /// Gives back what the attached frontend, if there is one, has only read. Its session does not end meanwhile.
    pub fn give_back(&self, deadline: Instant) {
        self.session().give_back(deadline);
    }

    /// The service of the attached frontend.
    pub fn session(&self) -> MutexGuard<'_, Handle> {
        // It is replaced as a whole.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the right to switch the layer, or for whoever does.
    pub fn switching(&self) -> MutexGuard<'_, ()> {
        // There is nothing in it.
        self.switching
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes everything stored so far durable; a failure is logged and told.
    ///
    /// # Errors
    /// `FlushFailed`, and then always.
    pub fn flush(&self) -> pcow_format::Result<()> {
        self.disk.flush().inspect_err(|e| {
            let reason = chain(e);
            log::error!("{reason}");
            self.events.tell(&Event::FlushFailed { reason });
        })
    }
}

/// A connection, with the fault service once the frontend has attached.
#[derive(Debug)]
struct Connection<'a> {
    offer: &'a Offer,
    codec: Codec<FrontendRequest>,
    session: BackendSession,
    channel: Option<UnixStream>,
    /// The layer that the frontend was told is the active one.
    told_layer: Option<[u8; 16]>,
    service: Option<FaultService>,
}

/// Serves one frontend until either side ends the session. Never fails: what goes wrong is logged.
pub fn serve(offer: &Offer, stream: UnixStream) {
    let mut connection = Connection {
        offer,
        codec: Codec::new(stream),
        session: BackendSession::new(offer.disk.size()),
        channel: None,
        told_layer: None,
        service: None,
    };
    let mut end = connection.run();
    let service = connection.service.take();
    let attached = service.is_some();
    if attached {
        offer.place.leave();
    }
    if let Some(service) = service {
        // Waits for a give-back that the end of the process has begun.
        *offer.session() = Handle::default();
        let stopped = service.stop();
        // A switch of layers that is under way rests on nothing being mapped; the next frontend would map.
        drop(offer.switching());
        if let Some(failure) = stopped.take_failure() {
            end = Err(failure);
        }
        stopped.give_back(if has_hung_up(offer, &end) {
            DEATH
        } else {
            Duration::ZERO
        });
        stopped.report();
        detach(offer);
        log::info!("frontend detached");
        service_manager::status("waiting for a virtual machine");
        offer.events.tell(&Event::FrontendDetached);
    }
    if let Err(e) = end {
        log::warn!("connection ended: {}", chain(&e));
    }
}

/// Whether a session was ended by the frontend, as one does that dies. Of one that was ended here the frontend lives, and its
/// guest waits for the next.
fn has_hung_up(offer: &Offer, end: &Result<()>) -> bool {
    let refused = |e: &Error| {
        matches!(
            e.kind(),
            ErrorKind::Violation(_)
                | ErrorKind::TimedOut
                | ErrorKind::Backlog
                | ErrorKind::Refused(_)
        )
    };
    !offer.ending.load(Ordering::SeqCst) && !end.as_ref().is_err_and(refused)
}

fn detach(offer: &Offer) {
    if !offer.ending.load(Ordering::SeqCst) {
        // What fails is told there.
        let _ = offer.flush();
    }
    if let Err(e) = offer.disk.give_back() {
        log::warn!("{}", chain(&e));
    }
    offer.place.free();
}

impl Connection<'_> {
    fn run(&mut self) -> Result<()> {
        loop {
            let received = match self.receive() {
                Ok(received) => received,
                Err(e) if e.kind() == ErrorKind::Closed => return Ok(()),
                Err(e) => return Err(e),
            };
            self.handle(received)?;
        }
    }

    /// The next request. Until a frontend is attached it has a deadline: who only connects must not take a place for ever.
    fn receive(&mut self) -> Result<Received<FrontendRequest>> {
        if self.service.is_some() {
            self.codec.recv()
        } else {
            self.codec.recv_until(Instant::now() + HANDSHAKE_STEP)
        }
    }

    fn handle(&mut self, received: Received<FrontendRequest>) -> Result<()> {
        log::debug!("{:?}", received.message);
        let action = self
            .session
            .request(&received.message, received.reply_wanted)
            .map_err(|v| Error::violation("main channel", v))?;
        match action {
            BackendAction::Nothing => Ok(()),
            BackendAction::Reply(reply) => self.reply(&reply),
            BackendAction::ReplyRegion => {
                let (region, fds) = self.offer.region();
                self.told_layer = Some(region.layer);
                let reply = FrontendReply::Region(region);
                self.codec.send(&reply.encode(), &fds)
            }
            BackendAction::TakeChannel(reply) => {
                self.channel = Some(UnixStream::from(single_fd(received.fds)?));
                reply.map_or(Ok(()), |r| self.reply(&r))
            }
            BackendAction::Attach(fault_fd) => {
                let status = self.attach(single_fd(received.fds)?, fault_fd);
                self.session.attached(status);
                self.reply(&FrontendReply::Status(FrontendCode::SetFaultFd, status))
            }
            BackendAction::TakeLock(held) => {
                let status = self.offer.take_lock(&held, single_fd(received.fds)?);
                self.reply(&FrontendReply::Status(FrontendCode::HandBack, status))
            }
            BackendAction::Quiesced(quiesced, reply) => {
                if let Some(service) = &self.service {
                    service.handle().quiesced(&quiesced);
                }
                reply.map_or(Ok(()), |r| self.reply(&r))
            }
            BackendAction::Flush => {
                let flushed = self.offer.flush();
                let status = flushed.map_or(Status::from_errno(libc::EIO), |()| Status::OK);
                self.reply(&FrontendReply::Status(FrontendCode::Flush, status))
            }
        }
    }

    fn reply(&self, reply: &FrontendReply) -> Result<()> {
        self.codec.send(&reply.encode(), &[])
    }

    fn attach(&mut self, uffd: OwnedFd, fault_fd: FaultFd) -> Status {
        if self.offer.disk.lock().is_none() {
            log::warn!(
                "a frontend was refused: another one, whose backend has ended, has the image"
            );
            return Status::from_errno(libc::EBUSY);
        }
        if !self.offer.place.take() {
            log::warn!("a second frontend was refused: one is attached already");
            return Status::from_errno(libc::EBUSY);
        }
        // Now that it has the place, no snapshot is taken without it.
        let (_, layer) = self.offer.disk.identity();
        if self.told_layer.is_some_and(|told| told != layer) {
            log::info!("a frontend has to ask again: a snapshot was taken while it came");
            self.offer.place.free();
            return Status::from_errno(libc::EAGAIN);
        }
        match self.start(uffd, fault_fd) {
            Ok(service) => {
                log::info!(
                    "frontend attached: {} mappings allowed",
                    fault_fd.mapping_limit
                );
                service_manager::status("serving a virtual machine");
                *self.offer.session() = service.handle();
                self.service = Some(service);
                let process = peer_process(self.codec.stream());
                self.offer.events.tell(&Event::FrontendAttached { process });
                Status::OK
            }
            Err(e) => {
                log::error!("frontend not attached: {}", chain(&e));
                self.offer.place.free();
                Status::from_errno(e.errno().unwrap_or(libc::EIO))
            }
        }
    }

    fn start(&mut self, uffd: OwnedFd, fault_fd: FaultFd) -> Result<FaultService> {
        let channel = self
            .channel
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Io, "there is no backend channel"))?;
        let duplicate = |s: &UnixStream| {
            s.try_clone()
                .map_err(|e| Error::io("duplicate a socket", e))
        };
        let peer = Peer {
            main: duplicate(self.codec.stream())?,
            channel: duplicate(channel)?,
            uffd: Uffd::from_peer(uffd)?,
            fault_fd,
            bounce: self.session.has(FEATURE_BOUNCE),
            quiesce: self.session.has(FEATURE_QUIESCE),
            stop: self.session.has(FEATURE_STOP),
            process: peer_process(self.codec.stream()),
        };
        let disk = Arc::clone(&self.offer.disk);
        let events = Arc::clone(&self.offer.events);
        FaultService::start(disk, peer, self.offer.budgets, events)
    }
}

/// The codec has checked that there is exactly one.
fn single_fd(fds: impl IntoIterator<Item = OwnedFd>) -> Result<OwnedFd> {
    fds.into_iter()
        .next()
        .ok_or_else(|| Error::new(ErrorKind::Io, "a file descriptor is missing"))
}

/// An error of the image and its causes in one line, with what the user can do.
pub fn with_advice(error: &pcow_format::Error) -> String {
    let advice = error.advice().map_or(String::new(), |a| format!("; {a}"));
    format!("{}{advice}", chain(error))
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}
