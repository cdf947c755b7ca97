// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control socket: what operators and `pcow-img` ask and order while an image is served, and what they are told. The
//! wire form is QMP's; `docs/control.md` is the contract.
//!
//! ```text
//! client ──▶ reader ──▶ frames ──▶ request ──▶ commands ──▶ operator (the image, the session)
//!    ▲                                             │
//!    └───── writer ◀── queue ◀─── answers ─────────┘
//!                        ▲
//!                        └─────── events ◀── whoever has something to tell
//! ```
//!
//! Each client has a thread that reads and carries out, and one that writes. Whoever tells something only puts it into
//! queues of bounded length: a client that does not read is dropped, and nobody waits for it.
//!
//! Knows neither faults nor the layout of an image: what can be asked is behind [`commands::Operator`].

mod client;
pub mod commands;
pub mod events;
mod frame;
mod request;
mod snapshot;
mod socket;

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::readiness;
use client::Client;
use commands::Operator;
pub use socket::{Access, Socket};

/// Clients at a time.
const MAX_CLIENTS: usize = 32;

/// A running control socket.
#[derive(Debug)]
pub struct Control {
    socket: Arc<Socket>,
    stop: Arc<std::os::fd::OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Begins to serve `operator` on `socket`.
    ///
    /// # Errors
    /// If there is no thread or descriptor left.
    pub fn start(socket: Socket, operator: Operator) -> Result<Self, Failure> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Failure::new("cannot create an eventfd").caused_by(&e))?;
        let (socket, stop) = (Arc::new(socket), Arc::new(stop));
        let acceptor = Acceptor {
            greeting: greeting(&socket, &operator),
            socket: Arc::clone(&socket),
            stop: Arc::clone(&stop),
            operator: Arc::new(operator),
            clients: Mutex::default(),
        };
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || acceptor.work())
            .map_err(|e| Failure::new("cannot start a thread").caused_by(&e))?;
        Ok(Self {
            socket,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Control {
    /// Ends all connections; a command that is under way is waited for.
    fn drop(&mut self) {
        // The counter cannot overflow.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            log::error!("the thread of the control socket panicked");
        }
        self.socket.remove();
    }
}

#[derive(Debug)]
struct Acceptor {
    greeting: Value,
    socket: Arc<Socket>,
    stop: Arc<std::os::fd::OwnedFd>,
    operator: Arc<Operator>,
    clients: Mutex<Vec<Client>>,
}

impl Acceptor {
    fn work(&self) {
        while self.wait() {
            match self.socket.accept() {
                Ok(Some(stream)) => self.admit(stream),
                Ok(None) => {}
                Err(e) => {
                    log::warn!("control: cannot accept a connection: {e}");
                    // The listener stays readable: without a pause this would be a busy loop.
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
        let clients = std::mem::take(&mut *self.clients());
        clients.iter().for_each(Client::end);
        // Joined as they are dropped.
    }

    /// False when it is time to stop.
    fn wait(&self) -> bool {
        let mut fds = [
            PollFd::new(&*self.stop, PollFlags::IN),
            PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN),
        ];
        match readiness::wait(&mut fds, None) {
            Ok(()) => fds[0].revents().is_empty(),
            Err(e) => {
                // It has taken its time. Clients that came would wait for ever if nobody looked any more.
                log::error!("control: cannot wait for connections: {e}");
                rustix::io::read(&*self.stop, &mut [0_u8; 8]).is_err()
            }
        }
    }

    fn admit(&self, stream: UnixStream) {
        let mut clients = self.clients();
        clients.retain(|c| !c.is_over());
        if clients.len() >= MAX_CLIENTS {
            log::warn!("control: a connection was refused: there are {MAX_CLIENTS} already");
            return;
        }
        match Client::start(stream, &self.greeting, Arc::clone(&self.operator)) {
            Ok(client) => clients.push(client),
            Err(e) => log::warn!("control: a connection was refused: {e}"),
        }
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, Vec<Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What each client is greeted with. `qemu` is part of the form: clients insist on it.
fn greeting(socket: &Socket, operator: &Operator) -> Value {
    let number = |part: &str| part.parse::<u32>().unwrap_or(0);
    let image = socket.image();
    json!({
        "QMP": {
            "version": {
                "qemu": {
                    "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
                    "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
                    "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
                },
                "package": concat!("pcow-backend ", env!("CARGO_PKG_VERSION")),
            },
            "capabilities": [],
            "pcow": {
                "directory": image.path,
                "device": image.device,
                "inode": image.inode,
                "image": operator.image_uuid().to_string(),
                "process": std::process::id(),
            },
        }
    })
}
