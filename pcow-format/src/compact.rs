// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compaction: storage of the active layer that shows nothing of its own is given back. Sealed layers are never written
//! (I0). Everything is durable before the first byte goes (I3), and what the disk shows is the same at every moment.

use crate::active::scan_words;
use crate::error::{IoContext, Result};
use crate::image::Image;
use crate::map::{CLUSTERS_PER_WORD, State};
use crate::medium::read_exact_at;
use crate::units::{self, Cluster, ClusterRange};

/// Clusters whose words are changed before the map is synced once for all of them.
const BATCH_CLUSTERS: usize = 32 << 10;

/// What a compaction did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes that the active layer's data file takes less.
    pub freed_bytes: u64,
    /// Clusters that are not data any more, because they read zero or what is below them.
    pub dropped_clusters: u64,
}

impl Image {
    /// Gives back what it can; `reached` is told how many bytes of the disk were looked at. Nobody has the image mapped.
    ///
    /// # Errors
    /// `Io`, `Corrupt` or `FlushFailed`; the disk shows what it showed.
    pub fn compact(&self, reached: &mut dyn FnMut(u64)) -> Result<Compacted> {
        self.flush()?;
        let before = self.allocated()?;
        let mut compacted = Compacted::default();
        let mut batch = Vec::new();
        let mut own = vec![0; units::len(self.cluster_size().bytes())];
        let mut below = own.clone();
        for cluster in self.active.data_clusters()? {
            reached(self.cluster_size().offset_of(cluster));
            if let Some(state) = self.state_without(cluster, &mut own, &mut below)? {
                batch.push((cluster.only(), state));
                compacted.dropped_clusters += 1;
            }
            if batch.len() == BATCH_CLUSTERS {
                self.discard_now(&joined(&batch))?;
                batch.clear();
            }
        }
        self.discard_now(&joined(&batch))?;
        // What is not data now is not data after a crash either (I3).
        self.flush()?;
        self.active.give_back_unused()?;
        compacted.freed_bytes = before.saturating_sub(self.allocated()?);
        Ok(compacted)
    }

    /// The state in which a data cluster would show the same without its bytes, if there is one.
    fn state_without(
        &self,
        cluster: Cluster,
        own: &mut [u8],
        below: &mut [u8],
    ) -> Result<Option<State>> {
        let bytes = self.cluster_size().byte_range(cluster.only());
        let file = self.active.data_file();
        let context = || "cannot read the active layer's data".to_owned();
        let data = file.next_data(bytes.start).context(context)?;
        if data.is_some_and(|d| d.start < bytes.end) {
            read_exact_at(file, own, bytes.start).context(context)?;
        } else {
            own.fill(0);
        }
        let reads_zero = own.iter().all(|b| *b == 0);
        if self.below.is_nobodys(bytes.clone())? {
            return Ok(reads_zero.then_some(State::Absent));
        }
        self.below.read(bytes.start, below)?;
        Ok(if own == below {
            Some(State::Absent)
        } else {
            reads_zero.then_some(State::Zero)
        })
    }

    pub(crate) fn allocated(&self) -> Result<u64> {
        let status = self.active.data_file().status();
        Ok(status
            .context(|| "cannot inspect the active layer's data".to_owned())?
            .allocated)
    }
}

/// Neighbours of one state as one run.
fn joined(clusters: &[(ClusterRange, State)]) -> Vec<(ClusterRange, State)> {
    let mut runs: Vec<(ClusterRange, State)> = Vec::new();
    for (run, state) in clusters {
        match runs.last_mut() {
            Some((last, s)) if s == state && last.end == run.start => last.end = run.end,
            _ => runs.push((*run, *state)),
        }
    }
    runs
}

impl crate::active::Active {
    /// All clusters that are data, in order.
    fn data_clusters(&self) -> Result<Vec<Cluster>> {
        let mut clusters = Vec::new();
        scan_words(self.map_file(), &mut |number, word| {
            let first = number * CLUSTERS_PER_WORD;
            let data = (0..CLUSTERS_PER_WORD).filter(|slot| word.get(*slot).is_data());
            clusters.extend(data.map(|slot| Cluster(first + slot)));
            Ok(())
        })
        .context(|| "cannot read the map of the active layer".to_owned())?;
        Ok(clusters)
    }
}
