// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon: accepts frontends, has what they store flushed, ends cleanly.

mod flusher;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};

use crate::connection::{self, Offer, chain};
use crate::endpoint::Endpoint;
use crate::failure::Failure;
use crate::readiness;
use crate::service_manager;
use crate::signals::Signals;
use flusher::Flusher;

/// Connections at a time: one frontend, and others that find that out.
const MAX_CONNECTIONS: usize = 16;

/// How long it takes at most until a connection that has ended is noticed.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a clean end may take to give back what a guest has only read. What remains stays data.
const GIVE_BACK: Duration = Duration::from_secs(60);

/// A running connection.
#[derive(Debug)]
struct Running {
    /// Shut down to end it.
    stream: UnixStream,
    thread: JoinHandle<()>,
}

/// The wish that the daemon ends.
#[derive(Debug)]
pub struct Quit(OwnedFd);

impl Quit {
    /// Nobody wishes it yet.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new() -> Result<Self, Failure> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC);
        fd.map(Self)
            .map_err(|e| Failure::new("cannot create an eventfd").caused_by(&e))
    }

    /// Asks for the end.
    pub fn ask(&self) {
        // The counter cannot overflow.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

/// The daemon.
#[derive(Debug)]
pub struct Server {
    offer: Arc<Offer>,
    quit: Arc<Quit>,
    flush_interval: Option<Duration>,
    running: Mutex<Vec<Running>>,
}

impl Server {
    /// A daemon for `offer`, until `quit` is asked for.
    pub fn new(offer: Arc<Offer>, quit: Arc<Quit>, flush_interval: Option<Duration>) -> Self {
        Self {
            offer,
            quit,
            flush_interval,
            running: Mutex::default(),
        }
    }

    /// Serves frontends from `endpoint` until a signal comes, or the only connection ends.
    ///
    /// # Errors
    /// If waiting fails, or what was written cannot be flushed at the end.
    pub fn run(&self, endpoint: &Endpoint, signals: &Signals) -> Result<(), Failure> {
        // Before anybody can store: if it cannot start, there is nothing to flush.
        let flusher = self
            .flush_interval
            .map(|interval| {
                Flusher::start(Arc::clone(&self.offer), Arc::clone(&self.quit), interval)
            })
            .transpose()?;
        let connected = self.connect_first(endpoint);
        let served = connected.and_then(|()| self.serve(endpoint, signals));
        // However it ends, what was stored is flushed.
        let finished = self.finish(flusher);
        served.and(finished)
    }

    /// Serves the connection that there is from the beginning.
    fn connect_first(&self, endpoint: &Endpoint) -> Result<(), Failure> {
        let Endpoint::Connected(stream) = endpoint else {
            return Ok(());
        };
        let stream = stream
            .try_clone()
            .map_err(|e| Failure::new("cannot use the socket of --fd").caused_by(&e))?;
        self.connect(stream)
    }

    fn serve(&self, endpoint: &Endpoint, signals: &Signals) -> Result<(), Failure> {
        loop {
            let woken = wait(endpoint, signals, &self.quit)?;
            if woken.signal || woken.quit {
                let why = if woken.signal { signals.take() } else { "quit" };
                log::info!("{why}: ending");
                service_manager::stopping();
                if self.offer.place.is_attached() {
                    log::warn!(
                        "a frontend is attached: memory that it has not touched yet will wait for the next backend"
                    );
                }
                return Ok(());
            }
            if let (true, Endpoint::Listening(listener, _)) = (woken.listener, endpoint) {
                match listener.accept() {
                    Ok(Some(stream)) => self.admit(stream),
                    Ok(None) => {}
                    Err(e) => {
                        log::warn!("cannot accept a connection: {}", chain(&e));
                        // The listener stays readable: without a pause this would be a busy loop.
                        std::thread::sleep(Duration::from_millis(100));
                    }
                }
            }
            let left = self.reap();
            if left == 0 && matches!(endpoint, Endpoint::Connected(_)) {
                return Ok(());
            }
        }
    }

    /// Serves a connection that came in. One that cannot be served costs nobody but its peer.
    fn admit(&self, stream: UnixStream) {
        if self.reap() >= MAX_CONNECTIONS {
            log::warn!("a connection was refused: there are {MAX_CONNECTIONS} already");
        } else if let Err(e) = self.connect(stream) {
            log::warn!("a connection was refused: {e}");
        }
    }

    fn connect(&self, stream: UnixStream) -> Result<(), Failure> {
        let to_end = stream
            .try_clone()
            .map_err(|e| Failure::new("cannot duplicate a socket").caused_by(&e))?;
        let offer = Arc::clone(&self.offer);
        let thread = std::thread::Builder::new()
            .name("frontend".into())
            .spawn(move || connection::serve(&offer, stream))
            .map_err(|e| Failure::new("cannot start a thread").caused_by(&e))?;
        self.lock().push(Running {
            stream: to_end,
            thread,
        });
        Ok(())
    }

    /// Forgets connections that have ended; returns how many are left.
    fn reap(&self) -> usize {
        let mut running = self.lock();
        running.retain(|r| !r.thread.is_finished());
        running.len()
    }

    /// Makes everything durable, then ends all sessions. In this order, since a guest pauses from the end of its session to
    /// the first fault that the next backend serves. What it stores in between is in the page cache, where that one finds
    /// it; a guest goes on storing to what it has mapped anyway, so no flush at the very end would be the last.
    fn finish(&self, flusher: Option<Flusher>) -> Result<(), Failure> {
        // The guest goes on storing meanwhile, and flushes go on.
        self.offer.give_back(Instant::now() + GIVE_BACK);
        let flushed = match flusher {
            Some(flusher) => flusher.end(),
            None => self.offer.flush(),
        };
        self.offer.ending.store(true, Ordering::SeqCst);
        for running in self.lock().drain(..) {
            // It may have ended by itself.
            let _ = running.stream.shutdown(std::net::Shutdown::Both);
            if running.thread.join().is_err() {
                log::error!("a connection's thread panicked");
            }
        }
        Ok(flushed?)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Clone, Copy)]
struct Woken {
    listener: bool,
    signal: bool,
    quit: bool,
}

/// Waits for a connection or a signal, and not for long: connections that have ended are noticed then.
fn wait(endpoint: &Endpoint, signals: &Signals, quit: &Quit) -> Result<Woken, Failure> {
    let signal = PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN);
    let quit = PollFd::from_borrowed_fd(quit.0.as_fd(), PollFlags::IN);
    let mut fds = vec![signal, quit];
    if let Some(listener) = endpoint.listener_fd() {
        fds.push(PollFd::from_borrowed_fd(listener, PollFlags::IN));
    }
    readiness::wait(&mut fds, Some(PATIENCE))
        .map_err(|e| Failure::new("cannot wait for frontends").caused_by(&e))?;
    Ok(Woken {
        signal: !fds[0].revents().is_empty(),
        quit: !fds[1].revents().is_empty(),
        listener: fds.get(2).is_some_and(|f| !f.revents().is_empty()),
    })
}
