// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The leader's part: read events and answers, send what waits. It never blocks in anything but its own poll (F4): the
//! frontend sleeps in UNMAP until the event of its move is read here.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pcow_protocol::codec::Reader;
use pcow_protocol::message::BackendReply;
use pcow_protocol::uffd::{Event, EventBuffer};
use pcow_protocol::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::board::{Claim, Fault, Touch};
use super::channel::Asked;
use super::origin::Origin;
use super::{Counters, Shared};
use crate::disk::FileKey;
use crate::readiness;

/// How often a fault that could not be resolved is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How long a frontend may take to look at the disk's file.
const REGISTER_DEADLINE: Duration = Duration::from_secs(10);

/// What only the present leader uses.
#[derive(Debug)]
struct Desk {
    reader: Reader<BackendReply>,
    events: EventBuffer,
    /// When what has stalled is tried again; `None` while nothing has.
    retry_at: Option<Instant>,
}

/// The reading side of a session.
#[derive(Debug)]
pub(super) struct Leader {
    shared: Arc<Shared>,
    /// Never contended: there is one leader at a time.
    desk: Mutex<Desk>,
}

#[derive(Debug, Clone, Copy)]
struct Ready {
    events: bool,
    channel: bool,
}

impl Leader {
    pub(super) fn new(shared: Arc<Shared>) -> Result<Self> {
        let desk = Desk {
            reader: Reader::default(),
            events: EventBuffer::default(),
            retry_at: None,
        };
        Ok(Self {
            shared,
            desk: Mutex::new(desk),
        })
    }

    /// Registers `file` and waits for the frontend's answer, before the crew exists.
    pub(super) fn register_and_wait(&self, file: FileKey) -> Result<()> {
        let s = &self.shared;
        s.channel.register(s.disk.as_ref(), file)?;
        let deadline = Instant::now() + REGISTER_DEADLINE;
        let mut desk = self.desk.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(
                    ErrorKind::TimedOut,
                    "wait for the frontend to register a file",
                ));
            }
            self.wait(Some(left))?;
            s.channel.flush()?;
            if let Some(reply) = desk.reader.try_next(s.channel.socket())? {
                s.channel.answered(&reply.message)?;
                return match reply.message.status.errno() {
                    None => Ok(()),
                    Some(errno) => Err(Error::refused("register the image's data file", errno)),
                };
            }
        }
    }

    /// Leads until a fault can be taken over from the queue, or the session ends.
    pub(super) fn lead(&self) -> Option<(Fault, Claim)> {
        let mut desk = self.desk.lock().unwrap_or_else(PoisonError::into_inner);
        let scope = |offset| self.shared.disk.scope(offset);
        while !self.shared.board.is_stopping() {
            if let Err(e) = self.look(&mut desk) {
                let own_wish = matches!(e.kind(), ErrorKind::Closed);
                self.shared.end((!own_wish).then_some(e));
                break;
            }
            if let Some(job) = self.shared.board.relieve(&scope) {
                return Some(job);
            }
        }
        None
    }

    fn look(&self, desk: &mut Desk) -> Result<()> {
        let s = &self.shared;
        let patience = self.retry_stalled(&mut desk.retry_at);
        let ready = self.wait(patience)?;
        if s.channel.is_waiting() {
            s.channel.flush()?;
        }
        if ready.channel {
            while let Some(reply) = desk.reader.try_next(s.channel.socket())? {
                self.answer(&reply.message)?;
            }
        }
        if ready.events {
            for event in s.uffd.read_events(&mut desk.events)? {
                self.post(event);
            }
        }
        Ok(())
    }

    /// Queues what has stalled again when it is time, however much else there is to do; returns how long until then.
    fn retry_stalled(&self, retry_at: &mut Option<Instant>) -> Option<Duration> {
        if self.shared.board.stalled() == 0 {
            *retry_at = None;
            return None;
        }
        let now = Instant::now();
        let at = *retry_at.get_or_insert(now + RETRY);
        if at > now {
            return Some(at - now);
        }
        self.shared.board.retry_stalled();
        *retry_at = Some(now + RETRY);
        Some(RETRY)
    }

    fn wait(&self, patience: Option<Duration>) -> Result<Ready> {
        let s = &self.shared;
        let kicked = s.channel.kicked();
        let mut channel = PollFlags::IN;
        if s.channel.is_waiting() {
            channel |= PollFlags::OUT;
        }
        let mut fds = [
            PollFd::new(&s.uffd, PollFlags::IN),
            PollFd::from_borrowed_fd(s.channel.socket().as_fd(), channel),
            PollFd::from_borrowed_fd(kicked.as_fd(), PollFlags::IN),
        ];
        readiness::wait(&mut fds, patience).map_err(|e| Error::io("wait for events", e))?;
        let [events, channel, kick] = fds.map(|fd| fd.revents());
        if !kick.is_empty() {
            s.channel.clear_kick();
        }
        if events.intersects(PollFlags::ERR | PollFlags::NVAL) {
            // The peer made it blocking, or it is no userfaultfd of a living process.
            return Err(Error::io("poll the userfaultfd", Errno::IO));
        }
        Ok(Ready {
            events: events.contains(PollFlags::IN),
            channel: channel.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR),
        })
    }

    fn post(&self, event: Event) {
        let s = &self.shared;
        // A REMAP event is done with by reading it: its mover goes on.
        let Event::Fault {
            address,
            write,
            wp,
            thread,
        } = event
        else {
            return;
        };
        let offset = address.wrapping_sub(s.base);
        if offset >= s.disk.size() {
            // Another range of the peer's process; nobody promised to serve it.
            log::debug!("fault at {address:#x} outside of the region");
            return;
        }
        let touch = if (write || wp) && !s.disk.read_only() {
            self.writer(thread, offset, wp)
        } else {
            Touch::Load
        };
        s.counters.add_fault(touch);
        log::trace!("fault at {offset:#x} by thread {thread}: {touch:?}");
        s.board.post(Fault { offset, touch });
    }

    /// What a request of `thread` for write access at `offset` means. Reads of /proc do not wait for the frontend's memory (F4).
    fn writer(&self, thread: u32, offset: u64, present: bool) -> Touch {
        let s = &self.shared;
        let origin = s.origins().of(thread);
        s.tell_how_loads_are_known(origin);
        match origin {
            Origin::Storing => Touch::Store { sure: true },
            Origin::Worker if s.may_bounce => {
                Counters::add(&s.counters.workers);
                s.bounces.asks_again(thread, offset);
                Touch::Unknown {
                    worker: thread,
                    present,
                }
            }
            Origin::Worker => {
                Counters::add(&s.counters.workers);
                Touch::Store { sure: false }
            }
            Origin::Unclear => {
                Counters::add(&s.counters.unclear);
                Touch::Store { sure: false }
            }
        }
    }

    fn answer(&self, reply: &BackendReply) -> Result<()> {
        let s = &self.shared;
        let asked = s.channel.answered(reply)?;
        match (&asked, reply.status.errno()) {
            (Asked::Mapped(bytes), None) => {
                s.copies.forget(bytes);
                s.bounces.forget(bytes);
            }
            (Asked::Mapped(_), Some(libc::ENOMEM)) => {
                log::warn!("the frontend has no mappings left; using fewer from now on");
            }
            // It was done; who waits for it hears that device I/O may still have the old pages.
            (Asked::Unmapped, Some(libc::EBUSY)) => {}
            (Asked::Mapped(_) | Asked::Slot | Asked::Unmapped, Some(errno)) => {
                return Err(Error::refused(format!("{asked:?}"), errno));
            }
            (Asked::Evicted, errno) => {
                s.copies.left();
                if let Some(errno) = errno {
                    return Err(Error::refused("evict a read copy", errno));
                }
            }
            (Asked::Bounced(offset), Some(libc::EBUSY | libc::ENOMEM)) => {
                self.bounce_refused(*offset);
            }
            (Asked::Bounced(_), Some(errno)) => return Err(Error::refused("bounce a page", errno)),
            // Who asked hears it.
            (Asked::Reset | Asked::Quiescing, _) => {}
            (Asked::Slot | Asked::Unmapped | Asked::Bounced(_), None) => {}
        }
        Ok(())
    }

    /// System calls of the frontend's would have failed in the moment, or it has no mapping left for it. The worker still waits: what it wants is taken for
    /// a store.
    fn bounce_refused(&self, offset: u64) {
        let s = &self.shared;
        s.bounces.refused(offset);
        Counters::add(&s.counters.on_touch);
        let touch = Touch::Store { sure: false };
        s.board.post(Fault { offset, touch });
    }
}
