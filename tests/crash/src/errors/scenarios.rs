// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations whose calls are to fail, and the images that they start from.
//!
//! ```text
//! base ◀─ img        other
//! ```

use std::sync::Arc;

use pcow_format::medium::faulty::Faults;
use pcow_format::medium::real::RealDirectory;
use pcow_format::medium::sim::{Moment, Sim};
use pcow_format::medium::{Directory, Domain, Site};
use pcow_format::ops::{Base, NewImage, create_in};
use pcow_format::{
    BaseDirs, Cluster, ClusterRange, ClusterSize, Environment, Image, Result, Stored, VirtualSize,
};
use uuid::Uuid;

use crate::setting::text;

pub(super) const IMAGE: &str = "img";
pub(super) const CLUSTER: u64 = 64 << 10;
pub(super) const CLUSTER_LEN: usize = 64 << 10;
const DISK: usize = 2 << 20;
/// Clusters that operations store to, by what they are at first.
const IN_BASE: u64 = 1;
const CLEAN: u64 = 2;
const ZERO: u64 = 3;
const OWN: u64 = 5;
const NOBODYS: u64 = 10;
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
    faulty: Arc<dyn Directory>,
    pub(super) image: Option<Image>,
    boot: u128,
    /// What `img` shows.
    pub(super) expected: Vec<u8>,
    /// What it showed when it was last flushed before an operation.
    pub(super) durable: Vec<u8>,
    base: Vec<u8>,
    other: Vec<u8>,
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

/// An operation whose calls are to fail.
#[derive(Debug)]
pub struct Scenario {
    /// What it is called in output.
    pub name: &'static str,
    /// What is done before, without a failure.
    pub(super) prepare: fn(&mut World) -> Result<()>,
    /// The operation.
    pub(super) run: fn(&mut World) -> Result<()>,
    /// Whether it can be done again.
    pub(super) again: bool,
}

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    scenario("open", close, |w| w.open_faulty()),
    scenario("open in another boot", reboot_with_live, |w| {
        w.open_faulty()
    }),
    scenario("read", nothing, |w| {
        let mut found = vec![0; 8 * CLUSTER_LEN];
        w.image().read(0, &mut found)
    }),
    scenario("check", close, |w| {
        let dir = w.faulty.open_dir(IMAGE).map_err(seam)?;
        let stored = Stored::load(dir, w.environment(true))?;
        pcow_format::check::check(&stored).map(drop)
    }),
    scenario("store to nobody's", nothing, |w| w.writable(NOBODYS)),
    scenario("store to base", nothing, |w| w.writable(IN_BASE)),
    scenario("store to zero", nothing, |w| w.writable(ZERO)),
    scenario("store to own", nothing, |w| w.writable(OWN)),
    scenario("prepare", nothing, |w| {
        w.image()
            .active()
            .prepare(ClusterRange::new(NOBODYS, NOBODYS + 3))
    }),
    scenario("give back", prepared, |w| {
        w.image().active().give_back_prepared()
    }),
    scenario("give back clean", touched, |w| {
        let all = ClusterRange::new(0, 32);
        w.image().give_back_clean(all).map(drop)
    }),
    scenario("flush", touched, |w| w.image().flush()),
    scenario("snapshot", touched, |w| {
        let image = w.image.as_mut().expect("open");
        image.snapshot(None).map(drop)
    }),
    Scenario {
        // What was stored after the failure would go.
        again: false,
        ..scenario("rollback", snapshotted, |w| {
            let image = w.image.as_mut().expect("open");
            image.rollback("1", false).map(drop)
        })
    },
    scenario("rebase", touched, |w| {
        let image = w.image.as_mut().expect("open");
        image.rebase(Some(&based_on("other")), IMAGE).map(drop)
    }),
    Scenario {
        again: false,
        ..scenario("create", close, |w| w.create("new", None))
    },
    Scenario {
        again: false,
        ..scenario("clone", close, |w| w.create("clone", Some(IMAGE)))
    },
];

const fn scenario(
    name: &'static str,
    prepare: fn(&mut World) -> Result<()>,
    run: fn(&mut World) -> Result<()>,
) -> Scenario {
    Scenario {
        name,
        prepare,
        run,
        again: true,
    }
}

fn nothing(_: &mut World) -> Result<()> {
    Ok(())
}

fn close(world: &mut World) -> Result<()> {
    world.image = None;
    Ok(())
}

fn prepared(world: &mut World) -> Result<()> {
    let run = ClusterRange::new(NOBODYS, NOBODYS + 3);
    world.image().active().prepare(run)
}

/// Some clusters that hold what they cover, and one that does not.
fn touched(world: &mut World) -> Result<()> {
    world.writable(CLEAN)?;
    world.writable(NOBODYS)?;
    world.store(IN_BASE, 0x77)
}

fn snapshotted(world: &mut World) -> Result<()> {
    // What the snapshot shows is what is to be shown all the time.
    world
        .image
        .as_mut()
        .expect("open")
        .snapshot(None)
        .map(drop)?;
    world.writable(CLEAN)
}

fn reboot_with_live(world: &mut World) -> Result<()> {
    // Live clusters go with the boot; what they cover is the same.
    world.writable(CLEAN)?;
    world.image = None;
    world.boot += 1;
    Ok(())
}

fn based_on(name: &str) -> Base {
    Base::Image {
        path: name.into(),
        snapshot: None,
        reference: false,
    }
}

fn seam(error: std::io::Error) -> pcow_format::Error {
    pcow_format::Error::new(pcow_format::ErrorKind::Io, "cannot open a directory").caused_by(error)
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
                let failing = sim.clone();
                faults.on_failed_sync(move |name| failing.fail_write_back(name));
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
        self.create(IMAGE, Some("base"))?;
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

    pub(super) fn image(&self) -> &Image {
        self.image.as_ref().expect("open")
    }

    fn load(&self, top: &Arc<dyn Directory>, name: &str, faulty: bool) -> Result<Image> {
        let dir = top.open_dir(name).map_err(seam)?;
        Image::load(dir, self.environment(faulty))
    }

    fn open_faulty(&mut self) -> Result<()> {
        self.image = None;
        self.image = Some(self.load(&self.faulty.clone(), IMAGE, true)?);
        Ok(())
    }

    /// Opens the image for the operation to be done again, unless that is an opening itself.
    pub(super) fn reopen(&mut self, scenario: &Scenario) -> std::result::Result<(), String> {
        self.open_faulty().map_err(text)?;
        if ["open", "open in another boot", "check"].contains(&scenario.name) {
            self.image = None;
        }
        Ok(())
    }

    fn create(&self, name: &str, base: Option<&str>) -> Result<()> {
        let new = NewImage {
            size: Some(VirtualSize::new(2 << 20)?),
            cluster: ClusterSize::new(CLUSTER)?,
            allocation_unit: None,
            base: base.map(based_on),
        };
        create_in(self.faulty.as_ref(), name, &new, &self.environment(true)).map(drop)
    }

    fn writable(&self, cluster: u64) -> Result<()> {
        let run = Cluster(cluster).only();
        self.image().make_writable(run, &mut Vec::new())
    }

    fn show(&mut self, cluster: u64, byte: u8) {
        let at = usize::try_from(cluster * CLUSTER).expect("a small disk");
        self.expected[at..at + 4096].fill(byte);
    }

    fn store(&mut self, cluster: u64, byte: u8) -> Result<()> {
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
            "other" => self.other.clone(),
            "new" => vec![0; DISK],
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
