// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Storage of the active layer that is given back, and content that comes from elsewhere than a guest. A cluster that stops
//! being data does so durably before its storage goes (I3).

use std::ops::Range;

use super::Active;
use crate::error::{IoContext, Result};
use crate::map::{self, State, WORDS_OFFSET};
use crate::medium::{Domain, File, Site};
use crate::units::{self, ClusterRange};

/// Clusters whose states are looked at in one step.
const STEP_CLUSTERS: u64 = 32 << 10;

impl Active {
    /// Gives back storage that was prepared and not used. The caller sees to it that nothing is allocated meanwhile.
    ///
    /// # Errors
    /// `Io`; only space is lost then.
    pub fn give_back_prepared(&self) -> Result<()> {
        let spare = self.ready().spare();
        for run in spare {
            self.ready().set(run, false);
            // I3: absent clusters are shown by nobody, so no order is needed.
            self.data
                .punch(Site("active.give_back.punch"), self.cluster.byte_range(run))
                .context(|| format!("cannot give back space of layer {}", self.name))?;
        }
        Ok(())
    }

    /// Makes `runs`, all of them data that the disk shows without them too, absent, and gives their storage back.
    ///
    /// # Errors
    /// `FlushFailed`: the words are as they were, or absent in part. `Io`: they are absent, and storage is lost. What the
    /// disk shows is the same in every case.
    pub fn give_back(&self, runs: &[ClusterRange]) -> Result<()> {
        let absent: Vec<_> = runs.iter().map(|run| (*run, State::Absent)).collect();
        self.discard(&absent)
    }

    /// Gives `runs` these states, none of which is data, and their storage back.
    ///
    /// # Errors
    /// `FlushFailed`: the words are as they were, or changed in part. `Io`: they are changed, and storage is lost.
    pub(crate) fn discard(&self, runs: &[(ClusterRange, State)]) -> Result<()> {
        if runs.is_empty() {
            return Ok(());
        }
        self.unless_failed(|| {
            for (run, state) in runs {
                // First: what is ready and absent counts as prepared, and may be punched at any time.
                self.ready().set(*run, false);
                self.set_words(*run, *state)?;
            }
            if self.domain == Domain::PageCache {
                // I3: the words are durable before the bytes that they spoke of go. On DAX they are since their fence.
                self.map
                    .sync_data(Site("active.give_back_clean.sync"))
                    .inspect_err(|_| self.distrust())
                    .context(|| "cannot sync the map file".to_owned())?;
            }
            Ok(())
        })?;
        for (run, _) in runs {
            let range = self.cluster.byte_range(*run);
            self.data
                .punch(Site("active.give_back_clean.punch"), range)
                .context(|| format!("cannot give back space of layer {}", self.name))?;
        }
        Ok(())
    }

    /// Gives back the storage of all clusters that are not data, and durably so (I3). The caller sees to it that nothing is
    /// allocated meanwhile.
    ///
    /// # Errors
    /// `Io`; only space is lost then.
    pub(crate) fn give_back_unused(&self) -> Result<()> {
        let context = || format!("cannot give back space of layer {}", self.name);
        let mut at = 0;
        while let Some(data) = self.data.next_data(at).context(context)? {
            let covering = self.cluster.covering(&data);
            let mut start = covering.start;
            while start < covering.end {
                let step = ClusterRange::new(start, covering.end.min(start + STEP_CLUSTERS));
                let states = self.states(step)?;
                for group in states.chunk_by(|a, b| a.is_data() == b.is_data()) {
                    let piece = ClusterRange::new(start, start + units::bytes(group.len()));
                    start = piece.end;
                    if !group[0].is_data() {
                        self.ready().set(piece, false);
                        let range = self.cluster.byte_range(piece);
                        self.data
                            .punch(Site("active.give_back_unused.punch"), range)
                            .context(context)?;
                    }
                }
            }
            at = data.end;
        }
        Ok(())
    }

    /// Whether the filesystem is nearly full. One that does not tell is not.
    pub fn is_low_on_space(&self) -> bool {
        self.data.is_low_on_space().unwrap_or(false)
    }

    /// Gives all words storage, so that no later change of one can meet a full filesystem.
    ///
    /// # Errors
    /// `NoSpace` or `Io`.
    pub fn reserve_map(&self) -> Result<()> {
        let clusters = self.cluster.clusters_in(self.size.bytes());
        let end = map::word_offset(clusters.div_ceil(map::CLUSTERS_PER_WORD));
        self.map
            .reserve(Site("active.map.reserve"), WORDS_OFFSET..end)
            .context(|| format!("cannot reserve space for the map of layer {}", self.name))
    }

    /// Writes over bytes of clusters that are data; durable after a flush.
    ///
    /// # Errors
    /// `NoSpace` or `Io`; the bytes are old or new then.
    pub(crate) fn overwrite(&self, offset: u64, content: &[u8]) -> Result<()> {
        self.data
            .write_at(Site("active.overwrite"), content, offset)
            .context(|| format!("cannot write the data of layer {}", self.name))
    }

    /// Makes `run`, absent here and reading zero, data that holds `range` of `source`, and zeros around it. Only for an image
    /// that has no name before it is flushed: on DAX the words are durable before their bytes (I1).
    ///
    /// # Errors
    /// `NoSpace` or `Io`; the words are unchanged then.
    pub(crate) fn import(
        &self,
        run: ClusterRange,
        source: &dyn File,
        range: Range<u64>,
    ) -> Result<()> {
        let context = || format!("cannot copy into layer {}", self.name);
        let own = self.cluster.byte_range(run);
        // Not ready: what came by sharing has no storage of its own yet.
        self.ready().set(run, false);
        self.data.leave_room(&range).context(context)?;
        if !self.is_hole(&own).context(context)? {
            // I3: bytes that mean nothing must not appear around the new ones.
            self.data
                .punch(Site("active.import.punch"), own)
                .context(context)?;
        }
        self.data
            .copy_from(Site("active.import.copy"), source, range)
            .context(context)?;
        self.mark_data(run)
    }
}
