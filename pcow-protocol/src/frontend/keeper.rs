// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Keeps a session going: when one ends, connects again until a backend takes the region over.
//!
//! ```text
//!            end of the session                    a backend has taken it
//! attached ────────────────────▶ waiting ─────────────────────────▶ attached
//!                                 │   ▲ pause, longer each time
//!                                 └───┘ no backend, or one that is refused or refuses
//! ```
//!
//! A thread of its own does that. It touches no guest memory and waits for nobody who may (F6).

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::attach::{MainChannel, connect_until};
use super::limit::mapping_limit;
use super::link::{Ended, LinkStatus};
use super::mapper::Surface;
use super::session::Session;
use super::{FrontendOptions, wanted_features};
use crate::error::{Chain, Error, ErrorKind, Result};

/// A pause between two attempts is this part of the time that memory has waited so far: a backend that comes is noticed a
/// quarter later than it could be at most.
const PAUSE_SHARE: u32 = 4;
/// The first pause.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a backend may take to accept a connection. One that listens and is busy is not worth more than another try.
const CONNECT: Duration = Duration::from_secs(1);
/// After how long the log says for the first time that memory still waits, and the longest time until it says so again.
const FIRST_REMINDER: Duration = Duration::from_secs(10);
const LONGEST_REMINDER: Duration = Duration::from_secs(600);

/// Sessions of one region, one after the other.
#[derive(Debug)]
pub(super) struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Where to connect again; `None` if that is not wanted.
    path: Option<PathBuf>,
    options: FrontendOptions,
    surface: Surface,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    session: Arc<Session>,
    /// Why the last attempt failed, since the session ended.
    failure: Option<String>,
    /// The connection of an attempt under way, to be ended from elsewhere.
    attempt: Option<UnixStream>,
    stopping: bool,
}

impl Keeper {
    /// Keeps `session` going, with connections to `path`, or not beyond its end.
    pub(super) fn start(
        path: Option<&Path>,
        options: FrontendOptions,
        surface: Surface,
        session: Session,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            path: path.filter(|_| options.reconnect).map(Path::to_owned),
            options,
            surface,
            state: Mutex::new(State {
                session: Arc::new(session),
                failure: None,
                attempt: None,
                stopping: false,
            }),
            changed: Condvar::new(),
        });
        let mut keeper = Self {
            shared,
            thread: None,
        };
        if keeper.shared.path.is_some() {
            let shared = Arc::clone(&keeper.shared);
            let thread = std::thread::Builder::new()
                .name("pcow-keeper".into())
                .spawn(move || shared.run())
                .map_err(|e| Error::io("start the keeping thread", e))?;
            keeper.thread = Some(thread);
        }
        Ok(keeper)
    }

    pub(super) fn status(&self) -> LinkStatus {
        let state = self.shared.lock();
        let Some(Ended { reason, at }) = state.session.link().ended() else {
            return LinkStatus::Attached;
        };
        if self.shared.path.is_none() {
            return LinkStatus::Detached(reason);
        }
        LinkStatus::Waiting {
            reason: state.failure.clone().unwrap_or(reason),
            since: at,
        }
    }

    pub(super) fn wait_detached(&self, timeout: Duration) -> bool {
        let session = Arc::clone(&self.shared.lock().session);
        session.link().wait_ended(timeout)
    }

    pub(super) fn wait_attached(&self, timeout: Duration) -> bool {
        let state = self.shared.lock();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, timeout, |state| !state.is_attached());
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_attached()
    }

    /// A flush by whichever backend answers it. One that an end of a session has cut off is begun again with the next:
    /// what was stored before is in the same files.
    pub(super) fn flush(&self) -> Result<()> {
        loop {
            let session = self.shared.attached();
            match session.flush() {
                Err(e) if e.kind() == ErrorKind::Detached && self.shared.path.is_some() => {}
                other => return other,
            }
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stopping = true;
        state.session.link().end("the frontend left");
        if let Some(attempt) = state.attempt.take() {
            // One whose peer is gone cannot be shut down, and need not be.
            let _ = attempt.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the keeping thread panicked");
        }
    }
}

impl State {
    fn is_attached(&self) -> bool {
        self.session.link().ended().is_none()
    }
}

impl Shared {
    /// The present session; waits for the next if it is over and there will be one.
    fn attached(&self) -> Arc<Session> {
        let state = self.lock();
        let waits = |state: &mut State| self.path.is_some() && !state.is_attached();
        let state = self.changed.wait_while(state, waits);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&state.session)
    }

    fn run(&self) {
        loop {
            let session = Arc::clone(&self.lock().session);
            let ended = session.link().wait_end();
            // From here on nobody but this thread changes the region.
            session.close(&ended.reason);
            drop(session);
            if self.lock().stopping {
                return;
            }
            log::warn!(
                "the backend is gone ({}): memory that is not mapped waits for the next",
                ended.reason
            );
            let Some(next) = self.next_session(&ended) else {
                return;
            };
            log::info!("attached again after {} ms", ended.at.elapsed().as_millis());
            let mut state = self.lock();
            state.session = Arc::new(next);
            state.failure = None;
            if state.stopping {
                state.session.link().end("the frontend left");
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Tries until there is a session; `None` when it is time to stop.
    fn next_session(&self, ended: &Ended) -> Option<Session> {
        let mut reminder = FIRST_REMINDER;
        let mut remind_at = ended.at + reminder;
        loop {
            match self.attempt() {
                Ok(session) => return Some(session),
                Err(error) => self.note_failure(&error),
            }
            if Instant::now() >= remind_at {
                self.remind(ended);
                reminder = (reminder * 2).min(LONGEST_REMINDER);
                remind_at = Instant::now() + reminder;
            }
            let pause = ended.at.elapsed() / PAUSE_SHARE;
            if self.pause(pause.clamp(FIRST_PAUSE, LONGEST_PAUSE)) {
                return None;
            }
        }
    }

    fn attempt(&self) -> Result<Session> {
        let path = self.path.as_deref().expect("nobody keeps without a path");
        let now = Instant::now();
        let deadline = now + self.options.handshake_timeout;
        let stream = connect_until(path, deadline.min(now + CONNECT))?;
        self.note_attempt(&stream)?;
        let session = self.negotiate(stream, deadline);
        self.lock().attempt = None;
        session
    }

    /// `protocol.md` section 6.1, from step 2 on; `Session::close` was step 1.
    fn negotiate(&self, stream: UnixStream, deadline: Instant) -> Result<Session> {
        let kept = &self.surface.kept;
        let wanted = wanted_features(&self.options);
        let (mut main, offer) = MainChannel::negotiate(stream, wanted, deadline)?;
        kept.check(&offer, main.features())?;
        // Nothing of the old backend's may be seen by the new one as its own. A copy that an old backend in its last moments
        // still makes is right, and is replaced like every read copy when its cluster is mapped.
        self.surface.start_anew()?;
        if let Some((held, lock)) = kept.held() {
            main.hand_back(held, lock, deadline)?;
        }
        let limit = mapping_limit(self.options.mapping_limit)?;
        // Before the session, in which the backend may name another layer.
        kept.note(offer.region);
        Session::open(main, self.surface.clone(), &offer.region, limit, deadline)
    }

    /// Lets the end of the frontend end the attempt.
    fn note_attempt(&self, stream: &UnixStream) -> Result<()> {
        let clone = stream
            .try_clone()
            .map_err(|e| Error::io("duplicate the main channel", e))?;
        let mut state = self.lock();
        if state.stopping {
            return Err(Error::new(ErrorKind::Detached, "the frontend left"));
        }
        state.attempt = Some(clone);
        Ok(())
    }

    /// A refusal is logged once; that nobody listens is what waiting is.
    fn note_failure(&self, error: &Error) {
        let text = Chain(error).to_string();
        let mut state = self.lock();
        let is_refusal = matches!(
            error.kind(),
            ErrorKind::Mismatch | ErrorKind::Refused(_) | ErrorKind::NotPcow
        );
        if is_refusal && !state.stopping && state.failure.as_ref() != Some(&text) {
            log::warn!("a backend is there, but memory goes on waiting: {text}");
        }
        state.failure = Some(text);
    }

    fn remind(&self, ended: &Ended) {
        let failure = self.lock().failure.clone();
        log::warn!(
            "memory that is not mapped has waited for a backend for {} s ({})",
            ended.at.elapsed().as_secs(),
            failure.as_deref().unwrap_or(&ended.reason)
        );
    }

    /// Waits; true when it is time to stop.
    fn pause(&self, pause: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), pause, |state| !state.stopping);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.stopping
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
