// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The operations that workloads are made of, and how each changes what the image must show. A new operation is one
//! entry in [`OPERATIONS`].

use std::ops::Range;

use pcow_format::medium::sim::{Moment, Sim};
use pcow_format::medium::{Domain, Site};
use pcow_format::ops::{Base, Checksum};
use pcow_format::{Cluster, Image, Source};

use crate::explorer::{Random, newest};
use crate::model::{
    ABSENT, BASE, CLUSTER_BYTES, LEFTOVER, Model, Place, TRACKED, ZERO, check_equal,
};
use crate::setting::{self, IMAGE, OTHER, Setting, text};

/// Something that changes an image, or ends its process.
pub struct Operation {
    pub name: &'static str,
    /// Performs it; `false` if it cannot be done in this state.
    run: fn(&mut Run<'_>) -> Result<bool, String>,
}

/// All operations.
pub const OPERATIONS: &[Operation] = &[
    operation("store to absent", |r| r.store(ABSENT)),
    operation("store to base", |r| r.store(BASE)),
    operation("store to zero", |r| r.store(ZERO)),
    operation("store to leftover", |r| r.store(LEFTOVER)),
    operation("guest flush", |r| r.guest_flush()),
    operation("flush", |r| r.flush()),
    operation("prepare", |r| r.prepare()),
    operation("give back", |r| r.give_back()),
    operation("touch", |r| r.touch()),
    operation("give back clean", |r| r.give_back_clean()),
    operation("snapshot", |r| r.snapshot()),
    operation("live snapshot", |r| r.live_snapshot()),
    operation("delete", |r| r.delete()),
    operation("delete below a sealed layer", |r| r.delete_merging()),
    operation("rollback", |r| r.rollback()),
    operation("rebase", |r| r.rebase()),
    operation("clone", |r| r.clone_image()),
    operation("kill", |r| r.kill()),
    operation("power cut", |r| r.power_cut(false)),
    operation("power cut after write-back", |r| r.power_cut(true)),
];

const fn operation(name: &'static str, run: fn(&mut Run<'_>) -> Result<bool, String>) -> Operation {
    Operation { name, run }
}

/// A piece of an operation: while it runs the image shows any of `possible`, afterwards the last of them.
#[derive(Debug)]
struct Transition {
    acts: Range<usize>,
    possible: Vec<Model>,
}

/// A moment of an operation, with what the image may show after a crash then.
#[derive(Debug)]
pub struct Point {
    pub moment: Moment,
    pub possible: Vec<Model>,
}

/// A workload under way.
#[derive(Debug)]
pub struct Run<'a> {
    setting: &'a Setting,
    pub sim: Sim,
    /// Number of the present boot.
    pub boot: u128,
    image: Option<Image>,
    model: Model,
    transitions: Vec<Transition>,
    /// Words stored and not written back since.
    unflushed: Vec<Place>,
    stores: u64,
    random: Random,
}

impl<'a> Run<'a> {
    pub fn new(setting: &'a Setting, seed: u64) -> Result<Self, String> {
        let sim = setting.start.process_death();
        let image = setting::open(&sim, IMAGE, setting.boot)?;
        Ok(Self {
            setting,
            sim,
            boot: setting.boot,
            image: Some(image),
            model: Model::new(setting.image.clone()),
            transitions: Vec::new(),
            unflushed: Vec::new(),
            stores: 0,
            random: Random(seed),
        })
    }

    /// Performs an operation, recording its acts, and looks at the image afterwards.
    pub fn perform(&mut self, operation: &Operation) -> Result<bool, String> {
        self.transitions.clear();
        self.sim.record();
        if !(operation.run)(self)? {
            return Ok(false);
        }
        let found = setting::read_tracked(|at, buf| self.image().read(at, buf))?;
        check_equal("the running image", &found, self.model.disk.now())?;
        Ok(true)
    }

    /// The points at which the last operation may be cut off.
    pub fn points(&mut self) -> Vec<Point> {
        let numbered = self.sim.moments().into_iter().enumerate();
        let point = |(i, moment)| Point {
            moment,
            possible: self.possible(i),
        };
        numbered.map(point).collect()
    }

    fn possible(&self, act: usize) -> Vec<Model> {
        let during = self.transitions.iter().find(|t| t.acts.contains(&act));
        let Some(t) = during else {
            return vec![self.model.clone()];
        };
        if act + 1 == t.acts.end {
            return t.possible.last().cloned().into_iter().collect();
        }
        t.possible.clone()
    }

    fn image(&self) -> &Image {
        self.image.as_ref().expect("open between operations")
    }

    /// Performs a piece of an operation that leads over `steps` to the last of them.
    fn transition<T>(
        &mut self,
        steps: &[Model],
        piece: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        let start = self.sim.recorded();
        let result = piece(self)?;
        let mut possible = vec![self.model.clone()];
        possible.extend_from_slice(steps);
        self.transitions.push(Transition {
            acts: start..self.sim.recorded(),
            possible,
        });
        self.model = steps.last().unwrap_or(&self.model).clone();
        Ok(result)
    }

    /// Performs a piece of an operation that changes nothing that can be seen.
    fn unseen<T>(
        &mut self,
        piece: impl FnOnce(&Image) -> pcow_format::Result<T>,
    ) -> Result<T, String> {
        self.transition(&[], |run| piece(run.image()).map_err(text))
    }

    /// Makes a cluster writable and stores to both of its pages, as a guest does.
    fn store(&mut self, cluster: u64) -> Result<bool, String> {
        self.unseen(|image| image.make_writable(Cluster(cluster).only(), &mut Vec::new()))?;
        let index = TRACKED.iter().position(|c| *c == cluster);
        let index = index.expect("workloads store to tracked clusters only");
        for page in 0..2 {
            self.stores += 1;
            // Each store has a place of its own among the first ones, then they meet again.
            let at = page * 4096 + usize::try_from(self.stores % 3).unwrap_or(0) * 64;
            self.store_word((index, at), 0x5700_0000 + self.stores)?;
        }
        Ok(true)
    }

    fn store_word(&mut self, place: Place, value: u64) -> Result<(), String> {
        let mut after = self.model.clone();
        after.disk.store(place, value);
        let domain = self.setting.domain;
        self.transition(&[after], |run| {
            store_word(run.image(), domain, place, value)
        })?;
        self.unflushed.push(place);
        Ok(())
    }

    /// Write-back and fence of everything stored, where that means something.
    fn guest_flush(&mut self) -> Result<bool, String> {
        if self.setting.domain == Domain::PageCache {
            return Ok(false);
        }
        let places = std::mem::take(&mut self.unflushed);
        let mut after = self.model.clone();
        places.iter().for_each(|p| after.disk.promise(*p));
        self.transition(&[after], |run| write_back(run.image(), &places))?;
        Ok(true)
    }

    fn flush(&mut self) -> Result<bool, String> {
        let mut after = self.model.clone();
        after.disk.promise_all();
        self.transition(&[after], |run| run.image().flush().map_err(text))?;
        self.unflushed.clear();
        Ok(true)
    }

    fn snapshot(&mut self) -> Result<bool, String> {
        let after = self.model.with_snapshot();
        self.change_tree(&[after], |image| image.snapshot(None).map(drop))
    }

    /// As of a running guest: one attempt is given up; then the guest stores once more while the snapshot is prepared. The
    /// checksum follows.
    fn live_snapshot(&mut self) -> Result<bool, String> {
        self.unseen(|image| {
            let prepared = image.prepare_snapshot(None)?;
            image.abandon_snapshot(prepared);
            Ok(())
        })?;
        let prepared = self.unseen(|image| image.prepare_snapshot(None))?;
        self.store(ABSENT)?;
        let after = self.model.with_snapshot();
        let taken = |image: &mut Image| image.take_snapshot(prepared, Checksum::Later).map(drop);
        self.change_tree(&[after], taken)?;
        self.change_tree(&[], |image| {
            let root = image.write_checksums()?.expect("one is pending");
            image.adopt_root(root);
            Ok(())
        })
    }

    /// The oldest snapshot.
    fn delete(&mut self) -> Result<bool, String> {
        let Some((number, _)) = self.model.snapshots.first().cloned() else {
            return Ok(false);
        };
        self.delete_number(number)
    }

    fn delete_number(&mut self, number: u64) -> Result<bool, String> {
        let after = self.model.without_snapshot(number);
        self.change_tree(&[after], |image| {
            image.delete_snapshot(&number.to_string()).map(drop)
        })
    }

    /// Two layers that both hold something become one.
    fn delete_merging(&mut self) -> Result<bool, String> {
        self.store(ABSENT)?;
        self.snapshot()?;
        let number = self.model.snapshots.last().map(|(number, _)| *number);
        self.store(ZERO)?;
        self.snapshot()?;
        self.delete_number(number.expect("it has just been taken"))
    }

    fn rollback(&mut self) -> Result<bool, String> {
        let Some((number, contents)) = self.model.snapshots.first().cloned() else {
            return Ok(false);
        };
        let saved = if self.is_untouched()? {
            self.model.clone()
        } else {
            self.model.with_snapshot()
        };
        let after = saved.with_disk(contents);
        self.change_tree(&[after], |image| {
            image.rollback(&number.to_string(), false).map(drop)
        })
    }

    fn rebase(&mut self) -> Result<bool, String> {
        let mut after = self.model.clone();
        after.disk.promise_all();
        self.change_tree(&[after], |image| {
            image.rebase(Some(&other_base()), IMAGE).map(drop)
        })
    }

    fn change_tree(
        &mut self,
        steps: &[Model],
        change: impl FnOnce(&mut Image) -> pcow_format::Result<()>,
    ) -> Result<bool, String> {
        self.transition(steps, |run| {
            let image = run.image.as_mut().expect("open between operations");
            change(image).map_err(text)
        })?;
        self.unflushed.clear();
        Ok(true)
    }

    /// Clones the image, which must be closed for that.
    fn clone_image(&mut self) -> Result<bool, String> {
        let sealed = if self.is_untouched()? {
            self.model.clone()
        } else {
            self.model.with_snapshot()
        };
        let name = format!("clone-{}", sealed.clones.len() + 1);
        let after = sealed.with_clone(&name);
        self.image = None;
        self.transition(&[sealed, after], |run| {
            setting::create(&run.sim, &name, Some(IMAGE), run.boot)
        })?;
        self.unflushed.clear();
        self.reopen()
    }

    /// Storage ahead of stores, for what no layer has.
    fn prepare(&mut self) -> Result<bool, String> {
        let mut prepared = false;
        for cluster in [ABSENT, LEFTOVER].map(Cluster) {
            if self.image().source(cluster).map_err(text)? == Source::Nobody {
                self.unseen(|image| image.active().prepare(cluster.only()))?;
                prepared = true;
            }
        }
        Ok(prepared)
    }

    /// Prepared storage that was not used is given back.
    fn give_back(&mut self) -> Result<bool, String> {
        self.unseen(|image| image.active().give_back_prepared())?;
        Ok(self.sim.recorded() > 0)
    }

    /// Clusters are made writable for what turns out to be a load.
    fn touch(&mut self) -> Result<bool, String> {
        for cluster in [BASE, ABSENT].map(Cluster) {
            self.unseen(|image| image.make_writable(cluster.only(), &mut Vec::new()))?;
        }
        Ok(self.sim.recorded() > 0)
    }

    /// Clusters that hold what they cover become absent again.
    fn give_back_clean(&mut self) -> Result<bool, String> {
        let mut given_back = 0;
        for cluster in TRACKED.map(Cluster) {
            given_back += self.unseen(|image| image.give_back_clean(cluster.only()))?;
        }
        Ok(given_back > 0)
    }

    /// The process dies and another one opens the image.
    fn kill(&mut self) -> Result<bool, String> {
        self.image = None;
        self.reopen()
    }

    fn reopen(&mut self) -> Result<bool, String> {
        let image = self.transition(&[], |run| setting::open(&run.sim, IMAGE, run.boot))?;
        self.image = Some(image);
        Ok(true)
    }

    /// The machine loses power, and another boot opens the image.
    fn power_cut(&mut self, everything_written_back: bool) -> Result<bool, String> {
        self.image = None;
        let moment = self.sim.now();
        let choices = moment.choices();
        let picks = if everything_written_back {
            newest(&choices)
        } else {
            self.random.picks(&choices)
        };
        self.sim = moment.power_cut(&choices, &picks);
        self.sim.record();
        self.boot += 1;
        self.unflushed.clear();
        let image = setting::open(&self.sim, IMAGE, self.boot)?;
        let found = setting::read_tracked(|at, buf| image.read(at, buf))?;
        self.model.disk.check_after_cut(&found)?;
        // What was found must be found again, whatever interrupts this opening.
        self.model = self.model.with_disk(found);
        self.image = Some(image);
        Ok(true)
    }

    /// Whether the active layer holds nothing, so that what it shows needs no snapshot.
    fn is_untouched(&self) -> Result<bool, String> {
        self.image().active().is_empty().map_err(text)
    }
}

/// The base that a rebase goes to.
pub fn other_base() -> Base {
    Base::Image {
        path: OTHER.into(),
        snapshot: None,
        reference: false,
    }
}

/// Stores a word into the data file as a guest's mapping of it does.
pub fn store_word(image: &Image, domain: Domain, place: Place, value: u64) -> Result<(), String> {
    let file = image.active().data_file();
    let site = Site("guest.store");
    match domain {
        Domain::Dax => file.store_word(site, offset_of(place), value),
        Domain::PageCache => file.write_at(site, &value.to_le_bytes(), offset_of(place)),
    }
    .map_err(|e| e.to_string())
}

/// Writes stored words back and fences, as a guest does that wants them durable on DAX.
pub fn write_back(image: &Image, places: &[Place]) -> Result<(), String> {
    let file = image.active().data_file();
    for place in places {
        let done = file.write_back(Site("guest.write_back"), offset_of(*place));
        done.map_err(|e| e.to_string())?;
    }
    file.fence(Site("guest.fence"));
    Ok(())
}

fn offset_of((index, at): Place) -> u64 {
    TRACKED[index] * CLUSTER_BYTES + u64::try_from(at).expect("an offset in a cluster")
}
