// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client of a backend's control socket (`docs/control.md`), which speaks the wire form of QMP.
//!
//! Trusts nothing that comes over the socket: lines are bounded, each answer has a deadline, and the greeting must name the
//! very directory that the caller means. A copied image has the socket of the original.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

/// Name of the socket in an image's directory.
pub const SOCKET_FILE: &str = "control.sock";
/// Longest message that is read, in bytes.
pub const MAX_MESSAGE_BYTES: u64 = 16 << 20;
/// How long a backend may take to greet.
const GREETING: Duration = Duration::from_secs(10);
/// Messages that may come before an answer: events.
const MAX_EVENTS: usize = 10_000;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The connection failed.
    #[error("cannot talk to the backend: {0}")]
    Io(#[from] io::Error),
    /// The peer does not keep to the wire form.
    #[error("the backend's answer cannot be understood: {0}")]
    Malformed(String),
    /// The peer serves another directory.
    #[error("the process behind {} serves another directory: {}", .socket.display(), .serves)]
    Elsewhere {
        /// The socket that was connected to.
        socket: PathBuf,
        /// What its greeting says.
        serves: String,
    },
    /// The backend refused.
    #[error("{description}")]
    Refused {
        /// `GenericError` or `CommandNotFound`.
        class: String,
        /// What it says.
        description: String,
    },
}

type Result<T> = std::result::Result<T, ControlError>;

/// What happened in the backend without being asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name.
    pub name: String,
    /// What belongs to it.
    pub data: Value,
}

/// A connection to a backend, past the negotiation.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    greeting: Value,
    events: Vec<Event>,
    last_id: u64,
}

impl Client {
    /// Connects to the backend that serves the image in the directory `image`, at `socket` if that is not in the
    /// directory. `None` if nobody listens there.
    ///
    /// # Errors
    /// `Elsewhere` if the backend serves another directory; `Io`, `Malformed`.
    pub fn connect(image: &Path, socket: Option<&Path>) -> Result<Option<Self>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(image, flags, Mode::empty()).map_err(io::Error::from)?;
        let stream = match connect(&dir, socket) {
            Ok(stream) => stream,
            Err(e) if nobody_listens(&e) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let mut client = Self {
            reader: BufReader::new(stream),
            greeting: Value::Null,
            events: Vec::new(),
            last_id: 0,
        };
        let greeting = client.read_message(Instant::now() + GREETING)?;
        client.greeting = greeting["QMP"].clone();
        let named = socket.map_or_else(|| image.join(SOCKET_FILE), Path::to_owned);
        client.check_greeting(&dir, named)?;
        client.execute("qmp_capabilities", json!({}), GREETING)?;
        Ok(Some(client))
    }

    fn check_greeting(&self, dir: &OwnedFd, socket: PathBuf) -> Result<()> {
        let image = &self.greeting["pcow"];
        let (Some(device), Some(inode)) = (image["device"].as_u64(), image["inode"].as_u64())
        else {
            let what = "it does not greet like a backend of pcow".to_owned();
            return Err(ControlError::Malformed(what));
        };
        let stat = rustix::fs::fstat(dir).map_err(io::Error::from)?;
        if (device, inode) != (stat.st_dev, stat.st_ino) {
            let serves = image["directory"]
                .as_str()
                .unwrap_or("it does not say which");
            return Err(ControlError::Elsewhere {
                socket,
                serves: serves.escape_debug().to_string(),
            });
        }
        Ok(())
    }

    /// What the backend greeted with, the value of `QMP`.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// The backend's process, as it says.
    pub fn process(&self) -> u64 {
        self.greeting["pcow"]["process"].as_u64().unwrap_or(0)
    }

    /// Has `command` carried out and returns what it returns. Events that come meanwhile are kept.
    ///
    /// # Errors
    /// `Refused`, with what the backend says; `Io`, also if it takes longer than `patience`; `Malformed`.
    pub fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        patience: Duration,
    ) -> Result<Value> {
        let deadline = Instant::now() + patience;
        self.last_id += 1;
        let request = json!({ "execute": command, "arguments": arguments, "id": self.last_id });
        let stream = self.reader.get_ref();
        stream.set_write_timeout(Some(patience))?;
        let mut stream = stream;
        stream.write_all(format!("{request}\n").as_bytes())?;
        for _ in 0..MAX_EVENTS {
            let message = self.read_message(deadline)?;
            if message.get("event").is_some() {
                self.note_event(&message);
            } else if message["id"] == self.last_id {
                return answer(message);
            } else {
                let what = "it answers something that was not asked".to_owned();
                return Err(ControlError::Malformed(what));
            }
        }
        let what = "nothing but events comes".to_owned();
        Err(ControlError::Malformed(what))
    }

    /// Waits for an event, at most `patience`; `None` if none comes.
    ///
    /// # Errors
    /// `Io`, `Malformed`.
    pub fn next_event(&mut self, patience: Duration) -> Result<Option<Event>> {
        let deadline = Instant::now() + patience;
        while self.events.is_empty() {
            match self.read_message(deadline) {
                Ok(message) => self.note_event(&message),
                Err(ControlError::Io(e)) if is_timeout(&e) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        Ok(Some(self.events.remove(0)))
    }

    fn note_event(&mut self, message: &Value) {
        if let Some(name) = message["event"].as_str() {
            self.events.push(Event {
                name: name.to_owned(),
                data: message["data"].clone(),
            });
        }
    }

    fn read_message(&mut self, deadline: Instant) -> Result<Value> {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            let have = u64::try_from(line.len()).unwrap_or(u64::MAX);
            let room = MAX_MESSAGE_BYTES.saturating_sub(have);
            let mut piece = self.reader.by_ref().take(room);
            match piece.read_until(b'\n', &mut line) {
                Ok(0) if room == 0 => {
                    return Err(ControlError::Malformed("it is too long".to_owned()));
                }
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        serde_json::from_slice(&line).map_err(|e| ControlError::Malformed(e.to_string()))
    }
}

fn answer(mut message: Value) -> Result<Value> {
    if let Some(error) = message.get("error") {
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        return Err(ControlError::Refused {
            class: text("class"),
            description: text("desc"),
        });
    }
    match message.get_mut("return") {
        Some(value) => Ok(value.take()),
        None => Err(ControlError::Malformed("it says neither yes nor no".into())),
    }
}

/// Through the open directory: its path may be longer than a socket's may be, and the directory behind it may change.
fn connect(dir: &OwnedFd, socket: Option<&Path>) -> io::Result<UnixStream> {
    let Some(socket) = socket else {
        return UnixStream::connect(inside(dir, SOCKET_FILE.as_ref()));
    };
    let name = socket
        .file_name()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let parent = match socket.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = rustix::fs::open(parent, flags, Mode::empty())?;
    UnixStream::connect(inside(&parent, name.as_ref()))
}

/// The path of `name` in the open directory `dir`, short enough for a socket (unix(7)) for every short name.
pub fn inside(dir: &OwnedFd, name: &Path) -> PathBuf {
    Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name)
}

fn nobody_listens(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    /// Answers the lines of a client with the given ones, after a greeting.
    fn peer(dir: &Path, greeting: Value, answers: Vec<String>) -> JoinHandle<()> {
        let listener = UnixListener::bind(dir.join(SOCKET_FILE)).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            writeln!(stream, "{greeting}").unwrap();
            for answer in answers {
                if lines.next().is_none() {
                    return;
                }
                // The client may have had enough already.
                let _ = stream.write_all(answer.as_bytes());
            }
        })
    }

    fn greeting_of(dir: &Path) -> Value {
        let stat = rustix::fs::stat(dir).unwrap();
        json!({ "QMP": { "pcow": { "device": stat.st_dev, "inode": stat.st_ino, "process": 7 } } })
    }

    const READY: &str = "{\"return\": {}, \"id\": 1}\n";

    #[test]
    fn events_between_a_command_and_its_answer_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let answers = "{\"event\": \"A\", \"data\": {\"x\": 1}}\n{\"return\": 5, \"id\": 2}\n";
        let answers = vec![READY.into(), answers.into()];
        let peer = peer(dir.path(), greeting_of(dir.path()), answers);
        let mut client = Client::connect(dir.path(), None).unwrap().unwrap();
        assert_eq!(client.process(), 7);
        assert_eq!(client.execute("x", json!({}), GREETING).unwrap(), 5);
        let event = client.next_event(Duration::ZERO).unwrap().unwrap();
        assert_eq!((event.name.as_str(), &event.data["x"]), ("A", &json!(1)));
        peer.join().unwrap();
    }

    #[test]
    fn a_backend_of_another_directory_is_not_asked() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let peer = peer(dir.path(), greeting_of(other.path()), vec![]);
        let refused = Client::connect(dir.path(), None).unwrap_err();
        assert!(
            matches!(refused, ControlError::Elsewhere { .. }),
            "{refused}"
        );
        peer.join().unwrap();
    }

    #[test]
    fn a_socket_that_nobody_listens_on_is_no_backend_and_no_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Client::connect(dir.path(), None).unwrap().is_none());
        drop(UnixListener::bind(dir.path().join(SOCKET_FILE)).unwrap());
        assert!(Client::connect(dir.path(), None).unwrap().is_none());
    }

    #[test]
    fn answers_that_mean_nothing_are_errors() {
        for bad in [
            "nonsense\n",
            "{}\n",
            "{\"id\": 2}\n",
            "{\"return\": 1, \"id\": 3}\n",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let answers = vec![READY.into(), bad.into()];
            let peer = peer(dir.path(), greeting_of(dir.path()), answers);
            let mut client = Client::connect(dir.path(), None).unwrap().unwrap();
            let error = client.execute("x", json!({}), GREETING).unwrap_err();
            assert!(matches!(error, ControlError::Malformed(_)), "{bad}{error}");
            peer.join().unwrap();
        }
    }
}
