// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One client of the control socket: a thread that reads requests and carries them out, and one that writes what waits.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::net::sockopt::socket_peercred;
use serde_json::{Value, json};

use super::commands::Operator;
use super::events::Queue;
use super::frame::Frames;
use super::request::{Refusal, Request, answer};

/// Read at once.
const READ_BYTES: usize = 4096;

/// A client. Dropping it waits for its threads.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl Client {
    /// Greets whoever is at the other end of `stream`, and serves it.
    ///
    /// # Errors
    /// If there is no thread or descriptor left.
    pub fn start(
        stream: UnixStream,
        greeting: &Value,
        operator: Arc<Operator>,
    ) -> io::Result<Self> {
        let peer = describe_peer(&stream);
        log::info!("control: {peer} connected");
        let queue = Arc::new(Queue::new(stream.try_clone()?));
        queue.push(greeting);
        let mut client = Self {
            stream: stream.try_clone()?,
            queue: Arc::clone(&queue),
            threads: Vec::new(),
        };
        let (to_write, from) = (stream.try_clone()?, Arc::clone(&queue));
        client.spawn("control-write", move || write_all(&to_write, &from))?;
        let session = Session {
            stream,
            queue,
            operator,
            negotiated: false,
            peer,
        };
        client.spawn("control-read", move || session.work())?;
        Ok(client)
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(work)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Whether it is gone.
    pub fn is_over(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Takes no more requests from it. What waits to be written still is, if it reads.
    pub fn end(&self) {
        // It may be gone already, which is the wanted state.
        let _ = self.stream.shutdown(Shutdown::Read);
        self.queue.close();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.end();
        // One that does not read keeps nobody from ending.
        let timeout = Some(std::time::Duration::from_secs(1));
        let _ = self.stream.set_write_timeout(timeout);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of the control socket panicked");
            }
        }
    }
}

/// Writes what waits in `queue` until it is closed or the client is gone. Then the reading side ends, too.
fn write_all(stream: &UnixStream, queue: &Queue) {
    let mut to = stream;
    while let Some(line) = queue.next() {
        if to.write_all(&line).is_err() {
            break;
        }
    }
    queue.close();
    // It may be closed already, which is the wanted state.
    let _ = stream.shutdown(Shutdown::Both);
}

/// The reading side.
#[derive(Debug)]
struct Session {
    stream: UnixStream,
    queue: Arc<Queue>,
    operator: Arc<Operator>,
    negotiated: bool,
    peer: String,
}

impl Session {
    fn work(mut self) {
        if let Err(e) = self.read() {
            log::info!("control: {}: {e}", self.peer);
        }
        self.queue.close();
        log::debug!("control: {} left", self.peer);
    }

    fn read(&mut self) -> io::Result<()> {
        let mut frames = Frames::default();
        let mut buf = [0; READ_BYTES];
        loop {
            let got = match self.stream.read(&mut buf) {
                Ok(0) => return Ok(()),
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            for byte in &buf[..got] {
                match frames.push(*byte) {
                    Ok(None) => {}
                    Ok(Some(message)) => self.handle(&message)?,
                    Err(e) => {
                        // Where the next message would begin is not known.
                        self.queue
                            .push(&answer(Err(Refusal::new(e.to_string())), None));
                        return Err(io::Error::other(e));
                    }
                }
            }
        }
    }

    fn handle(&mut self, message: &[u8]) -> io::Result<()> {
        let (answered, done) = match Request::parse(message) {
            Ok(request) => {
                log::debug!("control: {}: {}", self.peer, request.command.escape_debug());
                let (command, id) = (request.command.clone(), request.id.clone());
                let result = self.execute(request);
                let done = result.is_ok().then_some(command);
                (answer(result, id), done)
            }
            Err((refusal, id)) => (answer(Err(refusal), id), None),
        };
        if !self.queue.push(&answered) {
            return Err(io::Error::other("too much is left unread"));
        }
        if let Some(command) = done {
            self.operator.answered(&command);
        }
        Ok(())
    }

    fn execute(&mut self, request: Request) -> Result<Value, Refusal> {
        match (request.command.as_str(), self.negotiated) {
            ("qmp_capabilities", false) => self.negotiate(request),
            ("qmp_capabilities", true) => {
                let what = "capabilities have been negotiated already";
                Err(Refusal::not_found(what))
            }
            (_, false) => Err(Refusal::not_found(
                "the first command must be 'qmp_capabilities'",
            )),
            (_, true) => self.operator.execute(request, &self.peer),
        }
    }

    fn negotiate(&mut self, request: Request) -> Result<Value, Refusal> {
        let mut arguments = request.arguments;
        let wanted = arguments.list("enable")?;
        arguments.finish()?;
        if let Some(capability) = wanted.first() {
            let what = format!("the capability {capability} is not offered");
            return Err(Refusal::new(what));
        }
        self.negotiated = true;
        // Before the answer is queued: who has it misses nothing.
        self.operator.events().subscribe(&self.queue);
        Ok(json!({}))
    }
}

fn describe_peer(stream: &UnixStream) -> String {
    // A process of a namespace that is not visible from here has no number, which the type of rustix cannot hold.
    let process = crate::endpoint::peer_process(stream);
    match (process, socket_peercred(stream)) {
        (0, _) | (_, Err(_)) => "a process that cannot be seen".to_owned(),
        (process, Ok(who)) => format!(
            "process {process} (user {}, group {})",
            who.uid.as_raw(),
            who.gid.as_raw()
        ),
    }
}
