// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Streams that are received: in two pieces, since the first is cut off.

use std::sync::Arc;

use pcow_format::ErrorKind;
use pcow_format::ops::{Received, receive_in};
use pcow_format::stream::{Header, Named, Sending, Writer};
use uuid::Uuid;

use super::Run;
use crate::model::{CLUSTER_BYTES, Contents, Model};
use crate::setting::{self, environment, receive_place, text};

/// What a stream is of, and two pieces of it: a beginning, and what is missing then.
type Stream = (Contents, Vec<u8>, Vec<u8>);

impl Run<'_> {
    /// The image gets a snapshot that somebody has made of its newest one.
    pub(super) fn receive(&mut self) -> Result<bool, String> {
        self.snapshot()?;
        let (contents, begin, rest) = self.changes()?;
        let name = self.slot().name.to_owned();
        let after = self.model().with_disk(contents.clone()).with_snapshot();
        self.slot_mut().image = None;
        self.receive_pieces(&name, (contents, begin, rest), after)
    }

    /// A copy of the image's newest snapshot.
    pub(super) fn receive_new(&mut self) -> Result<bool, String> {
        self.snapshot()?;
        self.clones += 1;
        let name = format!("clone-{}", self.clones);
        let stored = setting::stored(&self.sim, self.slot().name, self.boot)?;
        let newest = self.model().snapshots.last().cloned();
        let newest = newest.ok_or("no snapshot")?;
        let sending = Sending::of(&stored, &newest.number.to_string(), None).map_err(text)?;
        let mut stream = Vec::new();
        sending.write(&mut stream, &mut |_| ()).map_err(text)?;
        // Within the second record, if there are so many.
        let cut = stream.len().min(512 + 32 + 8192 + 40) - 1;
        let after = self.model().with_clone(&name);
        let begin = stream[..cut].to_vec();
        self.slot_mut().image = None;
        self.receive_pieces(&name, (newest.contents, begin, stream), after)
    }

    fn receive_pieces(&mut self, name: &str, stream: Stream, after: Model) -> Result<bool, String> {
        let (contents, begin, rest) = stream;
        let receiving = Some((name.to_owned(), contents));
        // What is left of the partial image is looked at afterwards, too: as long as it has its name it must be whole.
        let mut after = after;
        after.receiving.clone_from(&receiving);
        self.slot_mut().model.receiving = receiving;
        self.transition(&[], |run| match run.receive_piece(name, &begin) {
            Err(e) if e.kind() == ErrorKind::StreamCut => Ok(()),
            Err(e) => Err(text(e)),
            Ok(_) => Err("half of a stream was received".to_owned()),
        })?;
        self.transition(&[after], |run| run.receive_piece(name, &rest).map_err(text))?;
        self.slot_mut().unflushed.clear();
        let image = setting::open(&self.sim, self.slot().name, self.boot);
        let image = self.transition(&[], |_| image)?;
        self.slot_mut().image = Some(Arc::new(image));
        Ok(true)
    }

    fn receive_piece(&self, name: &str, mut stream: &[u8]) -> pcow_format::Result<Received> {
        let top = self.sim.top();
        let env = environment(&self.sim, self.boot);
        let place = receive_place(top.as_ref(), name, &env);
        receive_in(&place, &mut stream, &mut |_, _| ())
    }

    /// A stream that somebody else makes: a tracked cluster gets bytes, the next one zeros, another one bytes again.
    fn changes(&self) -> Result<Stream, String> {
        let image = self.image();
        let from = image
            .root()
            .snapshots
            .last()
            .ok_or("no snapshot was taken")?;
        let header = Header {
            image: Uuid::from_u128(0x5e4d),
            snapshot: Named {
                uuid: Uuid::new_v4(),
                number: from.number + 1,
                name: format!("received-{}", from.number + 1),
            },
            time: 1,
            from: Some(Named {
                uuid: from.uuid,
                number: from.number,
                name: from.name.clone(),
            }),
            size: image.virtual_size(),
            cluster: image.cluster_size(),
            start: 0,
        };
        let mut contents = self.model().disk.now().clone();
        let mut places: Vec<_> = self
            .setting
            .plan()
            .clusters
            .iter()
            .map(|(c, _)| *c)
            .enumerate()
            .collect();
        places.sort_by_key(|(_, cluster)| *cluster);
        for ((index, _), byte) in places.iter().zip([0xc1, 0, 0xc3]) {
            Arc::make_mut(&mut contents.0[*index]).fill(byte);
        }
        let [first, second, third, ..] = places[..] else {
            return Err("fewer than three clusters are looked at".to_owned());
        };
        let write = |header: &Header, cut: bool| {
            let mut bytes = Vec::new();
            let mut writer = Writer::new(&mut bytes, header)?;
            let offset = |(_, cluster): (usize, u64)| cluster * CLUSTER_BYTES;
            if header.start == 0 {
                writer.data(offset(first), &contents.0[first.0])?;
            }
            if cut {
                return Ok(bytes);
            }
            writer.zeros(offset(second)..offset(second) + CLUSTER_BYTES)?;
            writer.data(offset(third), &contents.0[third.0])?;
            writer.end()?;
            Ok(bytes)
        };
        let failed = |e: std::io::Error| e.to_string();
        let begin = write(&header, true).map_err(failed)?;
        let start = first.1 * CLUSTER_BYTES + CLUSTER_BYTES;
        let rest = write(&Header { start, ..header }, false).map_err(failed)?;
        Ok((contents, begin, rest))
    }
}
