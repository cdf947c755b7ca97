// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes of what the disk shows by a program that has the image to itself, instead of by a guest: writing, zeroing,
//! taking in a file. What is written is durable after a flush; a crash before leaves each cluster old or new, except that
//! bytes written over data of the active layer may be there in part.

use std::ops::Range;

use crate::error::{IoContext, Result};
use crate::image::{Image, Source};
use crate::map::State;
use crate::medium::{File, read_exact_at};
use crate::units::{self, ClusterRange, ClusterSize};
use crate::view::check_range;

/// Bytes worked on at a time.
const STEP_BYTES: u64 = 1 << 20;
/// Clusters whose words are changed before the map is synced once for all of them.
const DISCARD_CLUSTERS: u64 = 32 << 10;

impl Image {
    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// `InvalidArgument` past the end of the disk, before anything is written; `NoSpace` or `Io`.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(self.virtual_size().bytes(), offset, units::bytes(buf.len()))?;
        let range = offset..offset + units::bytes(buf.len());
        for (piece, source) in self.groups(&range)? {
            let own = self.cluster_size().byte_range(piece);
            let part = own.start.max(range.start)..own.end.min(range.end);
            let new = &buf[units::len(part.start - offset)..units::len(part.end - offset)];
            match source {
                Source::Active => {
                    self.active.ensure_storage(piece)?;
                    self.active.overwrite(part.start, new)?;
                }
                Source::Zero => {
                    // A word that is lost would uncover the parent's bytes: it becomes data durably, then is written to.
                    self.allocate_over_zero(piece)?;
                    self.active.overwrite(part.start, new)?;
                }
                Source::Nobody | Source::Sealed => self.write_anew(piece, &part, new)?,
            }
        }
        Ok(())
    }

    /// Makes clusters data that are absent: what `part` does not cover of them is copied up.
    fn write_anew(&self, run: ClusterRange, part: &Range<u64>, new: &[u8]) -> Result<()> {
        let own = self.cluster_size().byte_range(run);
        if own == *part {
            return self.active.fill(run, new);
        }
        let mut content = vec![0; units::len(own.end - own.start)];
        self.below.read(own.start, &mut content)?;
        let place = units::len(part.start - own.start)..units::len(part.end - own.start);
        content[place].copy_from_slice(new);
        self.active.fill(run, &content)
    }

    /// Makes `range` read zero, and gives the storage of whole clusters back.
    ///
    /// # Errors
    /// As [`Image::write`], and `FlushFailed`.
    pub fn write_zeros(&self, range: Range<u64>) -> Result<()> {
        let length = range.end.saturating_sub(range.start);
        check_range(self.virtual_size().bytes(), range.start, length)?;
        let cluster = self.cluster_size();
        let mut discarded = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let step = at..end_of_step(cluster, at, range.end);
            for (piece, source) in self.groups(&step)? {
                let own = cluster.byte_range(piece);
                let part = own.start.max(range.start)..own.end.min(range.end);
                match source {
                    Source::Nobody | Source::Zero => {}
                    Source::Sealed if own == part => self.active.mark_zero(piece)?,
                    Source::Active if own == part => discarded.push(piece),
                    Source::Sealed | Source::Active => {
                        let zeros = vec![0; units::len(part.end - part.start)];
                        self.write(part.start, &zeros)?;
                    }
                }
            }
            at = step.end;
        }
        self.discard(&discarded)
    }

    /// Takes the bytes that are data of the active layer out of it: what is below them is hidden, if there is anything.
    fn discard(&self, runs: &[ClusterRange]) -> Result<()> {
        let mut states: Vec<(ClusterRange, State)> = Vec::new();
        let mut count = 0;
        for run in runs {
            for cluster in run.iter() {
                let bytes = self.cluster_size().byte_range(cluster.only());
                let state = if self.below.is_nobodys(bytes)? {
                    State::Absent
                } else {
                    State::Zero
                };
                match states.last_mut() {
                    Some((last, s)) if *s == state && last.end == cluster.0 => last.end += 1,
                    _ => states.push((cluster.only(), state)),
                }
                count += 1;
                if count == DISCARD_CLUSTERS {
                    self.discard_now(&states)?;
                    (states, count) = (Vec::new(), 0);
                }
            }
        }
        self.discard_now(&states)
    }

    pub(crate) fn discard_now(&self, runs: &[(ClusterRange, State)]) -> Result<()> {
        self.active
            .discard(runs)
            .inspect_err(|e| self.mark_failed_flush(e))
    }

    /// Takes `range` of `source` in at the same offsets, by sharing or copying within the filesystem where it can.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn import(&self, source: &dyn File, range: Range<u64>) -> Result<()> {
        check_range(
            self.virtual_size().bytes(),
            range.start,
            range.end.saturating_sub(range.start),
        )?;
        let cluster = self.cluster_size();
        for (piece, owner) in self.groups(&range)? {
            let own = cluster.byte_range(piece);
            let part = own.start.max(range.start)..own.end.min(range.end);
            if owner == Source::Nobody {
                self.active.import(piece, source, part)?;
                continue;
            }
            self.import_over(source, part)?;
        }
        Ok(())
    }

    fn import_over(&self, source: &dyn File, range: Range<u64>) -> Result<()> {
        let mut buf = vec![0; units::len(STEP_BYTES.min(range.end - range.start))];
        let mut at = range.start;
        while at < range.end {
            let piece = &mut buf[..units::len(STEP_BYTES.min(range.end - at))];
            read_exact_at(source, piece, at).context(|| "cannot read the source".to_owned())?;
            self.write(at, piece)?;
            at += units::bytes(piece.len());
        }
        Ok(())
    }

    /// The clusters that `range` touches, in runs of one source.
    fn groups(&self, range: &Range<u64>) -> Result<Vec<(ClusterRange, Source)>> {
        if range.start >= range.end {
            return Ok(Vec::new());
        }
        let run = self.cluster_size().covering(range);
        let sources = self.sources(run)?;
        let mut start = run.start;
        let group = |group: &[Source]| {
            let piece = ClusterRange::new(start, start + units::bytes(group.len()));
            start = piece.end;
            (piece, group[0])
        };
        Ok(sources.chunk_by(|a, b| a == b).map(group).collect())
    }
}

/// Up to where clusters from `at` on are worked on at once: whole ones apart from those that `end`, or `at`, lies within.
fn end_of_step(cluster: ClusterSize, at: u64, end: u64) -> u64 {
    let size = cluster.bytes();
    let last = end / size * size;
    if at >= last || !at.is_multiple_of(size) {
        return end.min((at / size + 1) * size);
    }
    last.min(at + STEP_BYTES.max(size))
}
