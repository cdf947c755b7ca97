// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a backend says at a session's end.

use pcow_protocol::frontend::MappingCounts;
use pcow_tests::backend::Backend;

/// The numbers of the two lines of the log.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// All fault events, and how they looked.
    pub faults: u64,
    pub reads: u64,
    pub stores: u64,
    pub unknown: u64,
    /// What was asked of the frontend.
    pub maps: u64,
    pub unmaps: u64,
    pub evictions: u64,
    /// What was done about faults of unknown direction.
    pub bounced: u64,
    pub taken_for_stores: u64,
    pub copied_on_touch: u64,
    /// Clusters that may hold no more than what they cover, and those that gave their storage back.
    pub maybe_clean: u64,
    pub given_back: u64,
}

impl Counts {
    /// The last session of `backend`, which is over.
    pub fn of(backend: &Backend) -> Self {
        let line = |head: &str| {
            let log = backend.log();
            let line = log.iter().rfind(|line| line.contains(head)).unwrap();
            println!("  {}", &line[line.find(head).unwrap()..]);
            line.clone()
        };
        let session = line("session over: ");
        let unknown = line("unknown direction: ");
        Self {
            faults: number(&session, "faults"),
            reads: number(&session, "reads"),
            stores: number(&session, "stores"),
            unknown: number(&session, "of unknown direction"),
            maps: number(&session, "maps"),
            unmaps: number(&session, "unmaps"),
            evictions: number(&session, "evictions"),
            bounced: number(&unknown, "bounced"),
            taken_for_stores: number(&unknown, "taken for stores"),
            copied_on_touch: number(&unknown, "copied on touch"),
            maybe_clean: number(&unknown, "clusters maybe clean"),
            given_back: number(&unknown, "given back"),
        }
    }

    /// Every number agrees with the others, and with what the frontend has counted.
    pub fn expect_to_add_up(&self, frontend: MappingCounts) {
        let bounces = frontend.bounces + frontend.refused_bounces;
        assert_eq!(self.reads + self.stores + self.unknown, self.faults);
        let answered = self.bounced + self.taken_for_stores + self.copied_on_touch;
        assert!(answered <= self.unknown, "{self:?}");
        assert!(self.given_back <= self.maybe_clean, "{self:?}");
        assert_eq!(self.bounced, bounces, "{self:?} {frontend:?}");
        // The backend may have asked for more since the frontend was asked.
        assert!(self.maps >= frontend.maps, "{self:?} {frontend:?}");
        assert!(self.unmaps >= frontend.unmaps, "{self:?} {frontend:?}");
        assert!(self.evictions >= frontend.evicts, "{self:?} {frontend:?}");
    }
}

/// The number in front of `label`.
fn number(line: &str, label: &str) -> u64 {
    let (before, _) = line.split_once(&format!(" {label}")).unwrap();
    let start = before.rfind(|c: char| !c.is_ascii_digit());
    before[start.map_or(0, |at| at + 1)..].parse().unwrap()
}
