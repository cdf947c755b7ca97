// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The images that every workload starts from, built once per medium.
//!
//! ```text
//! base0 ◀─ base1 ◀─ img      other
//! ```

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use pcow_format::medium::sim::{Moment, Sim};
use pcow_format::medium::{Directory, Domain, Site};
use pcow_format::ops::{Base, NewImage, create_in};
use pcow_format::{BaseDirs, Cluster, ClusterSize, Environment, Image, Stored, VirtualSize};
use uuid::Uuid;

use crate::model::{ABSENT, BASE, CLUSTER_BYTES, Contents, LEFTOVER, QUIET, TRACKED, ZERO};

/// The image under test.
pub const IMAGE: &str = "img";
/// Images that no workload may change; the last one is what it can be rebased on.
pub const BYSTANDERS: [&str; 3] = ["base0", "base1", OTHER];
/// What the image under test can be rebased on.
pub const OTHER: &str = "other";

/// A place to start from.
#[derive(Debug)]
pub struct Setting {
    pub domain: Domain,
    pub start: Moment,
    pub image: Contents,
    pub bystanders: Vec<Contents>,
    /// Number of the boot in which workloads begin.
    pub boot: u128,
    /// Fingerprints of images that were compared already and found as they were.
    sound: Mutex<HashSet<u64>>,
}

impl Setting {
    /// Images created in one domain and used in another (or the same), where calls at `skipped` do nothing.
    pub fn new(created_in: Domain, used_in: Domain, skipped: Option<Site>) -> Self {
        let sim = Sim::new(created_in);
        let boot = 1;
        build(&sim, boot);
        let read = |name| contents(&sim, name, boot).expect("a fresh image can be read");
        let moment = sim.now();
        let choices = moment.choices();
        let newest: Vec<_> = choices.iter().map(|c| c.options() - 1).collect();
        let settled = moment.power_cut(&choices, &newest);
        Self {
            domain: used_in,
            start: settled.with_fault(used_in, skipped).now(),
            image: read(IMAGE),
            bystanders: BYSTANDERS.map(read).to_vec(),
            boot: boot + 1,
            sound: Mutex::default(),
        }
    }

    pub fn is_sound(&self, fingerprint: u64) -> bool {
        self.sound.lock().unwrap().contains(&fingerprint)
    }

    pub fn note_sound(&self, fingerprint: u64) {
        self.sound.lock().unwrap().insert(fingerprint);
    }
}

/// What images on `sim` need to know of the world in the boot number `boot`.
pub fn environment(sim: &Sim, boot: u128) -> Environment {
    Environment {
        bases: BaseDirs::in_directory(sim.top()),
        boot: Uuid::from_u128(boot),
    }
}

/// A new image or clone of 4 MiB.
pub fn create(sim: &Sim, name: &str, base: Option<&str>, boot: u128) -> Result<(), String> {
    let cluster = if name == "base0" {
        2 * CLUSTER_BYTES
    } else {
        CLUSTER_BYTES
    };
    let new = NewImage {
        size: Some(VirtualSize::new(4 << 20).expect("a possible size")),
        cluster: ClusterSize::new(cluster).expect("a possible cluster size"),
        allocation_unit: Some(cluster),
        base: base.map(|path| Base::Image {
            path: path.into(),
            snapshot: None,
            reference: false,
        }),
    };
    let created = create_in(sim.top().as_ref(), name, &new, &environment(sim, boot));
    created.map(drop).map_err(text)
}

/// Opens an image for writing.
pub fn open(sim: &Sim, name: &str, boot: u128) -> Result<Image, String> {
    let dir = directory(sim, name)?;
    Image::load(dir, environment(sim, boot)).map_err(|e| format!("{name}: {}", text(e)))
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
pub fn contents(sim: &Sim, name: &str, boot: u128) -> Result<Contents, String> {
    let stored = stored(sim, name, boot)?;
    layer_contents(&stored, stored.root().active)
}

/// What the stack of layers below and including `top` shows in the tracked clusters.
pub fn layer_contents(stored: &Stored, top: Uuid) -> Result<Contents, String> {
    let chain = stored.chain(top).map_err(text)?;
    read_tracked(|offset, buf| chain.read(offset, buf))
}

/// Reads the tracked clusters through `read`.
pub fn read_tracked(
    mut read: impl FnMut(u64, &mut [u8]) -> pcow_format::Result<()>,
) -> Result<Contents, String> {
    let one = |cluster: u64| {
        let mut buf = vec![0; 2 * 4096];
        read(cluster * CLUSTER_BYTES, &mut buf).map_err(text)?;
        Ok(Arc::new(buf))
    };
    Ok(Contents(
        TRACKED
            .into_iter()
            .map(one)
            .collect::<Result<_, String>>()?,
    ))
}

/// An error with its causes.
pub fn text(error: pcow_format::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}

fn build(sim: &Sim, boot: u128) {
    let fill = |name: &str, base: Option<&str>, clusters: &[(u64, u8)]| {
        create(sim, name, base, boot).expect("creation on a sound medium");
        let image = open(sim, name, boot).expect("a fresh image opens");
        for (cluster, byte) in clusters {
            fill_cluster(&image, *cluster, *byte);
        }
        image.flush().expect("a sound medium flushes");
        image
    };
    fill("base0", None, &[(BASE, 0xa0), (ZERO, 0xa1), (QUIET, 0xa2)]);
    fill("base1", Some("base0"), &[(BASE, 0xb0)]);
    fill(
        OTHER,
        None,
        &[(BASE, 0xc0), (ABSENT, 0xc1), (LEFTOVER, 0xc2)],
    );
    let image = fill(IMAGE, Some("base1"), &[]);
    let zero = image.active().mark_zero(Cluster(ZERO).only());
    zero.expect("a sound medium stores");
    write(&image, LEFTOVER * CLUSTER_BYTES, &[0xee; 8192]);
    image.flush().expect("a sound medium flushes");
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
