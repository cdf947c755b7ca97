// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flush: what was stored so far becomes durable, data before the words that speak of it (I1). The first that fails is the last
//! that was tried (I7).

use std::sync::PoisonError;

use super::Active;
use crate::error::{Error, ErrorKind, IoContext, Result, chain_text};
use crate::map::{TAG_OFFSET, Tag, Word};
use crate::medium::{Domain, File, Site};
use crate::mutant::{self, Mutant};

impl Active {
    /// Makes everything stored so far durable. Once it has failed it fails for ever (I7).
    ///
    /// # Errors
    /// `FlushFailed`.
    pub fn flush(&self) -> Result<()> {
        self.unless_failed(|| self.flush_once())
    }

    /// M14: pages that a failed sync did not write count as written. They can be dropped at any time, and then show what the
    /// medium holds: nothing yet, under a live cluster that was copied from below. Until then they show what no later sync
    /// writes. So the next opening must neither take live clusters for data, although the boot is the same, nor rest a promise
    /// on what it sees: the tag names no boot from now on (see [`Active::settle_tag`]).
    pub(super) fn distrust(&self) {
        Self::distrust_map(self.map.as_ref(), &self.name);
    }

    /// As [`Active::distrust`], of the layer `name`, which is not open for writing.
    pub(crate) fn distrust_map(map: &dyn File, name: &str) {
        let distrusted = map.status().and_then(|status| {
            let tag = Tag::of_failed_flush(status.identity);
            let site = Site("active.flush.distrust");
            map.write_at(site, &tag.encode(), TAG_OFFSET)
        });
        if let Err(e) = distrusted {
            log::error!(
                "layer {name}: what was not flushed cannot be given up ({e}): run 'pcow-img check --discard-live' before the image is used again"
            );
        }
    }

    /// Does what needs a sync, unless one has failed before; what fails now is remembered (I7).
    pub(super) fn unless_failed(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut failed = self
            .flush_failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(earlier) = &*failed {
            let what = format!("an earlier flush of layer {} failed: {earlier}", self.name);
            return Err(Error::new(ErrorKind::FlushFailed, what));
        }
        work().map_err(|e| {
            if !mutant::is(Mutant::FlushErrorForgotten) {
                *failed = Some(e.to_string());
            }
            let what = format!("cannot flush layer {}", self.name);
            Error::new(ErrorKind::FlushFailed, what).caused_by(e)
        })
    }

    /// From now on no flush succeeds (I7); returns the error that says so.
    pub(crate) fn fail_flushes(&self, cause: &Error) -> Error {
        let refused = self.unless_failed(|| Err(Error::new(ErrorKind::Io, chain_text(cause))));
        refused.expect_err("what fails is remembered")
    }

    /// Only words noted *before* the data was synced may become durable: a word that turns live during the
    /// sync speaks of bytes that the sync may not have seen (I1).
    fn flush_once(&self) -> Result<()> {
        let noted = self.note_live()?;
        self.data
            .sync_data(Site("active.flush.data"))
            .inspect_err(|_| self.distrust())
            .context(|| "cannot sync the data file".to_owned())?;
        if self.domain == Domain::Dax && noted.is_empty() {
            return Ok(());
        }
        self.settle_live(&noted)?;
        self.map
            .sync_data(Site("active.flush.map"))
            .inspect_err(|_| self.distrust())
            .context(|| "cannot sync the map file".to_owned())
    }

    pub(super) fn note_live(&self) -> Result<Vec<(u64, Word)>> {
        let numbers = std::mem::take(&mut *self.live());
        // A cluster that turns live after the take is in the new set again, whether or not it is noted here.
        let note = |number: &u64| Ok((*number, self.read_word(*number)?));
        numbers
            .iter()
            .map(note)
            .collect::<Result<_>>()
            .inspect_err(|_| {
                // Nothing was settled: they are still live.
                self.live().extend(&numbers);
            })
    }

    pub(super) fn settle_live(&self, noted: &[(u64, Word)]) -> Result<()> {
        for (number, noted) in noted {
            let guard = self.live();
            let now = self.read_word(*number)?;
            let late = mutant::is(Mutant::LateWords);
            let settled = now.settle(if late { now } else { *noted });
            self.store_word(Site("active.flush.word"), *number, settled)?;
            self.write_word_back(*number)?;
            drop(guard);
        }
        Ok(())
    }
}
