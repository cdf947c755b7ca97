// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a backend says at a session's end.

use pcow_protocol::frontend::MappingCounts;
use pcow_tests::backend::{Backend, SessionCounts};

/// What happened in a session.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// Faults and what was asked of the frontend.
    pub session: SessionCounts,
    /// What was done about faults of unknown direction.
    pub unknown: Unknown,
}

/// What was done about faults that may be loads or stores.
#[derive(Debug, Clone, Copy)]
pub struct Unknown {
    /// Answered with a read copy and a bounce.
    pub bounced: u64,
    /// Came again after a bounce.
    pub taken_for_stores: u64,
    /// Served as stores at once.
    pub copied_on_touch: u64,
    /// Clusters that became data for what may have been a load.
    pub maybe_clean: u64,
    /// Of those, the ones that held what they cover.
    pub given_back: u64,
}

impl Counts {
    /// The last session of `backend`, which has ended.
    pub fn of(backend: &Backend) -> Self {
        let log = backend.log();
        let start = log.iter().rposition(|line| line.contains("session over: "));
        let lines = &log[start.unwrap()..];
        for line in lines {
            println!(
                "  {}",
                line.split_once("] ").map_or(&**line, |(_, text)| text)
            );
        }
        let unknown = lines.iter().find(|l| l.contains("unknown direction: "));
        let counts = Self {
            session: backend.session_counts(),
            unknown: Unknown::parse(unknown.unwrap()),
        };
        counts.expect_to_add_up();
        counts
    }

    fn expect_to_add_up(&self) {
        let Self { session, unknown } = *self;
        let directions = session.loads + session.stores + session.unknown;
        assert_eq!(directions, session.faults, "{self:?}");
        // Of several faults in one place one is answered for all.
        let answered = unknown.bounced + unknown.taken_for_stores + unknown.copied_on_touch;
        assert!(answered <= session.unknown, "{self:?}");
        assert!(unknown.given_back <= unknown.maybe_clean, "{self:?}");
    }

    /// Compares with what the frontend had counted shortly before it left.
    pub fn expect_at_least(&self, frontend: MappingCounts) {
        let Self { session, unknown } = *self;
        let asked = [
            (session.maps, frontend.maps),
            (session.unmaps, frontend.unmaps),
            (session.evictions, frontend.evicts),
            (unknown.bounced, frontend.bounces + frontend.refused_bounces),
        ];
        for (of_backend, of_frontend) in asked {
            assert!(of_backend >= of_frontend, "{self:?} {frontend:?}");
        }
    }
}

impl Unknown {
    fn parse(line: &str) -> Self {
        let number = |label: &str| -> u64 {
            let (before, _) = line.split_once(label).unwrap();
            before.rsplit(' ').next().unwrap().parse().unwrap()
        };
        Self {
            bounced: number(" bounced"),
            taken_for_stores: number(" taken for stores"),
            copied_on_touch: number(" copied on touch"),
            maybe_clean: number(" clusters maybe clean"),
            given_back: number(" given back"),
        }
    }
}
