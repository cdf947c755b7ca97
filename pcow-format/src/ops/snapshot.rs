// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshot: the active layer is sealed, and an empty one takes its place.
//!
//! In two steps, so that a guest that runs has to wait for the second one only:
//!
//! | | | who may store meanwhile |
//! |---|---|---|
//! | [`Image::prepare_snapshot`] | files of the new layer, complete and durable; a flush of most of what is dirty; everything opened that will be needed | everybody |
//! | [`Image::take_snapshot`] | own writer closed, proof that there is no other, flush of the rest, commit | nobody |

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::active::{Active, domain_of};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{Image, Stored, Written, replace_root};
use crate::layer_files::{self, Pair, data_name};
use crate::medium::{Access, Domain, File, Lease};
use crate::mutant::{self, Mutant};
use crate::root::{self, Layer, Proof, Root, Snapshot};

/// How long a file may still be open for writing by nobody that matters.
const GRACE: Duration = Duration::from_secs(1);
/// The same while a guest waits: its touches may be what keeps the file open, so that another attempt helps more.
const LIVE_GRACE: Duration = Duration::from_millis(100);

/// When the checksum of a sealed layer's map is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// Before the commit.
    Now,
    /// Some time after it, by [`Image::write_checksums`].
    Later,
}

/// A snapshot that is ready to be taken.
#[derive(Debug)]
pub struct Prepared {
    /// The image with the new layer on top.
    after: Stored,
    active: Active,
    below: Chain,
    number: u64,
}

impl Prepared {
    /// What makes stores to the new layer durable.
    pub fn domain(&self) -> Domain {
        self.active.domain()
    }

    /// Number of the snapshot to come.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Image {
    /// Takes a snapshot under `name`, or under a generated name; returns its number.
    ///
    /// # Errors
    /// `InvalidArgument` or `Exists` for the name; `NoSpace`, `FlushFailed` or `Io`. Before the commit the image is as it was.
    pub fn snapshot(&mut self, name: Option<&str>) -> Result<u64> {
        let prepared = self.prepare_snapshot(name)?;
        let number = prepared.number;
        self.take_snapshot(prepared, Checksum::Now)?;
        Ok(number)
    }

    /// Does everything that can be done while a guest stores. Nobody else may change the layer tree until the
    /// snapshot is taken or abandoned.
    ///
    /// # Errors
    /// As [`Image::snapshot`]; the image is as it was.
    pub fn prepare_snapshot(&self, name: Option<&str>) -> Result<Prepared> {
        let root = self.root();
        let name = name.map_or_else(
            || free_name(root, &format!("snapshot-{}", root.next_snapshot)),
            str::to_owned,
        );
        self.prepare_known_snapshot(Snapshot {
            uuid: Uuid::new_v4(),
            number: root.next_snapshot,
            name,
            layer: root.active,
            time: super::now(),
        })
    }

    /// As [`Image::prepare_snapshot`], for a snapshot that another image may have, too. Its layer is the active one.
    pub(super) fn prepare_known_snapshot(&self, snapshot: Snapshot) -> Result<Prepared> {
        let mut root = self.root().clone();
        let sealed = root.active;
        let number = root.add_known_snapshot(snapshot)?;
        let new = root.empty_layer(sealed, self.virtual_size(), self.cluster_size())?;
        let row = root.row_mut(sealed)?;
        row.sealed = true;
        let row = row.clone();
        root.active = new.uuid;
        root.layers.push(new.clone());
        // What cannot be written later is refused now.
        root.encode()?;
        let pair = self.create_layer(&new);
        pair.and_then(|pair| self.prepare_stack(root, (&new, pair), &row, number))
            // Most of what is dirty, so that little is left for the moment in which the guest waits.
            .and_then(|prepared| self.flush().map(|()| prepared))
            .inspect_err(|_| self.discard_layer(new.uuid))
    }

    fn prepare_stack(
        &self,
        root: Root,
        (new, pair): (&Layer, Pair),
        sealed: &Layer,
        number: u64,
    ) -> Result<Prepared> {
        let after = self.stored.with_root(root);
        let geometry = (new.size()?, new.cluster()?);
        let boot = self.stored.environment().boot;
        let name = new.uuid.to_string();
        let (active, _) = Active::open(name, geometry, (pair.map, pair.data), boot)?;
        let top = layer_files::open_for_reading(
            self.directory(),
            sealed,
            &self.stored.environment().bases,
            boot,
        )?;
        let below = Chain::stacked(top, &self.below, new.clip, geometry.1);
        Ok(Prepared {
            after,
            active,
            below,
            number,
        })
    }

    /// Gives up a snapshot that was prepared.
    pub fn abandon_snapshot(&self, prepared: Prepared) {
        let new = prepared.after.root().active;
        drop(prepared);
        self.discard_layer(new);
    }

    /// Has `join` bring the layer `new`, whose files are there then, into the table. They go if that fails before the root
    /// has it.
    pub(super) fn with_new_layer(
        &mut self,
        new: &Layer,
        join: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let joined = self.create_layer(new).and_then(|_| join(self));
        if joined.is_err() {
            self.discard_unnamed(new.uuid);
        }
        joined
    }

    /// Removes the files of a layer that was to join the table, unless the root has it.
    pub(super) fn discard_unnamed(&self, layer: Uuid) {
        if self.root().layer(layer).is_none() {
            self.discard_layer(layer);
        }
    }

    /// Best effort: the next opening removes what stays (I5).
    fn discard_layer(&self, layer: Uuid) {
        if let Err(e) = super::remove_layer_files(self.directory(), layer) {
            log::debug!("{e}");
        }
    }

    /// Seals the active layer and goes on with the new one. Nobody may be able to store into it: no mapping of it is left,
    /// no store is under way, and no other thread uses the image.
    ///
    /// After an error the image is as it was, except when [`Image::root`] has the new layer: then the snapshot is there, and
    /// what is written from now on is not promised (I7). See [`Image::reopen`], too.
    ///
    /// # Errors
    /// `Locked` if somebody has the layer open for writing; `FlushFailed` or `Io`.
    pub fn take_snapshot(&mut self, mut prepared: Prepared, checksum: Checksum) -> Result<Proof> {
        let sealed = self.root().active;
        match self.seal(sealed, &mut prepared.after, checksum) {
            Ok(proof) => {
                self.go_on_with(prepared);
                Ok(proof)
            }
            Err(Unsealed::AfterRename(e)) => {
                self.go_on_with(prepared);
                Err(self.fail_flushes(&e))
            }
            Err(Unsealed::Before(e)) => {
                self.abandon_snapshot(prepared);
                // If this fails, stores do, too, until somebody tries again.
                let _ = self.reopen();
                Err(e)
            }
        }
    }

    fn go_on_with(&mut self, prepared: Prepared) {
        self.stored = prepared.after;
        // The old one goes, and with it its lease.
        self.active = prepared.active;
        self.below = prepared.below;
    }

    fn seal(
        &mut self,
        layer: Uuid,
        after: &mut Stored,
        checksum: Checksum,
    ) -> std::result::Result<Proof, Unsealed> {
        let proof = if mutant::is(Mutant::SealUnflushed) {
            self.prove(layer, checksum)?
        } else {
            self.prove_and_flush(layer, checksum)?
        };
        let row = after.root_mut().row_mut(layer)?;
        row.proof = Some(proof);
        if checksum == Checksum::Now {
            row.map_checksum = Some(self.active.map_checksum()?);
        }
        self.confirm(layer, proof)?;
        let written = replace_root(self.directory(), after.root())?;
        match written {
            Written::Durable => Ok(proof),
            Written::Visible(e) => Err(Unsealed::AfterRename(e)),
        }
    }

    /// Opens the active layer for writing again, if a snapshot that was not taken left it closed.
    ///
    /// # Errors
    /// `Io`; stores into clusters that are not data yet fail until this succeeds.
    pub fn reopen(&mut self) -> Result<()> {
        if !self.active.is_closed_for_writing() {
            return Ok(());
        }
        self.active.data_file().end_lease();
        let name = data_name(self.root().active);
        let data = self.directory().open(&name, Access::Write);
        let data = data.context(|| format!("cannot open {name} again"))?;
        self.active.open_for_writing(data);
        Ok(())
    }

    /// Computes the checksums that sealed layers of the image's own still lack and commits them; returns the root that has
    /// them, for [`Image::adopt_root`], or `None` if there were none to compute. Nobody else may change the layer tree until then.
    ///
    /// # Errors
    /// `Io`; the checksums are pending still, or again.
    pub fn write_checksums(&self) -> Result<Option<Root>> {
        let mut root = self.root().clone();
        let mut changed = false;
        let own = |l: &&mut Layer| l.sealed && l.kind == root::Kind::Own;
        for row in root.layers.iter_mut().filter(own) {
            if row.map_checksum.is_none() {
                let pair = layer_files::open_own(self.directory(), row, Access::Read)?;
                row.map_checksum = Some(layer_files::map_sum(row.uuid, pair.map.as_ref())?);
                changed = true;
            }
        }
        if !changed {
            return Ok(None);
        }
        crate::image::write_root(self.directory(), &root)?;
        Ok(Some(root))
    }

    /// Goes on with a root that was committed and that names the same active layer and the same chain.
    pub fn adopt_root(&mut self, root: Root) {
        assert_eq!(root.active, self.root().active, "the same active layer");
        self.stored = self.stored.with_root(root);
    }

    /// Creates the files of a layer that is about to join the table. They must promise as much as the present ones do.
    fn create_layer(&self, layer: &Layer) -> Result<Pair> {
        let boot = self.stored.environment().boot;
        let pair = layer_files::create(self.directory(), layer, self.root().uuid, boot)?;
        let domain = domain_of(
            &layer.uuid.to_string(),
            pair.map.as_ref(),
            pair.data.as_ref(),
        )?;
        if self.domain() == Domain::Dax && domain != Domain::Dax {
            let what = "the image is on DAX, but files that are made in it now are not";
            return Err(Error::new(ErrorKind::MixedDomains, what));
        }
        layer_files::prefer_huge_extents(pair.data.as_ref(), self.root().allocation_unit);
        Ok(pair)
    }

    /// Makes everything in the active layer durable and marks its row in `root` as sealed, for an operation that has the
    /// image to itself. See [`Image::reopen`].
    pub(crate) fn seal_active(&mut self, root: &mut Root) -> Result<()> {
        let layer = root.active;
        let proof = self.prove_and_flush(layer, Checksum::Now)?;
        let row = root.row_mut(layer)?;
        row.map_checksum = Some(self.active.map_checksum()?);
        row.sealed = true;
        row.proof = Some(proof);
        self.confirm(layer, proof)
    }

    /// Closes this process's own writer, makes sure that there is no other, and makes everything durable.
    fn prove_and_flush(&mut self, layer: Uuid, checksum: Checksum) -> Result<Proof> {
        let proof = self.prove(layer, checksum)?;
        // In both domains: with DAX this covers lines that the guest stored but did not write back itself, which have
        // another address in front of them from now on.
        self.flush()?;
        Ok(proof)
    }

    /// Closes this process's own writer and makes sure that there is no other.
    fn prove(&mut self, layer: Uuid, checksum: Checksum) -> Result<Proof> {
        let name = data_name(layer);
        let context = || format!("cannot seal {name}");
        // Nobody could use it in a sealed layer. If this fails, space is lost there, and 'check' says so.
        let _ = self.active.give_back_prepared();
        let reader = self.directory().open(&name, Access::Read);
        let reader = reader.context(context)?;
        self.active.close_for_writing(reader);
        let grace = match checksum {
            Checksum::Now => GRACE,
            Checksum::Later => LIVE_GRACE,
        };
        prove_unwritable(self.active.data_file(), &name, grace)
    }

    /// Proves again that nobody can write to the data of `layer`, a sealed one of the image's own: for who goes on from it
    /// and has not seen it sealed. The lease ends with this call: what it shows is that nobody is left from before.
    ///
    /// # Errors
    /// `Locked` if somebody has it open for writing, or memory of it mapped; `Io`.
    pub fn prove_sealed(&self, layer: Uuid) -> Result<Proof> {
        let name = data_name(layer);
        let reader = self.directory().open(&name, Access::Read);
        let reader = reader.context(|| format!("cannot open {name}"))?;
        prove_unwritable(reader.as_ref(), &name, LIVE_GRACE)
    }

    /// The proof still stands. The lease goes with the file, once the image goes on with another layer.
    fn confirm(&self, layer: Uuid, proof: Proof) -> Result<()> {
        let name = data_name(layer);
        let holds = || self.active.data_file().lease_holds();
        let stands = proof != Proof::Lease || holds().context(|| cannot_ask(&name))?;
        if stands {
            return Ok(());
        }
        Err(still_open(&name))
    }
}

/// Makes sure that nobody has `data` open for writing, and keeps it so as long as the file is open.
///
/// A child that a threaded program starts has copies of its descriptors until it executes its own program: such a writer
/// is given a moment to go.
fn prove_unwritable(data: &dyn File, name: &str, grace: Duration) -> Result<Proof> {
    let deadline = Instant::now() + grace;
    loop {
        let lease = data.take_lease();
        match lease.context(|| cannot_ask(name))? {
            Lease::Granted => return Ok(Proof::Lease),
            Lease::Unknown => return Ok(Proof::None),
            Lease::Busy if Instant::now() < deadline => std::thread::sleep(grace / 100),
            Lease::Busy => return Err(still_open(name)),
        }
    }
}

/// Why a layer was not sealed.
enum Unsealed {
    /// The image is as it was.
    Before(Error),
    /// The image has its new root, which a power cut may still take back.
    AfterRename(Error),
}

impl From<Error> for Unsealed {
    fn from(error: Error) -> Self {
        Self::Before(error)
    }
}

fn cannot_ask(name: &str) -> String {
    format!("cannot ask who writes to {name}")
}

fn still_open(name: &str) -> Error {
    let what = format!("another process has {name} open for writing, or has memory of it mapped");
    Error::new(ErrorKind::Locked, what)
}

/// `wanted`, or with a number behind it if it is taken.
pub(super) fn free_name(root: &Root, wanted: &str) -> String {
    let taken = |name: &str| root.snapshots.iter().any(|s| s.name == name);
    let wanted = if root::check_name(wanted).is_ok() {
        wanted
    } else {
        "snapshot"
    };
    if !taken(wanted) {
        return wanted.to_owned();
    }
    // One of these is free: there are fewer snapshots than numbers to try.
    (2..)
        .map(|n: u64| format!("{wanted}-{n}"))
        .find(|name| !taken(name))
        .unwrap_or_default()
}
