// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a first store costs: fences, write-backs of map lines, and calls that wait for the filesystem's journal.
#![allow(missing_docs, clippy::unwrap_used)]

use pcow_crash::model::{Role, SMALL};
use pcow_crash::setting::{self, IMAGE, Scene, Setting};
use pcow_format::{Cluster, ClusterRange, Image};

/// What the calls of one operation cost.
#[derive(Debug, Default, PartialEq, Eq)]
struct Cost {
    fences: usize,
    write_backs: usize,
    /// Syncs, and writes that are durable when they return.
    commits: usize,
    /// Reservations, punches and zeroing: they change the file's extents.
    extents: usize,
}

/// The cost of a store to the first cluster of `role`, after `before`.
fn cost(scene: &str, role: Role, before: impl FnOnce(&Image, ClusterRange)) -> Cost {
    let cluster = Cluster(SMALL.cluster(SMALL.first(role)));
    cost_of(scene, cluster.only(), before)
}

/// The cost of making `run` data at once, after `before`.
fn cost_of(scene: &str, run: ClusterRange, before: impl FnOnce(&Image, ClusterRange)) -> Cost {
    let setting = Setting::new(Scene::named(scene).unwrap(), None);
    let sim = setting.start.process_death();
    let image = setting::open(&sim, IMAGE, setting.boot).unwrap();
    before(&image, run);
    sim.record();
    image.make_writable(run, &mut Vec::new()).unwrap();
    let moments = sim.moments();
    let mut sites: Vec<_> = moments.iter().map(|m| m.act().site.0).collect();
    // A durable write is two acts of the simulation. Nothing else is: two fences in a row are two.
    sites.dedup_by(|a, b| {
        a == b
            && ["durable", "prepare.zeros"]
                .iter()
                .any(|part| a.contains(part))
    });
    let count = |is: fn(&&&str) -> bool| sites.iter().filter(is).count();
    Cost {
        fences: count(|s| s.ends_with("fence")),
        write_backs: count(|s| s.ends_with("write_back")),
        commits: count(|s| {
            ["sync", "durable", "prepare.zeros"]
                .iter()
                .any(|part| s.contains(part))
        }),
        extents: count(|s| {
            ["reserve", ".zero", "punch"]
                .iter()
                .any(|end| s.ends_with(end))
        }),
    }
}

fn prepare(image: &Image, run: ClusterRange) {
    image.active().prepare(run).unwrap();
}

fn nothing(_: &Image, _: ClusterRange) {}

#[test]
fn a_store_to_prepared_storage_costs_one_line_and_one_fence_on_dax() {
    let found = cost("dax", Role::Absent, prepare);
    let expected = Cost {
        fences: 1,
        write_backs: 1,
        ..Cost::default()
    };
    assert_eq!(found, expected);
}

/// Seven words in two lines, as an allocation unit of many small clusters has. Each word was written back by itself.
#[test]
fn a_unit_of_many_clusters_costs_one_write_back_for_each_line_and_one_fence_on_dax() {
    let found = cost_of("dax", ClusterRange::new(64, 288), prepare);
    let expected = Cost {
        fences: 1,
        write_backs: 2,
        ..Cost::default()
    };
    assert_eq!(found, expected);
}

#[test]
fn an_allocation_on_dax_waits_for_the_journal_once() {
    let found = cost("dax", Role::Absent, nothing);
    let expected = Cost {
        fences: 1,
        write_backs: 1,
        commits: 1,
        extents: 1,
    };
    assert_eq!(found, expected);
}

#[test]
fn a_copy_on_dax_costs_no_more_lines_and_fences_than_an_allocation() {
    let found = cost("dax", Role::Base, nothing);
    let expected = Cost {
        fences: 1,
        write_backs: 1,
        commits: 1,
        extents: 1,
    };
    assert_eq!(found, expected);
}

#[test]
fn nothing_is_synced_on_the_way_of_a_store_in_the_page_cache() {
    for (role, extents) in [(Role::Absent, 1), (Role::Base, 0), (Role::Leftover, 1)] {
        let found = cost("page-cache", role, nothing);
        let expected = Cost {
            extents,
            ..Cost::default()
        };
        assert_eq!(found, expected, "{role:?}");
    }
    assert_eq!(cost("page-cache", Role::Absent, prepare), Cost::default());
}

#[test]
fn a_zero_over_the_base_is_left_with_one_sync_in_the_page_cache() {
    let found = cost("page-cache", Role::Zero, nothing);
    assert_eq!((found.commits, found.fences), (1, 0));
}

#[test]
fn a_store_to_a_cluster_that_is_data_costs_nothing() {
    for scene in ["dax", "page-cache"] {
        let written = |image: &Image, run: ClusterRange| {
            image.make_writable(run, &mut Vec::new()).unwrap();
        };
        assert_eq!(cost(scene, Role::Base, written), Cost::default(), "{scene}");
    }
}
