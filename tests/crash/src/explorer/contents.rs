// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many contents of the disk behind one opening.
//!
//! A power cut decides by itself, for every page that was not synced, what is there. Opening an image and checking it read
//! no byte of the active layer's data file, so they cannot tell apart states that differ in such bytes only: all of these
//! are opened and checked by doing it once. That no byte was read or changed is what the simulation notes, for every
//! opening anew, and one state in [`AGAIN`] is opened and judged by itself, to the same end. What the disk shows is read
//! and judged for every state, through the image that is open.

use pcow_format::Source;
use pcow_format::medium::sim::{Choice, Sim};

use super::{Cut, Explorer};
use crate::model::Contents;
use crate::oracle::{End, Survivor, data_inode, judge, judge_contents};
use crate::violation::Broken;
use crate::workload::Expected;

/// One state in so many is opened and judged by itself.
const AGAIN: usize = 64;

/// Up to this many contents all are looked at.
const FEW: usize = 64;

const PAGE_BYTES: u64 = 4096;

impl Explorer<'_> {
    /// Decides anew, in up to `contents` ways, what of the disk's bytes survived the cut that `survivor` came from. If
    /// the promise is broken, `cut` becomes the one that breaks it.
    pub(super) fn look_at_contents(
        &mut self,
        cut: &mut Cut<'_>,
        sim: &Sim,
        survivor: &Survivor,
        expected: &Expected,
        boot: u128,
    ) -> Result<(), Broken> {
        let which = undecided(cut, survivor).map_err(Broken::after(""))?;
        if which.is_empty() || self.limits.contents == 0 {
            return Ok(());
        }
        let first = cut.picks.clone();
        let mut found = survivor.model.disk.now().clone();
        for decided in self.ways(cut.choices, &which) {
            which
                .iter()
                .zip(decided)
                .for_each(|(i, pick)| cut.picks[*i] = pick);
            cut.moment
                .decide_again(sim, cut.choices, &cut.picks, &which);
            self.judge_one(cut, survivor, expected, boot, &mut found)
                .map_err(Broken::after(""))?;
        }
        cut.picks = first;
        cut.moment
            .decide_again(sim, cut.choices, &cut.picks, &which);
        Ok(())
    }

    fn judge_one(
        &mut self,
        cut: &Cut<'_>,
        survivor: &Survivor,
        expected: &Expected,
        boot: u128,
        found: &mut Contents,
    ) -> Result<(), String> {
        let digest = judge_contents(self.setting, survivor, expected, found)?;
        self.count(digest);
        if !self.random.once_in(AGAIN) {
            return Ok(());
        }
        let alone = cut.moment.power_cut(cut.choices, &cut.picks);
        self.restore(&alone, expected, boot)?;
        let judged = judge(self.setting, &alone, boot, expected, End::PowerCut)?;
        if judged.digest != digest {
            return Err("an opening served a state that it can tell from its own".to_owned());
        }
        Ok(())
    }

    /// All combinations of outcomes if there are few, else some: the more there are, the fewer of them are met again.
    fn ways(&mut self, choices: &[Choice], which: &[usize]) -> Vec<Vec<usize>> {
        let options: Vec<_> = which.iter().map(|i| choices[*i].options()).collect();
        let most = self.limits.contents.min(FEW);
        let total = options.iter().try_fold(1usize, |t, o| t.checked_mul(*o));
        if total.is_some_and(|t| t <= most) {
            return super::all_combinations(&options);
        }
        let mut one = || options.iter().map(|o| self.random.below(*o)).collect();
        let many = total.map_or(usize::MAX, |t| t.isqrt().saturating_add(most));
        let many = many.min(self.limits.contents);
        (0..many).map(|_| one()).collect()
    }
}

/// The choices that decide only bytes which the disk shows and which nothing has looked at.
fn undecided(cut: &Cut<'_>, survivor: &Survivor) -> Result<Vec<usize>, String> {
    let image = &survivor.image;
    let inode = data_inode(image)?;
    if !survivor.untouched {
        return Ok(Vec::new());
    }
    let mut which = cut.moment.content_choices(cut.choices, inode);
    let shown = |i: &usize| {
        let page = cut.choices[*i].page()?;
        let cluster = image.cluster_size().cluster_at(page * PAGE_BYTES);
        image.source(cluster).ok().filter(|s| *s == Source::Active)
    };
    which.retain(|i| shown(i).is_some());
    Ok(which)
}
