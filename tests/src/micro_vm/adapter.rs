// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! In place of a part of the frontend that is not there yet.

use std::sync::{Arc, OnceLock};

use pcow_protocol::frontend::{Frontend, FrontendOptions, MappingCounts};

/// No bounce ever happens.
#[derive(Debug, Default)]
pub struct Bounces;

impl Bounces {
    /// As it will be.
    pub fn sequence(&self) -> u64 {
        0
    }

    /// As it will be.
    pub fn happened_since(&self, _sequence: u64) -> bool {
        false
    }
}

/// As it will be.
pub trait HasBounces {
    /// As it will be.
    fn bounces(&self) -> &Arc<Bounces>;
}

impl HasBounces for Frontend {
    fn bounces(&self) -> &Arc<Bounces> {
        static NONE: OnceLock<Arc<Bounces>> = OnceLock::new();
        NONE.get_or_init(Arc::default)
    }
}

/// As it will be.
pub fn options(_bounce: bool) -> FrontendOptions {
    FrontendOptions::default()
}

/// Bounces, and those refused.
pub fn bounce_counts(_counts: MappingCounts) -> (u64, u64) {
    (0, 0)
}
