// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The images that every workload starts from, built once per scene.
//!
//! ```text
//! base0 ◀─ base1 ◀─ img      other
//!               ╰────── twin          in scenes with two images; they share img's first layer, too
//! ```

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use pcow_format::medium::sim::{Moment, Sim, Tearing};
use pcow_format::medium::{Directory, Domain, Site};
use pcow_format::ops::{self, Base, NewImage, Receive, create_in};
use pcow_format::{BaseDirs, Cluster, ClusterSize, Environment, Image, Stored, VirtualSize, map};
use uuid::Uuid;

use crate::model::{CLUSTER_BYTES, Contents, Model, Plan, Role, SMALL, WIDE};
use crate::random::newest;

/// The image under test.
pub const IMAGE: &str = "img";
/// Another one that shares layers with it.
pub const TWIN: &str = "twin";
/// Images that no workload may change; the last one is what an image can be rebased on.
pub const BYSTANDERS: [&str; 3] = ["base0", "base1", OTHER];
/// What an image can be rebased on.
pub const OTHER: &str = "other";

/// Images and a medium.
#[derive(Debug)]
pub struct Scene {
    /// What it is called in output and in traces.
    pub name: &'static str,
    /// The disk of the image under test.
    pub plan: &'static Plan,
    /// Where the images are made.
    pub created_in: Domain,
    /// Where they are used.
    pub used_in: Domain,
    /// How a power cut tears pages.
    pub tearing: Tearing,
    /// Whether there are two images that are worked on.
    pub twins: bool,
}

const fn scene(name: &'static str, created_in: Domain, used_in: Domain) -> Scene {
    Scene {
        name,
        plan: &SMALL,
        created_in,
        used_in,
        tearing: Tearing::Pages,
        twins: false,
    }
}

/// All scenes.
pub static SCENES: [Scene; 9] = [
    scene("page-cache", Domain::PageCache, Domain::PageCache),
    scene("dax", Domain::Dax, Domain::Dax),
    scene("dax-to-page-cache", Domain::Dax, Domain::PageCache),
    scene("page-cache-to-dax", Domain::PageCache, Domain::Dax),
    Scene {
        tearing: Tearing::Sectors,
        ..scene("torn-sectors", Domain::PageCache, Domain::PageCache)
    },
    Scene {
        twins: true,
        ..scene("page-cache-twins", Domain::PageCache, Domain::PageCache)
    },
    Scene {
        twins: true,
        ..scene("dax-twins", Domain::Dax, Domain::Dax)
    },
    Scene {
        plan: &WIDE,
        ..scene("page-cache-wide", Domain::PageCache, Domain::PageCache)
    },
    Scene {
        plan: &WIDE,
        ..scene("dax-wide", Domain::Dax, Domain::Dax)
    },
];

impl Scene {
    /// The scene of that name.
    pub fn named(name: &str) -> Option<&'static Scene> {
        SCENES.iter().find(|s| s.name == name)
    }

    /// Whether the filesystem is mounted with DAX in the boot in which clusters turned live without it.
    fn is_remounted(&self) -> bool {
        self.created_in == Domain::PageCache && self.used_in == Domain::Dax
    }

    /// Whether the disk is too large for what looks at all of it.
    pub fn is_wide(&self) -> bool {
        self.plan.bytes > SMALL.bytes
    }

    /// The images that are worked on.
    pub fn images(&self) -> &'static [&'static str] {
        if self.twins { &[IMAGE, TWIN] } else { &[IMAGE] }
    }
}

/// An image that no workload stores to.
#[derive(Debug, Clone)]
pub struct Bystander {
    /// What it is called.
    pub name: &'static str,
    /// What it shows, always. Nobody has stored to it since its first snapshot was taken, so each of them shows the same.
    pub contents: Contents,
    /// Numbers of the snapshots that it has at the start. Images that come to be based on it add others.
    pub snapshots: Vec<u64>,
}

/// A place to start from.
#[derive(Debug)]
pub struct Setting {
    /// What it was made for.
    pub scene: &'static Scene,
    /// The filesystem at the start.
    pub start: Moment,
    /// What each of the images that are worked on must show.
    pub models: Vec<Model>,
    /// What the first one shows at the start.
    pub first: Contents,
    /// The others.
    pub bystanders: Vec<Bystander>,
    /// Number of the boot in which workloads begin.
    pub boot: u128,
    /// Map words that may ever be other than zero.
    pub words: Vec<u64>,
    /// Fingerprints of images that were compared already and found as they were.
    sound: Mutex<HashSet<u64>>,
}

impl Setting {
    /// The images of `scene`, where calls at `skipped` do nothing once they are made.
    pub fn new(scene: &'static Scene, skipped: Option<Site>) -> Self {
        let sim = Sim::new(scene.created_in).with_tearing(scene.tearing);
        let mut boot = 1;
        build(scene, &sim, boot);
        let bystanders = BYSTANDERS.map(|name| Bystander::of(scene, &sim, name, boot));
        let mut start = sim.now();
        if scene.is_remounted() {
            let image = open(&sim, IMAGE, boot).expect("a fresh image opens");
            for cluster in scene.plan.with(Role::Quiet) {
                let made = image.make_writable(Cluster(cluster).only(), &mut Vec::new());
                made.expect("a sound medium has space");
            }
            start = sim.now();
        } else {
            let choices = start.choices();
            start = start.power_cut(&choices, &newest(&choices)).now();
            boot += 1;
        }
        let sim = start.process_death();
        let first = contents(scene.plan, &sim, IMAGE, boot).expect("it can be read");
        let model = Model::new(first.clone());
        let models = if scene.twins {
            vec![model.with_snapshot(), model]
        } else {
            vec![model]
        };
        Self {
            scene,
            start: sim.with_fault(scene.used_in, skipped).now(),
            models,
            first,
            bystanders: bystanders.to_vec(),
            boot,
            words: words(scene.plan),
            sound: Mutex::default(),
        }
    }

    /// The disk's clusters that are looked at.
    pub fn plan(&self) -> &'static Plan {
        self.scene.plan
    }

    /// Where the images are used.
    pub fn domain(&self) -> Domain {
        self.scene.used_in
    }

    /// Whether an image of that fingerprint was found as it must be.
    pub fn is_sound(&self, fingerprint: u64) -> bool {
        self.sound
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .contains(&fingerprint)
    }

    /// Notes that it was.
    pub fn note_sound(&self, fingerprint: u64) {
        self.sound
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .insert(fingerprint);
    }
}

impl Bystander {
    fn of(scene: &Scene, sim: &Sim, name: &'static str, boot: u128) -> Self {
        let stored = stored(sim, name, boot).expect("a fresh image can be read");
        let contents = layer_contents(scene.plan, &stored, stored.root().active);
        let snapshots = stored.root().snapshots.iter().map(|s| s.number);
        Self {
            name,
            contents: contents.expect("a fresh image can be read"),
            snapshots: snapshots.collect(),
        }
    }
}

/// The words of the tracked clusters, in maps of their size and of the lowest base's.
fn words(plan: &Plan) -> Vec<u64> {
    let numbers = plan.clusters.iter().flat_map(|(c, _)| [*c, *c / 2]);
    let words: BTreeSet<_> = numbers.map(|c| map::word_of(Cluster(c))).collect();
    words.into_iter().collect()
}

/// What images on `sim` need to know of the world in the boot number `boot`.
pub fn environment(sim: &Sim, boot: u128) -> Environment {
    Environment {
        bases: BaseDirs::in_directory(sim.top()),
        boot: Uuid::from_u128(boot),
    }
}

/// What the image called `name` is to be.
pub fn new_image(plan: &Plan, name: &str, base: Option<&str>) -> NewImage {
    let cluster = if name == "base0" {
        2 * CLUSTER_BYTES
    } else {
        CLUSTER_BYTES
    };
    NewImage {
        size: Some(VirtualSize::new(plan.bytes).expect("a possible size")),
        cluster: ClusterSize::new(cluster).expect("a possible cluster size"),
        allocation_unit: Some(cluster),
        base: base.map(|path| Base::Image {
            path: path.into(),
            snapshot: None,
            reference: false,
        }),
    }
}

/// A new image or clone.
pub fn create(
    plan: &Plan,
    sim: &Sim,
    name: &str,
    base: Option<&str>,
    boot: u128,
) -> Result<(), String> {
    let new = new_image(plan, name, base);
    let created = create_in(sim.top().as_ref(), name, &new, &environment(sim, boot));
    created.map(drop).map_err(text)
}

/// Opens an image for writing.
pub fn open(sim: &Sim, name: &str, boot: u128) -> Result<Image, String> {
    directory(sim, name)?;
    try_open(sim, name, boot).map_err(|e| format!("{name}: {}", text(e)))
}

/// As [`open`], of an image whose directory exists.
pub fn try_open(sim: &Sim, name: &str, boot: u128) -> pcow_format::Result<Image> {
    let dir = sim
        .top()
        .open_dir(name)
        .expect("the image's directory exists");
    Image::load(dir, environment(sim, boot))
}

/// How far an image was received; `None` if none is being received.
pub fn received(sim: &Sim, name: &str, boot: u128) -> Result<Option<u64>, String> {
    let top = sim.top();
    let env = environment(sim, boot);
    let place = receive_place(top.as_ref(), name, &env);
    let unfinished = ops::unfinished_in(&place);
    let unfinished = unfinished.map_err(|e| format!("{name}, received: {}", text(e)))?;
    Ok(unfinished.map(|u| u.header.start))
}

/// Where an image is received.
pub fn receive_place<'a>(
    top: &'a dyn Directory,
    name: &'a str,
    env: &'a Environment,
) -> Receive<'a> {
    Receive {
        parent: top,
        name,
        path: Path::new(name),
        env,
        rename: None,
    }
}

/// Looks at an image without opening it for writing.
pub fn stored(sim: &Sim, name: &str, boot: u128) -> Result<Stored, String> {
    let dir = directory(sim, name)?;
    Stored::load(dir, environment(sim, boot)).map_err(|e| format!("{name}: {}", text(e)))
}

fn directory(sim: &Sim, name: &str) -> Result<Arc<dyn Directory>, String> {
    let opened = sim.top().open_dir(name);
    opened.map_err(|e| format!("{name}: {e}"))
}

/// What an image shows in the tracked clusters.
pub fn contents(plan: &Plan, sim: &Sim, name: &str, boot: u128) -> Result<Contents, String> {
    let stored = stored(sim, name, boot)?;
    layer_contents(plan, &stored, stored.root().active)
}

/// What the stack of layers below and including `top` shows in the tracked clusters.
pub fn layer_contents(plan: &Plan, stored: &Stored, top: Uuid) -> Result<Contents, String> {
    let chain = stored.chain(top).map_err(text)?;
    read_tracked(plan, |offset, buf| chain.read(offset, buf))
}

/// Reads the tracked clusters through `read`.
pub fn read_tracked(
    plan: &Plan,
    mut read: impl FnMut(u64, &mut [u8]) -> pcow_format::Result<()>,
) -> Result<Contents, String> {
    let one = |(cluster, _): &(u64, Role)| {
        let mut buf = vec![0; 2 * 4096];
        read(cluster * CLUSTER_BYTES, &mut buf).map_err(text)?;
        Ok(Arc::new(buf))
    };
    let all = plan.clusters.iter().map(one);
    Ok(Contents(all.collect::<Result<_, String>>()?))
}

/// As [`read_tracked`], over what was read before.
pub fn read_again(
    plan: &Plan,
    contents: &mut Contents,
    mut read: impl FnMut(u64, &mut [u8]) -> pcow_format::Result<()>,
) -> Result<(), String> {
    for ((cluster, _), into) in plan.clusters.iter().zip(&mut contents.0) {
        read(cluster * CLUSTER_BYTES, Arc::make_mut(into).as_mut_slice()).map_err(text)?;
    }
    Ok(())
}

/// An error with its causes.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub fn text(error: pcow_format::Error) -> String {
    chain_text(&error)
}

/// What an error says, with its causes.
pub fn chain_text(error: &pcow_format::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}

fn build(scene: &Scene, sim: &Sim, boot: u128) {
    let plan = scene.plan;
    let fill = |name: &str, base: Option<&str>, clusters: Vec<(u64, u8)>| {
        create(plan, sim, name, base, boot).expect("creation on a sound medium");
        let image = open(sim, name, boot).expect("a fresh image opens");
        for (cluster, byte) in clusters {
            fill_cluster(&image, cluster, byte);
        }
        image.flush().expect("a sound medium flushes");
        image
    };
    let with = |roles: &[(Role, u8)]| {
        let of = |(role, byte): &(Role, u8)| {
            let byte = *byte;
            plan.with(*role).map(move |c| (c, byte)).collect::<Vec<_>>()
        };
        roles.iter().flat_map(of).collect::<Vec<_>>()
    };
    let below = [
        (Role::Base, 0xa0),
        (Role::Zero, 0xa1),
        (Role::Quiet, 0xa2),
        (Role::Late, 0xa3),
    ];
    fill("base0", None, with(&below));
    fill("base1", Some("base0"), with(&[(Role::Base, 0xb0)]));
    let other = [
        (Role::Base, 0xc0),
        (Role::Absent, 0xc1),
        (Role::Leftover, 0xc2),
    ];
    fill(OTHER, None, with(&other));
    let image = fill(IMAGE, Some("base1"), Vec::new());
    for cluster in plan.with(Role::Zero) {
        let zero = image.active().mark_zero(Cluster(cluster).only());
        zero.expect("a sound medium stores");
    }
    image.flush().expect("a sound medium flushes");
    drop(image);
    if scene.twins {
        create(plan, sim, TWIN, Some(IMAGE), boot).expect("creation on a sound medium");
    }
    for name in scene.images() {
        let image = open(sim, name, boot).expect("a fresh image opens");
        // Also below a cluster that says zero.
        for cluster in plan.with(Role::Leftover).chain(plan.with(Role::Zero)) {
            write(&image, cluster * CLUSTER_BYTES, &[0xee; 8192]);
        }
        image.flush().expect("a sound medium flushes");
    }
}

/// Fills half of a cluster of [`CLUSTER_BYTES`]; the other half stays as it is.
fn fill_cluster(image: &Image, cluster: u64, byte: u8) {
    let offset = cluster * CLUSTER_BYTES;
    let own = image.cluster_size().cluster_at(offset);
    image
        .make_writable(own.only(), &mut Vec::new())
        .expect("a sound medium has space");
    let bytes: Vec<u8> = (0..4096u16).map(|i| byte ^ i.to_le_bytes()[0]).collect();
    write(image, offset + 2048, &bytes);
}

fn write(image: &Image, offset: u64, bytes: &[u8]) {
    let file = image.active().data_file();
    let written = file.write_at(Site("guest.store"), bytes, offset);
    written.expect("a sound medium stores");
}
