// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations whose calls are to fail. A new one joins by an entry in [`SCENARIOS`].
//!
//! Every operation of the format is here. Not here is what `pcow-img` writes besides images, whose own tests let those files be full.

use pcow_format::ops::{Checksum, rebase_unsafe_of};
use pcow_format::repair::{Unflushed, read_all, repair, settle_unflushed};
use pcow_format::{ClusterRange, Image, Result, VirtualSize};

use super::world::{
    CLEAN, CLUSTER, CLUSTER_LEN, IMAGE, IN_BASE, NOBODYS, OWN, World, ZERO, based_on,
};

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
    /// Whether it is done while nobody has the image open.
    pub(super) closed: bool,
    /// The image that it makes.
    pub(super) makes: Option<&'static str>,
}

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    closed("open", nothing, |w| w.open_faulty()),
    closed("open in another boot", reboot_with_live, |w| {
        w.open_faulty()
    }),
    scenario("read", nothing, |w| {
        let mut found = vec![0; 8 * CLUSTER_LEN];
        w.image().read(0, &mut found)
    }),
    closed("check", nothing, |w| {
        pcow_format::check::check(&w.stored()?).map(drop)
    }),
    closed("read all", nothing, |w| {
        read_all(&w.stored()?, &mut |_| ()).map(drop)
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
    scenario("reserve words", nothing, |w| {
        w.image().active().reserve_map()
    }),
    scenario("give back", prepared, |w| {
        w.image().active().give_back_prepared()
    }),
    scenario("give back clean", touched, |w| {
        let all = ClusterRange::new(0, 32);
        w.image().give_back_clean(all).map(drop)
    }),
    scenario("flush", touched, |w| w.image().flush()),
    scenario("write", nothing, |w| {
        w.change(&[(IN_BASE, 0x31), (ZERO, 0x33), (OWN, 0x35), (NOBODYS, 0x3a)])
    }),
    scenario("write zeros", nothing, |w| {
        w.change(&[(IN_BASE, 0), (ZERO, 0), (OWN, 0)])
    }),
    scenario("compact", touched, |w| {
        w.image().compact(&mut |_| ()).map(drop)
    }),
    scenario("snapshot", touched, |w| {
        w.image_mut().snapshot(None).map(drop)
    }),
    scenario("live snapshot", touched, live_snapshot),
    // What was stored after the failure would go.
    once(scenario("rollback", snapshotted, |w| {
        w.image_mut().rollback("1", false).map(drop)
    })),
    once(scenario("rollback, discarding", snapshotted, |w| {
        w.image_mut().rollback("1", true).map(drop)
    })),
    scenario("delete what nothing lies on", with_a_leaf, |w| {
        w.delete("2")
    }),
    scenario("delete below a sealed layer", snapshotted_twice, |w| {
        w.delete("1")
    }),
    scenario("delete below the active layer", snapshotted, |w| {
        w.delete("1")
    }),
    scenario("delete beside a guest", snapshotted_twice, |w| {
        w.delete_beside_a_guest("1")
    }),
    scenario("rename", snapshotted, |w| {
        let root = w.image().write_renamed("1", "renamed")?;
        w.image_mut().adopt_root(root);
        Ok(())
    }),
    scenario("resize", touched, |w| w.resize()),
    scenario("resize of what was not written to", just_snapshotted, |w| {
        w.resize()
    }),
    scenario("rebase", touched, |w| {
        w.image_mut()
            .rebase(Some(&based_on("other")), IMAGE)
            .map(drop)
    }),
    scenario("rebase on none", touched, |w| {
        w.image_mut().rebase(None, IMAGE).map(drop)
    }),
    closed("rebase, unsafe", touched, |w| {
        rebase_unsafe_of(&w.stored()?, Some(&based_on("base")), IMAGE).map(drop)
    }),
    once(makes(
        "on-raw",
        closed("create on a raw file", World::write_raw, |w| {
            w.create_on_raw("on-raw")
        }),
    )),
    once(makes(
        "new",
        closed("create", nothing, |w| w.create("new", None)),
    )),
    once(makes(
        "clone",
        closed("clone", nothing, |w| {
            w.create("clone", Some(based_on(IMAGE)))
        }),
    )),
    once(makes(
        "clone",
        closed("clone by reference", just_snapshotted, |w| {
            w.refer_to_snapshot("clone", "1")
        }),
    )),
    once(makes(
        "converted",
        closed("convert from raw", nothing, |w| w.take_in("converted")),
    )),
    closed("repair", touched, |w| repair(&w.stored()?).map(drop)),
    closed("trust", reboot_with_live, |w| {
        settle_unflushed(&w.stored()?, Unflushed::Trust).map(drop)
    }),
    closed("give up", with_live, |w| {
        settle_unflushed(&w.stored()?, Unflushed::Discard).map(drop)
    }),
    closed("send", World::send_one, World::send_again),
    makes(
        "copy",
        closed("receive a new image", World::send_one, World::receive),
    ),
    closed("receive most of it", World::send_one, World::receive_most),
    makes(
        "copy",
        closed(
            "receive the rest of it",
            World::send_rest_of_one,
            World::receive,
        ),
    ),
    closed("give up receiving", World::send_rest_of_one, World::give_up),
    closed("receive what follows", World::send_two, World::receive),
    closed(
        "receive the rest of what follows",
        World::send_rest_of_two,
        World::receive,
    ),
];

/// One that is done to the open image.
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
        closed: false,
        makes: None,
    }
}

/// One for which the image is closed once it is prepared.
const fn closed(
    name: &'static str,
    prepare: fn(&mut World) -> Result<()>,
    run: fn(&mut World) -> Result<()>,
) -> Scenario {
    Scenario {
        closed: true,
        ..scenario(name, prepare, run)
    }
}

const fn once(scenario: Scenario) -> Scenario {
    Scenario {
        again: false,
        ..scenario
    }
}

const fn makes(image: &'static str, scenario: Scenario) -> Scenario {
    Scenario {
        makes: Some(image),
        ..scenario
    }
}

fn nothing(_: &mut World) -> Result<()> {
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

/// With nothing written since.
fn just_snapshotted(world: &mut World) -> Result<()> {
    world.image_mut().snapshot(None).map(drop)
}

fn snapshotted(world: &mut World) -> Result<()> {
    // What the snapshot shows is what is to be shown all the time.
    just_snapshotted(world)?;
    world.writable(CLEAN)
}

/// Two layers that hold something, under an active one that does not.
fn snapshotted_twice(world: &mut World) -> Result<()> {
    snapshotted(world)?;
    just_snapshotted(world)
}

/// A snapshot of which the disk knows nothing any more.
fn with_a_leaf(world: &mut World) -> Result<()> {
    snapshotted(world)?;
    world.image_mut().rollback("1", false).map(drop)
}

/// Live clusters, of which it does not show whether they are kept.
fn with_live(world: &mut World) -> Result<()> {
    world.writable(CLEAN)
}

fn reboot_with_live(world: &mut World) -> Result<()> {
    // Live clusters go with the boot; what they cover is the same.
    with_live(world)?;
    world.reboot();
    Ok(())
}

fn live_snapshot(world: &mut World) -> Result<()> {
    let image = world.image_mut();
    let prepared = image.prepare_snapshot(None)?;
    image.take_snapshot(prepared, Checksum::Later)?;
    if let Some(root) = image.write_checksums()? {
        image.adopt_root(root);
    }
    Ok(())
}

impl World {
    /// Fills clusters, each with one byte; those that are to be 0 are zeroed.
    pub(super) fn change(&mut self, clusters: &[(u64, u8)]) -> Result<()> {
        self.begin_change(clusters);
        for (cluster, byte) in clusters {
            let (at, image) = (cluster * CLUSTER, self.image());
            match byte {
                0 => image.write_zeros(at..at + CLUSTER)?,
                _ => image.write(at, &[*byte; CLUSTER_LEN])?,
            }
        }
        self.end_change();
        Ok(())
    }

    /// Deletes a snapshot, unless that was done before something failed.
    fn delete(&mut self, snapshot: &str) -> Result<()> {
        let image = self.image_mut();
        if image.root().snapshot(snapshot).is_err() {
            return Ok(());
        }
        image.delete_snapshot(snapshot).map(drop)
    }

    fn delete_beside_a_guest(&mut self, snapshot: &str) -> Result<()> {
        let image = self.image_mut();
        if image.root().snapshot(snapshot).is_err() {
            return Ok(());
        }
        let deletion = image.prepare_deletion(snapshot, false)?;
        image.commit_deletion(&deletion)?;
        let deletion = image.adopt_deletion(deletion);
        image.finish_deletion(deletion).map(drop)
    }

    fn resize(&mut self) -> Result<()> {
        self.image_mut().resize(VirtualSize::new(4 << 20)?)
    }

    /// A new image takes in the bytes of a file.
    fn take_in(&mut self, name: &str) -> Result<()> {
        let file = self.raw_file()?;
        let fill = &mut |image: &Image| {
            let mut at = 0;
            while let Some(range) = file.next_data(at).map_err(super::world::seam)? {
                at = range.end;
                image.import(file.as_ref(), range)?;
            }
            Ok(())
        };
        self.create_filled(name, fill)
    }
}
