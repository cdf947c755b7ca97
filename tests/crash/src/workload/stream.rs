// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Streams that are received: in two pieces, since the first is cut off.

use std::sync::Arc;

use pcow_format::ErrorKind;
use pcow_format::medium::sim::Sim;
use pcow_format::ops::{Received, give_up_receiving_in, receive_in};
use pcow_format::stream::{Header, Named, Sending, Writer};
use uuid::Uuid;

use super::{Expected, Run};
use crate::model::{CLUSTER_BYTES, Contents, Model, Receiving};
use crate::setting::{self, environment, receive_place, text};

/// What a stream is of, and pieces of it.
struct Stream {
    contents: Contents,
    begin: Vec<u8>,
    /// What is missing then.
    rest: Vec<u8>,
    whole: Vec<u8>,
}

impl Run<'_> {
    /// The image gets a snapshot that somebody has made of its newest one.
    pub(super) fn receive(&mut self) -> Result<bool, String> {
        self.snapshot()?;
        let stream = self.changes()?;
        let name = self.slot().name.to_owned();
        let shown = stream.contents.clone();
        let after = self.model().with_disk(shown).with_snapshot();
        self.slot_mut().image = None;
        self.receive_pieces(&name, &stream, after)
    }

    /// The same, but after the first piece nobody wants it any more.
    pub(super) fn give_up_receiving(&mut self) -> Result<bool, String> {
        self.snapshot()?;
        let stream = self.changes()?;
        let name = self.slot().name.to_owned();
        let given_up = self.model().clone();
        let after = given_up.with_disk(stream.contents.clone()).with_snapshot();
        self.slot_mut().image = None;
        self.receive_begin(&name, &stream, &after)?;
        self.transition(&[given_up], |run| {
            let (top, env) = (run.sim.top(), environment(&run.sim, run.boot));
            let place = receive_place(top.as_ref(), &name, &env);
            match give_up_receiving_in(&place).map_err(text)? {
                Some(_) => Ok(()),
                None => Err("nothing of half a stream is there".to_owned()),
            }
        })?;
        self.reopen()
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
        self.slot_mut().image = None;
        let stream = Stream {
            contents: newest.contents,
            begin: stream[..cut].to_vec(),
            rest: stream.clone(),
            whole: stream,
        };
        self.receive_pieces(&name, &stream, after)
    }

    /// Receives the first piece. What is left of the partial image is looked at from then on: as long as it has its name it
    /// must be whole.
    fn receive_begin(&mut self, name: &str, stream: &Stream, after: &Model) -> Result<(), String> {
        self.slot_mut().model.receiving = Some(Receiving {
            name: name.to_owned(),
            contents: stream.contents.clone(),
            stream: Arc::new(stream.whole.clone()),
            after: Arc::new(after.clone()),
        });
        self.transition(&[], |run| match run.receive_piece(name, &stream.begin) {
            Err(e) if e.kind() == ErrorKind::StreamCut => Ok(()),
            Err(e) => Err(text(e)),
            Ok(_) => Err("half of a stream was received".to_owned()),
        })
    }

    fn receive_pieces(
        &mut self,
        name: &str,
        stream: &Stream,
        after: Model,
    ) -> Result<bool, String> {
        self.receive_begin(name, stream, &after)?;
        let mut after = after;
        after.receiving.clone_from(&self.model().receiving);
        self.transition(&[after], |run| {
            run.receive_piece(name, &stream.rest).map_err(text)
        })?;
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
        let whole = write(&header, false).map_err(failed)?;
        let start = first.1 * CLUSTER_BYTES + CLUSTER_BYTES;
        let rest = write(&Header { start, ..header }, false).map_err(failed)?;
        Ok(Stream {
            contents: contents.clone(),
            begin,
            rest,
            whole,
        })
    }
}

/// Somebody sends a stream again whose reception was cut off; returns what must be there then. `None` if nothing of a
/// reception is left.
pub fn receive_again(
    sim: &Sim,
    expected: &Expected,
    boot: u128,
) -> Result<Option<Expected>, String> {
    let receiving = expected.possible.first().and_then(|m| m.receiving.clone());
    let Some(receiving) = receiving else {
        return Ok(None);
    };
    let top = sim.top();
    let part = format!("{}.receive.part", receiving.name);
    let names = top.names().map_err(|e| e.to_string())?;
    if !names.contains(&part) {
        return Ok(None);
    }
    let env = environment(sim, boot);
    let place = receive_place(top.as_ref(), &receiving.name, &env);
    match receive_in(&place, &mut &receiving.stream[..], &mut |_, _| ()) {
        Ok(_) => {}
        Err(e) if e.to_string().contains("has this snapshot already") => {}
        Err(e) => return Err(format!("received again: {}", text(e))),
    }
    let mut after = Model::clone(&receiving.after);
    after.receiving = Some(receiving);
    Ok(Some(expected.with_possible(vec![after])))
}
