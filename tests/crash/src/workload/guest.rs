// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest and its backend do to an image: stores, flushes, storage ahead, clusters given back.

use pcow_format::medium::sim::When;
use pcow_format::medium::{Domain, Site};
use pcow_format::{Cluster, ErrorKind, Image, Source};

use super::Run;
use crate::model::{CLUSTER_BYTES, Place, Plan, Role};
use crate::setting::text;

const EIO: i32 = 5;

impl Run<'_> {
    /// Makes a cluster writable and stores to both of its pages, as a guest does.
    pub(super) fn store(&mut self, role: Role) -> Result<bool, String> {
        let index = self.setting.plan().first(role);
        self.make_writable(index)?;
        for page in 0..2 {
            // Each store has a place of its own among the first ones, then they meet again.
            let turn = usize::try_from((self.stores + 1) % 3).unwrap_or(0);
            self.store_word((index, page * 4096 + turn * 64))?;
        }
        Ok(true)
    }

    /// Stores to any cluster, to some of the words of a few lines.
    pub(super) fn store_anywhere(&mut self) -> Result<bool, String> {
        let plan = self.setting.plan();
        let index = self.random.below(plan.clusters.len());
        if plan.clusters[index].1 == Role::Quiet {
            return Ok(false);
        }
        self.make_writable(index)?;
        for _ in 0..=self.random.below(3) {
            let (page, line) = (self.random.below(2), self.random.below(3));
            let word = self.random.below(2);
            self.store_word((index, page * 4096 + line * 64 + word * 8))?;
        }
        Ok(true)
    }

    fn make_writable(&mut self, index: usize) -> Result<(), String> {
        let cluster = Cluster(self.setting.plan().cluster(index));
        self.unseen(|image| image.make_writable(cluster.only(), &mut Vec::new()))
    }

    fn next_value(&mut self) -> u64 {
        self.stores += 1;
        0x5700_0000 + self.stores
    }

    fn store_word(&mut self, place: Place) -> Result<(), String> {
        let value = self.next_value();
        let mut after = self.model().clone();
        after.disk.store(place, value);
        let (domain, plan) = (self.setting.domain(), self.setting.plan());
        self.transition(&[after], |run| {
            store_word(plan, run.image(), domain, place, value)
        })?;
        self.slot_mut().unflushed.push(place);
        Ok(())
    }

    /// Write-back and fence of everything stored, where that means something.
    pub(super) fn guest_flush(&mut self) -> Result<bool, String> {
        if self.setting.domain() == Domain::PageCache {
            return Ok(false);
        }
        let places = std::mem::take(&mut self.slot_mut().unflushed);
        let mut after = self.model().clone();
        places.iter().for_each(|p| after.disk.promise(*p));
        let plan = self.setting.plan();
        self.transition(&[after], |run| write_back(plan, run.image(), &places))?;
        Ok(true)
    }

    pub(super) fn flush(&mut self) -> Result<bool, String> {
        let mut after = self.model().clone();
        after.disk.promise_all();
        self.transition(&[after], |run| run.image().flush().map_err(text))?;
        self.slot_mut().unflushed.clear();
        Ok(true)
    }

    /// A flush, and a store by another thread beside its sync of the data: that store is promised nothing.
    pub(super) fn flush_with_store(&mut self, when: When) -> Result<bool, String> {
        let (plan, domain) = (self.setting.plan(), self.setting.domain());
        let index = plan.first(Role::Late);
        let places = [(index, 128), (index, 4096 + 128)];
        let stores = places.map(|place| (place, self.next_value()));
        let before = self.model().clone();
        let (mut steps, mut after) = (vec![before.clone()], before);
        after.disk.promise_all();
        for (place, value) in stores {
            let mut step = steps.last().cloned().unwrap_or_else(|| after.clone());
            step.disk.store(place, value);
            steps.push(step);
            after.disk.store(place, value);
        }
        steps.push(after);
        let image = self.image().clone();
        let other = move || {
            let run = Cluster(plan.cluster(index)).only();
            let made = image.make_writable(run, &mut Vec::new());
            made.expect("a sound medium has space");
            for (place, value) in stores {
                store_word(plan, &image, domain, place, value).expect("a sound medium stores");
            }
        };
        self.sim.beside(Site("active.flush.data"), when, other);
        self.transition(&steps, |run| run.image().flush().map_err(text))?;
        if self.sim.forget_plans() > 0 {
            return Err("a flush without a sync of the data".to_owned());
        }
        self.slot_mut().unflushed = places.to_vec();
        Ok(true)
    }

    /// A flush whose sync fails at `site`. The next one must fail, too (I7). Nothing can follow.
    pub(super) fn failing_flush(&mut self, site: &'static str) -> Result<bool, String> {
        if site == "active.flush.map" && self.setting.domain() == Domain::Dax {
            return Ok(false);
        }
        let after = self.model().with_failed_flush();
        self.slot_mut().model = self.model().with_failed_sync();
        self.sim.fail(Site(site), EIO);
        self.transition(&[after], |run| {
            for attempt in ["a flush whose sync fails", "a flush after one that failed"] {
                match run.image().flush() {
                    Ok(()) => return Err(format!("{attempt} succeeds")),
                    Err(e) if e.kind() == ErrorKind::FlushFailed => {}
                    Err(e) => return Err(format!("{attempt}: {}", text(e))),
                }
            }
            Ok(())
        })?;
        self.ended = true;
        Ok(true)
    }

    /// Storage ahead of stores: for what no layer has, and for all words.
    pub(super) fn prepare(&mut self) -> Result<bool, String> {
        self.unseen(|image| image.active().reserve_map())?;
        let plan = self.setting.plan();
        for cluster in plan.with(Role::Absent).chain(plan.with(Role::Leftover)) {
            let cluster = Cluster(cluster);
            if self.image().source(cluster).map_err(text)? == Source::Nobody {
                self.unseen(|image| image.active().prepare(cluster.only()))?;
            }
        }
        Ok(self.sim.recorded() > 0)
    }

    /// Prepared storage that was not used is given back.
    pub(super) fn give_back(&mut self) -> Result<bool, String> {
        self.unseen(|image| image.active().give_back_prepared())?;
        Ok(self.sim.recorded() > 0)
    }

    /// Clusters are made writable for what turns out to be a load.
    pub(super) fn touch(&mut self) -> Result<bool, String> {
        for role in [Role::Base, Role::Absent] {
            self.make_writable(self.setting.plan().first(role))?;
        }
        Ok(self.sim.recorded() > 0)
    }

    /// Clusters that hold what they cover become absent again.
    pub(super) fn give_back_clean(&mut self) -> Result<bool, String> {
        let mut given_back = 0;
        for (cluster, _) in self.setting.plan().clusters {
            let run = Cluster(*cluster).only();
            given_back += self.unseen(|image| image.give_back_clean(run))?;
        }
        Ok(given_back > 0)
    }
}

/// Stores a word into the data file as a guest's mapping of it does.
pub fn store_word(
    plan: &Plan,
    image: &Image,
    domain: Domain,
    place: Place,
    value: u64,
) -> Result<(), String> {
    let file = image.active().data_file();
    let (site, offset) = (Site("guest.store"), offset_of(plan, place));
    match domain {
        Domain::Dax => file.store_word(site, offset, value),
        Domain::PageCache => file.write_at(site, &value.to_le_bytes(), offset),
    }
    .map_err(|e| e.to_string())
}

/// Writes stored words back and fences, as a guest does that wants them durable on DAX.
pub fn write_back(plan: &Plan, image: &Image, places: &[Place]) -> Result<(), String> {
    let file = image.active().data_file();
    for place in places {
        let done = file.write_back(Site("guest.write_back"), offset_of(plan, *place));
        done.map_err(|e| e.to_string())?;
    }
    file.fence(Site("guest.fence"));
    Ok(())
}

fn offset_of(plan: &Plan, (index, at): Place) -> u64 {
    plan.cluster(index) * CLUSTER_BYTES + u64::try_from(at).expect("an offset in a cluster")
}
