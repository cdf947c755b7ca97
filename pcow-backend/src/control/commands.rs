// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of the control socket. `docs/control.md` describes each, and a test runs what it shows.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pcow_format::medium::Domain;
use pcow_format::root::{Kind, Root};
use serde_json::{Value, json};
use uuid::Uuid;

use super::events::{Event, Events};
use super::request::{Arguments, Refusal, Request};
use super::snapshot;
use crate::connection::{Offer, chain, with_advice};
use crate::disk::WritableDisk;
use crate::server::Quit;
use crate::service::Figures;

type Answer = Result<Value, Refusal>;

/// A command: its name, and what carries it out.
type Command = (&'static str, fn(&Operator, Arguments) -> Answer);

/// How long a snapshot may take until it is committed, unless somebody says otherwise.
const DEFAULT_PATIENCE_MS: u64 = 30_000;
const MAX_PATIENCE_MS: u64 = 600_000;

/// All commands, in the order in which they are listed.
const COMMANDS: &[Command] = &[
    ("query-commands", |_, arguments| {
        arguments.finish()?;
        let entry = |(name, _): &Command| json!({ "name": name });
        Ok(COMMANDS.iter().map(entry).collect())
    }),
    ("query-status", Operator::query_status),
    ("query-layers", Operator::query_layers),
    ("query-stats", Operator::query_stats),
    ("snapshot-create", Operator::snapshot_create),
    ("snapshot-delete", Operator::snapshot_delete),
    ("snapshot-rename", Operator::snapshot_rename),
    ("flush", Operator::flush),
    ("quit", |_, arguments| {
        arguments.finish().map(|()| json!({}))
    }),
];

/// Carries out what operators order.
#[derive(Debug)]
pub struct Operator {
    offer: Arc<Offer>,
    disk: Arc<WritableDisk>,
    quit: Arc<Quit>,
    /// Held by who changes the layer tree.
    tree: Arc<Mutex<()>>,
}

impl Operator {
    /// For the image behind `disk`, which is served through `offer`.
    pub fn new(offer: Arc<Offer>, disk: Arc<WritableDisk>, quit: Arc<Quit>) -> Self {
        let operator = Self {
            offer,
            disk,
            quit,
            tree: Arc::default(),
        };
        // What a backend before this one left to be done.
        operator.write_checksums();
        operator
    }

    /// UUID of the image.
    pub fn image_uuid(&self) -> Uuid {
        self.disk.uuid()
    }

    /// Who wants to hear what happens.
    pub fn events(&self) -> &Events {
        &self.offer.events
    }

    /// Carries out a command of `peer`'s.
    ///
    /// # Errors
    /// What the client is told.
    pub fn execute(&self, request: Request, peer: &str) -> Answer {
        let known = COMMANDS.iter().find(|(name, _)| *name == request.command);
        let Some((name, run)) = known else {
            let name = request.command.escape_debug();
            let what = format!("the command {name} has not been found");
            return Err(Refusal::not_found(what));
        };
        if !name.starts_with("query-") {
            log::info!("control: {peer}: {name}");
        }
        run(self, request.arguments)
    }

    /// What follows once the answer to `command` is on its way.
    pub fn answered(&self, command: &str) {
        if command == "quit" {
            self.quit.ask();
        }
    }

    fn query_status(&self, arguments: Arguments) -> Answer {
        arguments.finish()?;
        let root = self.disk.root();
        let active = root.active_layer().map_err(refusal)?;
        let dax = self.disk.domain() == Domain::Dax;
        let figures = self.offer.session().figures();
        Ok(json!({
            "process": std::process::id(),
            "image": root.uuid,
            "active": root.active,
            "virtual-size": active.virtual_size,
            "cluster-size": active.cluster_size,
            "allocation-unit": root.allocation_unit,
            "persistence-domain": self.disk.domain().name(),
            "guest-flush-is-durable": dax,
            "frontend": figures.map(|f| json!({ "process": f.process, "waiting": f.waiting > 0 })),
        }))
    }

    fn query_layers(&self, arguments: Arguments) -> Answer {
        arguments.finish()?;
        let root = self.disk.root();
        Ok(root.layers.iter().map(|l| layer(&root, l)).collect())
    }

    fn query_stats(&self, arguments: Arguments) -> Answer {
        arguments.finish()?;
        // Out of the lock: what the figures need may be busy.
        let session = self.offer.session().clone();
        Ok(json!({ "session": session.figures().as_ref().map(session_stats) }))
    }

    fn snapshot_create(&self, mut arguments: Arguments) -> Answer {
        let name = arguments.text("name")?;
        let patience = arguments
            .number("timeout-ms")?
            .unwrap_or(DEFAULT_PATIENCE_MS);
        arguments.finish()?;
        if !(1..=MAX_PATIENCE_MS).contains(&patience) {
            let what = format!("'timeout-ms' must be from 1 to {MAX_PATIENCE_MS}");
            return Err(Refusal::new(what));
        }
        let deadline = Instant::now() + Duration::from_millis(patience);
        let taken = {
            let _tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
            snapshot::take(&self.offer, &self.disk, name.as_deref(), deadline)
        };
        self.write_checksums();
        let taken = taken.map_err(|reason| {
            log::warn!("no snapshot: {reason}");
            let reason = reason.to_string();
            self.events().tell(&Event::SnapshotFailed {
                reason: reason.clone(),
            });
            Refusal::new(reason)
        })?;
        let snapshot::Taken {
            number,
            proof,
            times,
        } = taken;
        let root = self.disk.root();
        let taken = root.snapshot(&number.to_string()).map_err(refusal)?;
        log::info!("snapshot {number} '{}' taken: {times:?}", taken.name);
        self.events().tell(&Event::SnapshotCreated {
            number,
            name: taken.name.clone(),
        });
        Ok(json!({
            "snapshot": snapshot_row(taken),
            "layer": taken.layer,
            "proof": proof,
            "times-us": times_row(&times),
        }))
    }

    fn snapshot_delete(&self, mut arguments: Arguments) -> Answer {
        let target = arguments.needed("snapshot")?;
        arguments.finish()?;
        let _tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        self.refuse_while_kept()?;
        let deleted = self.disk.delete_snapshot(&target).map_err(refusal)?;
        log::info!("snapshot {} '{}' deleted", deleted.number, deleted.name);
        Ok(json!({ "number": deleted.number, "copied-bytes": deleted.copied_bytes }))
    }

    fn snapshot_rename(&self, mut arguments: Arguments) -> Answer {
        let (target, name) = (arguments.needed("snapshot")?, arguments.needed("name")?);
        arguments.finish()?;
        let _tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        self.disk.rename_snapshot(&target, &name).map_err(refusal)?;
        Ok(json!({}))
    }

    /// A frontend that has kept the image's lock may know the layer that was sealed last, and goes on by that alone. Names and
    /// checksums it does not ask for. Who has come back keeps nothing, so that this need not be asked twice.
    fn refuse_while_kept(&self) -> Result<(), Refusal> {
        if self.offer.disk.lock().is_none() {
            return Err(Refusal::new(snapshot::Failed::Kept.to_string()));
        }
        Ok(())
    }

    /// Computes checksums that are pending, in a thread of its own.
    fn write_checksums(&self) {
        let (disk, tree) = (Arc::clone(&self.disk), Arc::clone(&self.tree));
        let work = move || {
            let _tree = tree.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(e) = disk.write_checksums() {
                log::warn!("checksums of sealed layers are pending: {}", chain(&e));
            }
        };
        let thread = std::thread::Builder::new().name("checksum".into());
        if let Err(e) = thread.spawn(work) {
            log::warn!("checksums of sealed layers are pending: {e}");
        }
    }

    fn flush(&self, arguments: Arguments) -> Answer {
        arguments.finish()?;
        self.offer.flush().map_err(refusal)?;
        Ok(json!({}))
    }
}

fn times_row(times: &snapshot::Times) -> Value {
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    json!({
        "prepare": us(times.prepare),
        "quiesce": us(times.cut.quiesce),
        "drain": us(times.cut.drain),
        "reset": us(times.cut.reset),
        "seal": us(times.seal),
        "resume": us(times.resume),
    })
}

fn refusal(error: pcow_format::Error) -> Refusal {
    Refusal::new(with_advice(&error))
}

fn layer(root: &Root, layer: &pcow_format::root::Layer) -> Value {
    let kind = match layer.kind {
        Kind::Own => "own",
        Kind::Reference { .. } => "reference",
        Kind::Raw { .. } => "raw",
    };
    let snapshots = root.snapshots.iter().filter(|s| s.layer == layer.uuid);
    json!({
        "uuid": layer.uuid,
        "parent": layer.parent,
        "active": layer.uuid == root.active,
        "kind": kind,
        "virtual-size": layer.virtual_size,
        "cluster-size": layer.cluster_size,
        "map-checksum": layer.map_checksum,
        "proof": layer.proof,
        "snapshots": snapshots.map(snapshot_row).collect::<Value>(),
    })
}

fn snapshot_row(snapshot: &pcow_format::root::Snapshot) -> Value {
    json!({
        "number": snapshot.number,
        "name": snapshot.name,
        "time": snapshot.time,
        "uuid": snapshot.uuid,
    })
}

fn session_stats(f: &Figures) -> Value {
    json!({
        "process": f.process,
        "direction": f.direction.name(),
        "loads": f.faults[0],
        "stores": f.faults[1],
        "unknown": f.faults[2],
        "bounced": f.unknown[0],
        "second": f.unknown[1],
        "on-touch": f.unknown[2],
        "maps": f.maps[0],
        "unmaps": f.maps[1],
        "mapped-runs": f.mapped_runs,
        "read-copies": f.copies[0],
        "evictions": f.copies[1],
        "read-copy-bytes": f.copied_bytes,
        "maybe-clean-bytes": f.clean_bytes[0],
        "given-back-bytes": f.clean_bytes[1],
        "waiting": f.waiting,
    })
}
