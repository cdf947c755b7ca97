// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One connection to a backend, from the handshake to its end.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::attach::MainChannel;
use super::link::{Ended, Link};
use super::mapper::{Mapper, Surface};
use crate::codec::Connection;
use crate::error::{Error, ErrorKind, Result};
use crate::session::{Mappings, Rules};
use crate::wire::{self, FaultFd};

/// A session that is served.
#[derive(Debug)]
pub(super) struct Session {
    main: Mutex<MainChannel>,
    link: Arc<Link>,
    mapper: Mutex<Option<JoinHandle<()>>>,
}

impl Session {
    /// Serves the backend channel, then hands over the userfaultfd.
    pub(super) fn open(
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
            notifier: Arc::new(main.notifier()?),
            drainer: None,
            surface,
        };
        let mapper = mapper.start(Arc::clone(&link))?;
        let session = Self {
            main: Mutex::new(main),
            link,
            mapper: Mutex::new(Some(mapper)),
        };
        let fault_fd = FaultFd {
            base: region.as_ptr().addr() as u64,
            size: offered.size,
            mapping_limit,
            reserved: 0,
        };
        let channel = OwnedFd::from(theirs);
        let uffd = region.uffd().as_fd();
        session
            .main()
            .hand_over(fault_fd, channel, uffd, deadline)?;
        Ok(session)
    }

    /// Its two sockets, and how it ended.
    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// One flush. [`ErrorKind::Detached`] if the session is over before it is answered.
    pub(super) fn flush(&self) -> Result<()> {
        let mut main = self.main();
        if let Some(Ended { reason, .. }) = self.link.ended() {
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

    /// Ends the session; when this returns its mapping thread changes the region no more.
    pub(super) fn close(&self, reason: &str) {
        self.link.end(reason);
        let mapper = self
            .mapper
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(mapper) = mapper
            && mapper.join().is_err()
        {
            log::error!("the mapping thread panicked");
        }
    }

    fn main(&self) -> MutexGuard<'_, MainChannel> {
        self.main.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close("the frontend left");
    }
}
