// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! dump
use crate::search::workloads;
use crate::setting::{SCENES, Setting};
use crate::workload::Run;
use pcow_format::medium::{Domain, Site};
use std::collections::BTreeMap;
/// dump
pub fn dump() {
    for scene in SCENES.iter().filter(|s| !s.is_wide()) {
        let setting = Setting::new(scene, None);
        let mut t: BTreeMap<(&'static str, Site), u64> = BTreeMap::new();
        for len in 0..=2 {
            for w in workloads(len) {
                let mut run = Run::new(&setting, 1).unwrap();
                if w.iter().all(|o| run.perform(o).unwrap()) {
                    for p in run.points() {
                        *t.entry((w.last().map_or("open", |o| o.name), p.moment.act().site))
                            .or_default() += 1;
                        if len == 2 {
                            continue;
                        }
                        *t.entry((w.last().map_or("open", |o| o.name), p.moment.act().site))
                            .or_default() += 1000000;
                    }
                }
            }
        }
        for ((o, s), c) in t {
            println!(
                "{}|{:?}|{o}|{}|{}|{c}",
                scene.name,
                scene.used_in,
                s.0,
                c >= 1000000
            );
        }
        let _ = Domain::Dax;
    }
}
