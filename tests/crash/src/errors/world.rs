// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The images that operations start from, on a medium that may fail, and what they must show.
//!
//! ```text
//! base ◀─ img        other
//! ```

use std::sync::Arc;

use pcow_format::medium::faulty::Faults;
use pcow_format::medium::real::RealDirectory;
use pcow_format::medium::sim::{Moment, Sim};
use pcow_format::medium::{Access, Directory, Domain, File, Site};
use pcow_format::ops::{Base, Fill, NewImage, create_filled_in, create_in};
use pcow_format::{
    BaseDirs, Cluster, ClusterSize, Environment, Image, Result, Stored, VirtualSize, data_name,
};
use uuid::Uuid;

use super::receiving::Stream;
use super::{Scenario, check_either};
use crate::setting::text;

pub(super) const IMAGE: &str = "img";
pub(super) const CLUSTER: u64 = 64 << 10;
pub(super) const CLUSTER_LEN: usize = 64 << 10;
const DISK: usize = 2 << 20;
/// The name of a file that is no image.
pub(super) const RAW: &str = "disk.raw";
/// Clusters that operations store to, by what they are at first.
pub(super) const IN_BASE: u64 = 1;
pub(super) const CLEAN: u64 = 2;
pub(super) const ZERO: u64 = 3;
pub(super) const OWN: u64 = 5;
pub(super) const NOBODYS: u64 = 10;
/// Stored to after a failure.
const LATER: u64 = 14;

/// What is under the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// The simulation.
    Sim(Domain),
    /// A folder of the machine.
    Real,
}

/// Images, one of them open on a medium that may fail.
#[derive(Debug)]
pub struct World {
    pub(super) plain: Arc<dyn Directory>,
    pub(super) faulty: Arc<dyn Directory>,
    pub(super) image: Option<Image>,
    pub(super) boot: u128,
    /// What `img` shows.
    pub(super) expected: Vec<u8>,
    /// What it showed when it was last flushed before an operation.
    pub(super) durable: Vec<u8>,
    base: Vec<u8>,
    other: Vec<u8>,
    /// What `img` will show, while it is being written to.
    changed: Option<Vec<u8>>,
    /// What is received into `copy`.
    pub(super) stream: Option<Stream>,
    scratch: Option<Scratch>,
}

/// What the images are in.
#[derive(Debug)]
enum Scratch {
    Sim(Sim),
    #[expect(dead_code, reason = "it is removed when this is dropped")]
    Real(tempfile::TempDir),
}

/// Images that were built already, where a copy of them is cheap.
#[derive(Debug)]
pub(super) struct Start {
    moment: Option<Moment>,
    shown: [Vec<u8>; 3],
}

pub(super) fn based_on(name: &str) -> Base {
    Base::Image {
        path: name.into(),
        snapshot: None,
        reference: false,
    }
}

pub(super) fn seam(error: std::io::Error) -> pcow_format::Error {
    pcow_format::Error::new(pcow_format::ErrorKind::Io, "the test's own call fails")
        .caused_by(error)
}

impl World {
    /// The images, built anew; on the simulation only if there is no `start` to take them from.
    pub(super) fn new(
        medium: Medium,
        faults: &Faults,
        start: Option<&Start>,
    ) -> std::result::Result<Self, String> {
        let (plain, scratch): (Arc<dyn Directory>, _) = match (medium, start) {
            (Medium::Sim(domain), _) => {
                let copy = start.and_then(|s| s.moment.as_ref());
                let sim = copy.map_or_else(|| Sim::new(domain), Moment::process_death);
                faults.write_back_of(sim.clone());
                (sim.top(), Some(Scratch::Sim(sim)))
            }
            (Medium::Real, _) => {
                // In memory where there is a place for that: thousands of images are made, and a disk takes its time.
                let scratch = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
                let scratch = scratch.map_err(|e| e.to_string())?;
                let dir = RealDirectory::open(scratch.path()).map_err(|e| e.to_string())?;
                (dir, Some(Scratch::Real(scratch)))
            }
        };
        let mut world = Self {
            faulty: faults.around(Arc::clone(&plain)),
            plain,
            image: None,
            boot: 1,
            expected: vec![0; DISK],
            durable: Vec::new(),
            base: vec![0; DISK],
            other: vec![0; DISK],
            changed: None,
            stream: None,
            scratch,
        };
        match start.filter(|s| s.moment.is_some()) {
            Some(start) => {
                [&mut world.expected, &mut world.base, &mut world.other]
                    .into_iter()
                    .zip(&start.shown)
                    .for_each(|(to, from)| to.clone_from(from));
                world.open_faulty().map_err(text)?;
            }
            None => world.build().map_err(text)?,
        }
        world.durable = world.expected.clone();
        Ok(world)
    }

    /// These images, to begin from again.
    pub(super) fn start(&mut self) -> Start {
        self.image = None;
        let moment = match &self.scratch {
            Some(Scratch::Sim(sim)) => Some(sim.now()),
            _ => None,
        };
        Start {
            moment,
            shown: [&self.expected, &self.base, &self.other].map(Clone::clone),
        }
    }

    fn build(&mut self) -> Result<()> {
        for (name, clusters) in [
            ("base", [(IN_BASE, 0xb1), (CLEAN, 0xb2), (ZERO, 0xb3)]),
            ("other", [(CLEAN, 0xc2), (9, 0xc9), (NOBODYS, 0xca)]),
        ] {
            self.create(name, None)?;
            self.image = Some(self.load(&self.plain.clone(), name, false)?);
            self.expected = vec![0; DISK];
            for (cluster, byte) in clusters {
                self.store(cluster, byte)?;
            }
            self.image().flush()?;
            self.image = None;
            let shown = std::mem::take(&mut self.expected);
            match name {
                "base" => self.base = shown,
                _ => self.other = shown,
            }
        }
        self.create(IMAGE, Some(based_on("base")))?;
        self.expected = self.base.clone();
        self.open_faulty()?;
        self.image().active().mark_zero(Cluster(ZERO).only())?;
        self.show(ZERO, 0);
        self.store(OWN, 0x55)?;
        self.image().flush()
    }

    pub(super) fn environment(&self, faulty: bool) -> Environment {
        let top = if faulty { &self.faulty } else { &self.plain };
        Environment {
            bases: BaseDirs::in_directory(Arc::clone(top)),
            boot: Uuid::from_u128(self.boot),
        }
    }

    pub(super) fn image_mut(&mut self) -> &mut Image {
        self.image.as_mut().expect("open")
    }

    pub(super) fn image(&self) -> &Image {
        self.image.as_ref().expect("open")
    }

    fn load(&self, top: &Arc<dyn Directory>, name: &str, faulty: bool) -> Result<Image> {
        let dir = top.open_dir(name).map_err(seam)?;
        Image::load(dir, self.environment(faulty))
    }

    /// `img`, for who looks at it without opening it for writing.
    pub(super) fn stored(&self) -> Result<Stored> {
        let dir = self.faulty.open_dir(IMAGE).map_err(seam)?;
        Stored::load(dir, self.environment(true))
    }

    pub(super) fn open_faulty(&mut self) -> Result<()> {
        self.image = None;
        self.image = Some(self.load(&self.faulty.clone(), IMAGE, true)?);
        Ok(())
    }

    /// Opens the image for the operation to be done again, unless that is an opening itself.
    pub(super) fn reopen(&mut self, scenario: &Scenario) -> std::result::Result<(), String> {
        self.open_faulty().map_err(text)?;
        self.close_for(scenario);
        Ok(())
    }

    /// Closes the image for an operation that is to find it closed.
    pub(super) fn close_for(&mut self, scenario: &Scenario) {
        if scenario.closed {
            self.image = None;
        }
    }

    /// What a power cut leaves of which only that is there which must be; `None` on the machine.
    pub(super) fn cut_power(&self) -> Option<Sim> {
        let Some(Scratch::Sim(sim)) = &self.scratch else {
            return None;
        };
        let moment = sim.now();
        let choices = moment.choices();
        Some(moment.power_cut(&choices, &vec![0; choices.len()]))
    }

    /// The machine is started anew.
    pub(super) fn reboot(&mut self) {
        self.image = None;
        self.boot += 1;
    }

    pub(super) fn create(&self, name: &str, base: Option<Base>) -> Result<()> {
        let (new, env) = (new_image(base)?, self.environment(true));
        create_in(self.faulty.as_ref(), name, &new, &env).map(drop)
    }

    /// Creates an image that refers to the files of a snapshot of `img` where they are.
    pub(super) fn refer_to_snapshot(&self, name: &str, snapshot: &str) -> Result<()> {
        let base = Base::Image {
            path: IMAGE.into(),
            snapshot: Some(snapshot.to_owned()),
            reference: true,
        };
        self.create(name, Some(base))
    }

    pub(super) fn create_filled(&self, name: &str, fill: Fill<'_>) -> Result<()> {
        let (new, env) = (new_image(None)?, self.environment(true));
        create_filled_in(self.faulty.as_ref(), name, &new, &env, fill).map(drop)
    }

    /// A file with the bytes that `other` shows.
    pub(super) fn raw_file(&self) -> Result<Arc<dyn File>> {
        let dir = self.faulty.open_dir("other").map_err(seam)?;
        let stored = Stored::load(Arc::clone(&dir), self.environment(true))?;
        let name = data_name(stored.root().active);
        dir.open(&name, Access::Read).map_err(seam)
    }

    /// A file of somebody else's that is to be a base.
    pub(super) fn write_raw(&mut self) -> Result<()> {
        let write = || {
            let file = self.plain.create(Site("user.raw"), RAW)?;
            file.write_at(Site("user.raw"), &raw_bytes(), 0)
        };
        write().map_err(seam)
    }

    pub(super) fn create_on_raw(&self, name: &str) -> Result<()> {
        self.create(name, Some(Base::Raw { path: RAW.into() }))
    }

    pub(super) fn writable(&self, cluster: u64) -> Result<()> {
        let run = Cluster(cluster).only();
        self.image().make_writable(run, &mut Vec::new())
    }

    fn show(&mut self, cluster: u64, byte: u8) {
        let at = usize::try_from(cluster * CLUSTER).expect("a small disk");
        self.expected[at..at + 4096].fill(byte);
    }

    pub(super) fn store(&mut self, cluster: u64, byte: u8) -> Result<()> {
        self.writable(cluster)?;
        let file = self.image().active().data_file();
        let offset = cluster * CLUSTER;
        let stored = file.write_at(Site("guest.store"), &[byte; 4096], offset);
        stored.map_err(|e| {
            pcow_format::Error::new(pcow_format::ErrorKind::Io, "a guest cannot store").caused_by(e)
        })?;
        self.show(cluster, byte);
        Ok(())
    }

    /// Clusters are about to be filled, each with one byte.
    pub(super) fn begin_change(&mut self, clusters: &[(u64, u8)]) {
        let mut changed = self.expected.clone();
        for (cluster, byte) in clusters {
            let at = usize::try_from(cluster * CLUSTER).expect("a small disk");
            changed[at..at + CLUSTER_LEN].fill(*byte);
        }
        self.changed = Some(changed);
    }

    /// They are filled.
    pub(super) fn end_change(&mut self) {
        self.expected = self.changed.take().expect("a change that was begun");
    }

    /// After a change that failed each byte is old or new; what is found now must stay.
    pub(super) fn settle_change(&mut self) -> std::result::Result<(), String> {
        let Some(changed) = self.changed.take() else {
            return Ok(());
        };
        let mut found = vec![0; DISK];
        self.image().read(0, &mut found).map_err(text)?;
        check_either(&found, &self.expected, &changed)?;
        self.expected = found;
        Ok(())
    }

    /// The image is used on after a failure.
    pub(super) fn go_on(&mut self) -> std::result::Result<(), String> {
        // What a snapshot that was not taken may have closed is opened again by whoever goes on.
        let image = self.image.as_mut();
        image.map_or(Ok(()), Image::reopen).map_err(text)?;
        self.store(LATER, 0x99).map_err(text)
    }

    /// What the image of that name shows.
    pub(super) fn shown_by(&self, name: &str) -> Vec<u8> {
        match name {
            "base" => self.base.clone(),
            "other" | "converted" => self.other.clone(),
            "new" => vec![0; DISK],
            "on-raw" => raw_bytes(),
            "copy" => self.shown_by_copy(),
            _ => self.expected.clone(),
        }
    }

    pub(super) fn check_structure(&self, name: &str) -> std::result::Result<(), String> {
        let dir = self.plain.open_dir(name).map_err(|e| e.to_string())?;
        let stored = Stored::load(dir, self.environment(false)).map_err(text)?;
        let report = pcow_format::check::check(&stored).map_err(text)?;
        let found = [report.corruptions, report.unchecked].concat();
        if found.is_empty() {
            return Ok(());
        }
        Err(format!("{name}: check: {}", found.join("; ")))
    }
}

/// What the raw base holds.
fn raw_bytes() -> Vec<u8> {
    let mut bytes = vec![0; DISK];
    bytes[..CLUSTER_LEN].fill(0xd1);
    bytes
}

fn new_image(base: Option<Base>) -> Result<NewImage> {
    Ok(NewImage {
        size: Some(VirtualSize::new(2 << 20)?),
        cluster: ClusterSize::new(CLUSTER)?,
        allocation_unit: None,
        base,
    })
}
