// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Streams of `img`'s snapshots, and the image `copy` that they are received into.

use pcow_format::medium::Directory;
use pcow_format::ops::{Receive, Received, give_up_receiving_in, receive_in, unfinished_in};
use pcow_format::stream::Sending;
use pcow_format::{Environment, ErrorKind, Result, Stored};

use super::world::{IN_BASE, NOBODYS, OWN, World, ZERO, seam};

const COPY: &str = "copy";

/// A stream that is to be received.
#[derive(Debug)]
pub(super) struct Stream {
    bytes: Vec<u8>,
    /// Number of the snapshot that comes with it.
    number: u64,
    /// What `copy` shows without that; `None` if there is no `copy` then.
    before: Option<Vec<u8>>,
    /// What it shows with it.
    after: Vec<u8>,
    /// Whether all of it was received.
    done: bool,
}

impl World {
    /// A stream of a first snapshot.
    pub(super) fn send_one(&mut self) -> Result<()> {
        self.image_mut().snapshot(None)?;
        self.image = None;
        self.stream = Some(Stream {
            bytes: self.stream_of("1", None)?,
            number: 1,
            before: None,
            after: self.expected.clone(),
            done: false,
        });
        Ok(())
    }

    /// A stream of a second snapshot: `copy` has the first one.
    pub(super) fn send_two(&mut self) -> Result<()> {
        self.send_one()?;
        self.receive()?;
        let before = self.expected.clone();
        self.open_faulty()?;
        self.store(IN_BASE, 0x21)?;
        self.store(ZERO, 0x23)?;
        self.change(&[(OWN, 0), (NOBODYS, 0x2a)])?;
        self.image_mut().snapshot(None)?;
        self.image = None;
        self.durable = self.expected.clone();
        self.stream = Some(Stream {
            bytes: self.stream_of("2", Some("1"))?,
            number: 2,
            before: Some(before),
            after: self.expected.clone(),
            done: false,
        });
        Ok(())
    }

    /// What is missing of a first snapshot.
    pub(super) fn send_rest_of_one(&mut self) -> Result<()> {
        self.send_one()?;
        self.receive_most()?;
        self.send_rest()
    }

    /// What is missing of a second one.
    pub(super) fn send_rest_of_two(&mut self) -> Result<()> {
        self.send_two()?;
        self.receive_most()?;
        self.send_rest()
    }

    fn send_rest(&mut self) -> Result<()> {
        let unfinished = self.at_copy(unfinished_in)?.expect("some was received");
        let sending = Sending::rest(&self.stored()?, &unfinished.token())?;
        let mut bytes = Vec::new();
        sending.write(&mut bytes, &mut |_| ())?;
        let stream = self.stream.as_mut().expect("a stream");
        assert!(bytes.len() < stream.bytes.len(), "some was received");
        stream.bytes = bytes;
        Ok(())
    }

    fn stream_of(&self, snapshot: &str, from: Option<&str>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let sending = Sending::of(&self.stored()?, snapshot, from)?;
        sending.write(&mut bytes, &mut |_| ())?;
        Ok(bytes)
    }

    /// Sends the first snapshot again: it is refused, or right.
    pub(super) fn send_again(&mut self) -> Result<()> {
        let bytes = self.stream_of("1", None)?;
        assert!(bytes == self.sent().bytes, "a stream with other bytes");
        Ok(())
    }

    /// Receives the stream, unless that was done before something failed.
    pub(super) fn receive(&mut self) -> Result<()> {
        if !self.has_received() {
            let received = self.receive_bytes(&self.sent().bytes);
            // A root that may not be durable is one that a flush has failed for.
            if received.is_err() && self.has_received() && self.marked().is_ok_and(|m| m.is_empty())
            {
                panic!("what was received is there, and was refused");
            }
            received?;
        }
        self.stream.as_mut().expect("a stream").done = true;
        Ok(())
    }

    /// Receives most of the stream.
    pub(super) fn receive_most(&mut self) -> Result<()> {
        // The stream ends within its last record of data.
        let bytes = &self.sent().bytes;
        match self.receive_bytes(&bytes[..bytes.len() - 1000]) {
            Err(e) if e.kind() == ErrorKind::StreamCut => Ok(()),
            Err(e) => Err(e),
            Ok(_) => panic!("a part of a stream was received"),
        }
    }

    /// Gives up what was received of it.
    pub(super) fn give_up(&mut self) -> Result<()> {
        self.at_copy(give_up_receiving_in).map(drop)
    }

    fn receive_bytes(&self, mut bytes: &[u8]) -> Result<Received> {
        self.at_copy(|place| receive_in(place, &mut bytes, &mut |_, _| ()))
    }

    fn at_copy<T>(&self, work: impl FnOnce(&Receive<'_>) -> Result<T>) -> Result<T> {
        let (parent, env) = (&self.faulty, self.environment(true));
        work(&place(parent.as_ref(), &env))
    }

    fn sent(&self) -> &Stream {
        self.stream.as_ref().expect("a stream")
    }

    fn has_received(&self) -> bool {
        let stored = self.plain.open_dir(COPY).map_err(seam);
        let stored = stored.and_then(|dir| Stored::load(dir, self.environment(false)));
        let number = self.sent().number.to_string();
        stored.is_ok_and(|stored| stored.root().snapshot(&number).is_ok())
    }

    /// A snapshot is there as a whole or not at all; and it is there once its stream was received.
    pub(super) fn shown_by_copy(&self) -> Vec<u8> {
        let stream = self.sent();
        match &stream.before {
            Some(before) if !stream.done && !self.has_received() => before.clone(),
            _ => stream.after.clone(),
        }
    }
}

fn place<'a>(parent: &'a dyn Directory, env: &'a Environment) -> Receive<'a> {
    Receive {
        parent,
        name: COPY,
        path: COPY.as_ref(),
        env,
        rename: None,
    }
}
