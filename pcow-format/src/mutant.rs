// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults that can be put into the format on purpose, so that tests can show that they would be found. Only with the
//! feature `sim`; without it none of this is compiled in. What a medium can do by itself (leave a call out, perform two
//! in another order) is not here.

/// One such fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// A flush settles the words as they are after its sync, not as they were before.
    LateWords,
    /// Opening removes layers that the root does not name, whatever they hold.
    OrphanRemoved,
    /// A flush after one that has failed is tried again.
    FlushErrorForgotten,
    /// A snapshot does not flush the layer that it seals; only its preparation does.
    SealUnflushed,
    /// A writer does not take the *serving* byte of the lock.
    ServingLockDropped,
}

#[cfg(feature = "sim")]
mod present {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static PRESENT: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Makes the format have this fault, for calls of this thread.
    pub fn set(mutant: Option<Mutant>) {
        PRESENT.set(mutant);
    }

    pub(crate) fn is(mutant: Mutant) -> bool {
        PRESENT.get() == Some(mutant)
    }
}

#[cfg(not(feature = "sim"))]
mod present {
    use super::Mutant;

    pub(crate) const fn is(_: Mutant) -> bool {
        false
    }
}

pub(crate) use present::is;
#[cfg(feature = "sim")]
pub use present::set;
