// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens without being asked for, told to every client. Whoever tells it never waits.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// Messages that may wait for a client.
const MAX_QUEUED: usize = 1024;
/// Bytes of them.
const MAX_QUEUED_BYTES: usize = 16 << 20;

/// Something that happened. `docs/control.md` says when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A frontend is served from now on.
    FrontendAttached {
        /// Its process; 0 if that cannot be seen.
        process: u32,
    },
    /// It is not any more.
    FrontendDetached,
    /// A snapshot was taken.
    SnapshotCreated {
        /// Its number.
        number: u64,
        /// Its name.
        name: String,
    },
    /// A snapshot was not taken; the guest goes on.
    SnapshotFailed {
        /// Why.
        reason: String,
    },
    /// The filesystem is nearly full, and the virtual machine was asked to stop.
    SpaceLow,
    /// The guest waits: a touch of its cannot be served.
    GuestWaits {
        /// Whether for space.
        no_space: bool,
        /// Why.
        reason: String,
    },
    /// It does not any more.
    GuestGoesOn,
    /// A flush failed: nothing that is written from now on will be promised.
    FlushFailed {
        /// Why.
        reason: String,
    },
}

impl Event {
    fn message(&self) -> Value {
        let (name, data) = match self {
            Self::FrontendAttached { process } => {
                ("FRONTEND_ATTACHED", json!({ "process": process }))
            }
            Self::FrontendDetached => ("FRONTEND_DETACHED", json!({})),
            Self::SnapshotCreated { number, name } => (
                "SNAPSHOT_CREATED",
                json!({ "number": number, "name": name }),
            ),
            Self::SnapshotFailed { reason } => ("SNAPSHOT_FAILED", json!({ "reason": reason })),
            Self::SpaceLow => ("SPACE_LOW", json!({})),
            Self::GuestWaits { no_space, reason } => {
                let data = json!({ "no-space": no_space, "reason": reason });
                ("NO_SPACE", data)
            }
            Self::GuestGoesOn => ("SPACE_AGAIN", json!({})),
            Self::FlushFailed { reason } => ("FLUSH_FAILED", json!({ "reason": reason })),
        };
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        json!({
            "event": name,
            "data": data,
            "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
        })
    }
}

/// Everybody who wants to hear.
#[derive(Debug, Default)]
pub struct Events(Mutex<Vec<Weak<Queue>>>);

impl Events {
    /// Tells `event` to every client. Never waits for any of them.
    pub fn tell(&self, event: &Event) {
        log::debug!("event: {event:?}");
        let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if queues.is_empty() {
            return;
        }
        let message = event.message();
        queues.retain(|queue| queue.upgrade().is_some_and(|q| q.push(&message)));
    }

    /// From now on `queue` gets events.
    pub fn subscribe(&self, queue: &Arc<Queue>) {
        let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        queues.push(Arc::downgrade(queue));
    }
}

#[derive(Debug, Default)]
struct State {
    messages: VecDeque<Vec<u8>>,
    bytes: usize,
    over: bool,
}

/// What waits to be written to one client.
#[derive(Debug)]
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    /// Shut down when too much waits: its writer may sleep in it.
    stream: UnixStream,
}

impl Queue {
    /// Nothing waits for the client behind `stream` yet.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            stream,
        }
    }

    /// Puts a message at the end; false if the client is gone, or has so much unread that it is given up here.
    pub fn push(&self, message: &Value) -> bool {
        let line = format!("{message}\r\n").into_bytes();
        let mut state = self.lock();
        if state.messages.len() == MAX_QUEUED || state.bytes + line.len() > MAX_QUEUED_BYTES {
            state.over = true;
            // It may be closed already, which is the wanted state.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        if !state.over {
            state.bytes += line.len();
            state.messages.push_back(line);
        }
        self.changed.notify_all();
        !state.over
    }

    /// Waits for the next message; `None` if none will come.
    pub fn next(&self) -> Option<Vec<u8>> {
        let state = self.lock();
        let mut state = self
            .changed
            .wait_while(state, |s| s.messages.is_empty() && !s.over)
            .unwrap_or_else(PoisonError::into_inner);
        let line = state.messages.pop_front()?;
        state.bytes -= line.len();
        Some(line)
    }

    /// No message comes after those that wait.
    pub fn close(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Count and list change together, and nothing between them panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> Queue {
        Queue::new(UnixStream::pair().unwrap().0)
    }

    #[test]
    fn a_client_that_does_not_read_is_given_up_and_the_others_hear_on() {
        let events = Events::default();
        let (deaf, keen) = (Arc::new(queue()), Arc::new(queue()));
        events.subscribe(&deaf);
        events.subscribe(&keen);
        for _ in 0..=MAX_QUEUED {
            events.tell(&Event::FrontendDetached);
            let line = String::from_utf8(keen.next().unwrap()).unwrap();
            assert!(line.contains("FRONTEND_DETACHED") && line.ends_with("\r\n"));
        }
        assert!(deaf.lock().over && !keen.lock().over);
        assert_eq!(
            events.0.lock().unwrap().len(),
            1,
            "nobody keeps what is lost"
        );
    }

    #[test]
    fn a_closed_queue_gives_out_what_it_has() {
        let queue = queue();
        assert!(queue.push(&json!(1)));
        queue.close();
        assert!(!queue.push(&json!(2)));
        assert_eq!(queue.next().as_deref(), Some(&b"1\r\n"[..]));
        assert_eq!(queue.next(), None);
    }
}
