// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Walks through everything that a crash can leave of a workload, and has each state judged.
//!
//! After every act of an operation: the process dies, or the power is cut with every combination of what survived, up
//! to a bound, and a seeded sample above it. Recovery from a power cut is itself cut at each of its acts. After a death
//! the image is used, flushed and cut once more.

use std::hash::Hasher;

use pcow_format::medium::sim::{Choice, Moment, Sim};

mod contents;

use crate::coverage::{Cell, Cells, OPENING, RECOVERY, medium};
use crate::digest::{Digest, DigestSet};
use crate::oracle::{End, Survivor, Use, is_marked, judge, use_and_flush};
use crate::random::{Random, newest};
use crate::search::Recovered;
use crate::setting::Setting;
use crate::violation::{Broken, Part, Trace, Violation};
use crate::workload::{
    Expected, Operation, Point, Run, clone_of_closed, put_newest_back, receive_again,
};

/// How far to go at one act.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// What they are called in traces.
    pub name: &'static str,
    /// One workload in so many is looked at; 1 for each.
    pub workloads: u64,
    /// An operation is cut off after one in so many of its acts; 1 for after each.
    pub acts: usize,
    /// Up to this many combinations all are tried.
    pub exhaustive: usize,
    /// Above it, this many.
    pub samples: usize,
    /// The same for crashes within a recovery.
    pub nested: usize,
    /// In how many ways the image is used after a death, up to six.
    pub uses: usize,
    /// The process dies after one in so many of the acts that are cut off; 1 for each.
    pub deaths: usize,
    /// One in so many states after a power cut is used and crashed again; 1 for each.
    pub depth: usize,
    /// How many contents of the disk are looked at through one opening, where that is crashed again.
    pub contents: usize,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Stats {
    /// Workloads that could be done.
    pub workloads: u64,
    /// Acts after which there was a crash.
    pub acts: u64,
    /// How often each operation was cut off at each site.
    pub cells: Cells,
    /// Crash states that were judged, each different from the others of its workload.
    pub states: u64,
}

impl Stats {
    /// Adds another search's.
    pub fn add(&mut self, other: Stats) {
        self.workloads += other.workloads;
        self.acts += other.acts;
        self.states += other.states;
        for (key, count) in other.cells {
            *self.cells.entry(key).or_default() += count;
        }
    }
}

/// Explores workloads of one setting.
#[derive(Debug)]
pub struct Explorer<'a> {
    setting: &'a Setting,
    limits: Limits,
    recovered: &'a Recovered,
    random: Random,
    /// Fingerprints of the crash states of this workload, each with what is expected of it.
    seen: DigestSet,
    /// What was done so far.
    pub stats: Stats,
}

impl<'a> Explorer<'a> {
    /// Notes what there is after recovery in `recovered`.
    pub fn new(setting: &'a Setting, limits: Limits, recovered: &'a Recovered) -> Self {
        Self {
            setting,
            limits,
            recovered,
            random: Random(0),
            seen: DigestSet::default(),
            stats: Stats::default(),
        }
    }

    /// Explores the last operation of a workload; the others are the last ones of shorter workloads. `false` if the
    /// workload cannot be done.
    pub fn explore(
        &mut self,
        operations: &[&'static Operation],
        seed: u64,
    ) -> Result<bool, Box<Violation>> {
        let Some(mut last) = self.last_of(operations, seed)? else {
            return Ok(false);
        };
        self.cut(&last)?;
        self.cut_at_new_sites(&mut last)?;
        Ok(true)
    }

    /// Explores exactly what was explored when a violation was found. `false` if the workload cannot be done.
    pub fn replay(&mut self, trace: &Trace) -> Result<bool, Box<Violation>> {
        let (operations, seed) = (&trace.operations, trace.seed);
        let acts = match &trace.part {
            Part::From(first) => {
                return self.explore_from(*first, operations, seed).map(|()| true);
            }
            Part::Last(acts) => acts,
        };
        let Some(mut last) = self.last_of(operations, seed)? else {
            return Ok(false);
        };
        self.cut(&last)?;
        // Another format may make fewer of them.
        let made = last.points.len();
        for act in acts.iter().filter(|act| **act < made) {
            self.cut_also_after(*act, &mut last)?;
        }
        Ok(true)
    }

    /// Performs a workload; `None` if it cannot be done.
    fn last_of(
        &mut self,
        operations: &[&'static Operation],
        seed: u64,
    ) -> Result<Option<Last>, Box<Violation>> {
        self.start(seed);
        let trace = || self.trace(operations, Part::Last(Vec::new()), seed);
        let mut run = self.open(trace, seed)?;
        for operation in operations {
            if !perform(&mut run, operation, trace)? {
                return Ok(None);
            }
        }
        let last = Last::of(&mut run, trace());
        self.stats.workloads += 1;
        Ok(Some(last))
    }

    /// Explores every operation of a workload but the `first` ones, each at some of its acts; those that cannot be done
    /// are left out.
    pub fn explore_from(
        &mut self,
        first: usize,
        operations: &[&'static Operation],
        seed: u64,
    ) -> Result<(), Box<Violation>> {
        self.start(seed);
        let mut run = self.open(|| self.trace(&[], Part::From(0), seed), seed)?;
        for (i, operation) in operations.iter().enumerate() {
            // A trace ends with the operation at which it was found, which may be one of the first.
            let trace = || self.trace(&operations[..=i], Part::From(first.min(i)), seed);
            if perform(&mut run, operation, trace)? && i >= first {
                let last = Last::of(&mut run, trace());
                self.cut(&last)?;
            }
        }
        self.stats.workloads += 1;
        Ok(())
    }

    pub(crate) fn start(&mut self, seed: u64) {
        self.seen.clear();
        self.random = Random(seed);
    }

    fn open(&self, trace: impl Fn() -> Trace, seed: u64) -> Result<Run<'a>, Box<Violation>> {
        Run::new(self.setting, seed).map_err(|e| without_crash(trace(), e))
    }

    fn trace(&self, operations: &[&'static Operation], part: Part, seed: u64) -> Trace {
        Trace {
            scene: self.setting.scene.name,
            limits: self.limits,
            part,
            seed,
            operations: operations.to_vec(),
        }
    }

    /// Explores the last operation.
    fn cut(&mut self, last: &Last) -> Result<(), Box<Violation>> {
        for act in 0..last.points.len() {
            if self.random.once_in(self.limits.acts) {
                self.cut_after(act, last)?;
            }
        }
        Ok(())
    }

    /// Explores the last operation at those of its call sites at which chance never had it cut off: some come in so few
    /// workloads that chance alone may leave out all of them.
    fn cut_at_new_sites(&mut self, last: &mut Last) -> Result<(), Box<Violation>> {
        for act in 0..last.points.len() {
            let cell = self.cell(last.name(), &last.points[act].moment);
            if !self.stats.cells.contains_key(&cell) {
                self.cut_also_after(act, last)?;
            }
        }
        Ok(())
    }

    /// Which acts these are depends on the workloads before, so the trace has to name them.
    fn cut_also_after(&mut self, act: usize, last: &mut Last) -> Result<(), Box<Violation>> {
        if let Part::Last(acts) = &mut last.trace.part {
            acts.push(act);
        }
        self.cut_after(act, last)
    }

    fn cut_after(&mut self, act: usize, last: &Last) -> Result<(), Box<Violation>> {
        let point = &last.points[act];
        self.stats.acts += 1;
        self.cover(last.name(), &point.moment);
        self.crash(&point.moment, &point.expected, last.boot)
            .map_err(|broken| {
                let acts = acts(&last.points[..=act]);
                violation(last.trace.clone(), acts, broken)
            })
    }

    fn cell(&self, operation: &'static str, moment: &Moment) -> Cell {
        let medium = medium(self.setting.domain());
        (operation, medium, moment.act().site.0)
    }

    fn cover(&mut self, operation: &'static str, moment: &Moment) {
        let cell = self.cell(operation, moment);
        *self.stats.cells.entry(cell).or_default() += 1;
    }

    /// Everything that a crash at one moment can leave.
    pub(crate) fn crash(
        &mut self,
        moment: &Moment,
        expected: &Expected,
        boot: u128,
    ) -> Result<(), Broken> {
        if self.random.once_in(self.limits.deaths) {
            self.kill(moment, expected, boot)?;
        }
        let (choices, wanted) = (moment.choices(), expected.digest());
        for picks in self.combinations(&choices, self.limits.exhaustive, self.limits.samples) {
            let sim = moment.power_cut(&choices, &picks);
            if self.was_seen(&sim, wanted) {
                continue;
            }
            let mut cut = Cut {
                moment,
                choices: &choices,
                picks,
            };
            if let Err(broken) = self.survive(&sim, Some(&mut cut), expected, boot + 1) {
                return Err(self.shrink(cut, expected, boot, broken));
            }
        }
        Ok(())
    }

    /// The process dies; the next one uses and flushes the image; then the power is cut.
    fn kill(&mut self, moment: &Moment, expected: &Expected, boot: u128) -> Result<(), Broken> {
        let uses = [
            Use::Data,
            Use::Nobodys,
            Use::All,
            Use::Tree,
            Use::Clone,
            Use::Again,
        ];
        let first = self.random.below(uses.len());
        for which in uses.iter().cycle().skip(first).take(self.limits.uses) {
            let sim = moment.process_death();
            let nobody_knows = expected.possible.iter().any(|m| m.unknown);
            if is_marked(&sim, expected.image) {
                // Any page may go, and for a single one to go is the hardest to notice.
                let few = 1 + self.random.below(4);
                sim.evict(|| self.random.once_in(few));
            }
            self.restore(&sim, expected, boot)
                .map_err(Broken::after("killed"))?;
            let later = match which {
                Use::Clone => clone_of_closed(self.setting, &sim, expected, boot),
                Use::Again => receive_again(&sim, expected, boot),
                _ if nobody_knows => self.look_only(&sim, expected, boot),
                _ => self.use_opened(&sim, expected, boot, *which).map(Some),
            };
            if let Some(later) = later.map_err(Broken::after("killed and used"))? {
                self.cut_later(&sim, &later, boot)
                    .map_err(|b| b.preceded_by(format!("killed and used ({which:?})")))?;
            }
        }
        Ok(())
    }

    /// Opens the images. Nothing can be promised for them.
    fn look_only(
        &mut self,
        sim: &Sim,
        expected: &Expected,
        boot: u128,
    ) -> Result<Option<Expected>, String> {
        let survivor = judge(self.setting, sim, boot, expected, End::Killed)?;
        self.count(survivor.digest);
        Ok(None)
    }

    /// Opens the images, uses and flushes the one; returns what must be there then.
    fn use_opened(
        &mut self,
        sim: &Sim,
        expected: &Expected,
        boot: u128,
        which: Use,
    ) -> Result<Expected, String> {
        let mut survivor = judge(self.setting, sim, boot, expected, End::Killed)?;
        self.count(survivor.digest);
        use_and_flush(self.setting, &mut survivor, which)?;
        Ok(survivor.expected())
    }

    /// Puts the newest root back where an older one may be in place.
    fn restore(&self, sim: &Sim, expected: &Expected, boot: u128) -> Result<(), String> {
        match &expected.older {
            Some(older) => put_newest_back(self.setting, sim, expected, older, boot),
            None => Ok(()),
        }
    }

    fn cut_later(&mut self, sim: &Sim, expected: &Expected, boot: u128) -> Result<(), Broken> {
        let moment = sim.now();
        let choices = moment.choices();
        for picks in self.combinations(&choices, 2, 3) {
            let cut = moment.power_cut(&choices, &picks);
            let survivor = judge(self.setting, &cut, boot + 1, expected, End::PowerCut)
                .map_err(|e| Broken::after(describe(&moment, &choices, &picks))(e))?;
            self.count(survivor.digest);
        }
        Ok(())
    }

    /// Recovery after a power cut, with crashes inside of it, and use of the image afterwards.
    fn survive(
        &mut self,
        sim: &Sim,
        cut: Option<&mut Cut<'_>>,
        expected: &Expected,
        boot: u128,
    ) -> Result<(), Broken> {
        let deep = self.random.once_in(self.limits.depth);
        sim.watch();
        self.restore(sim, expected, boot)
            .map_err(Broken::after(""))?;
        if deep {
            sim.record();
        }
        let mut survivor =
            judge(self.setting, sim, boot, expected, End::PowerCut).map_err(Broken::after(""))?;
        self.count(survivor.digest);
        if !deep {
            return Ok(());
        }
        if let Some(cut) = cut {
            self.look_at_contents(cut, sim, &survivor, expected, boot)?;
        }
        let recovery = std::mem::take(&mut survivor.recovery);
        let recovered = survivor.expected();
        let wanted = recovered.digest();
        for moment in &recovery {
            let site = moment.act().site;
            self.cover(RECOVERY, moment);
            self.crash_again(moment, (&recovered, wanted), survivor.shape, boot)
                .map_err(|b| b.preceded_by(format!("recovery up to {}", site.0)))?;
        }
        use_and_flush(self.setting, &mut survivor, Use::All).map_err(Broken::after("use"))
    }

    fn crash_again(
        &mut self,
        moment: &Moment,
        (expected, wanted): (&Expected, u64),
        shape: Digest,
        boot: u128,
    ) -> Result<(), Broken> {
        let dead = moment.process_death();
        let killed = judge(self.setting, &dead, boot, expected, End::Killed);
        same_shape(killed, shape).map_err(Broken::after("killed"))?;
        let choices = moment.choices();
        for picks in self.combinations(&choices, self.limits.nested, self.limits.nested) {
            let sim = moment.power_cut(&choices, &picks);
            if self.was_seen(&sim, wanted) {
                continue;
            }
            let judged = judge(self.setting, &sim, boot + 1, expected, End::PowerCut);
            let survivor = same_shape(judged, shape)
                .map_err(|e| Broken::after(describe(moment, &choices, &picks))(e))?;
            self.count(survivor.digest);
        }
        Ok(())
    }

    /// Whether that medium was judged before against the same expectation.
    fn was_seen(&mut self, sim: &Sim, wanted: u64) -> bool {
        let mut digest = Digest::default();
        digest.write_u64(sim.fingerprint());
        digest.write_u64(wanted);
        !self.seen.insert(digest.finish())
    }

    fn count(&mut self, digest: u64) {
        self.stats.states += 1;
        self.recovered.note(digest);
    }

    /// Every combination of outcomes if there are at most `exhaustive`, else `samples` of them.
    fn combinations(
        &mut self,
        choices: &[Choice],
        exhaustive: usize,
        samples: usize,
    ) -> Vec<Vec<usize>> {
        let total = choices
            .iter()
            .try_fold(1usize, |product, c| product.checked_mul(c.options()));
        if total.is_some_and(|t| t <= exhaustive) {
            let options: Vec<_> = choices.iter().map(Choice::options).collect();
            return all_combinations(&options);
        }
        let mut chosen = vec![vec![0; choices.len()], newest(choices)];
        while chosen.len() < samples {
            chosen.push(self.sample(choices));
        }
        if samples > 2 {
            chosen.extend(removals_apart(choices));
        }
        chosen
    }

    /// One thing lost, one thing kept, or a mixture.
    fn sample(&mut self, choices: &[Choice]) -> Vec<usize> {
        let one = self.random.below(choices.len());
        let mut picks = match self.random.below(6) {
            0 => vec![0; choices.len()],
            1 => newest(choices),
            _ => return self.random.picks(choices),
        };
        picks[one] = choices[one].options() - 1 - picks[one];
        picks
    }

    /// Lets survive what need not be lost for the promise to be broken.
    fn shrink(
        &mut self,
        mut cut: Cut<'_>,
        expected: &Expected,
        boot: u128,
        mut broken: Broken,
    ) -> Broken {
        for i in (0..cut.choices.len()).take(MAX_SHRUNK) {
            let mut fewer = cut.picks.clone();
            fewer[i] = cut.choices[i].options() - 1;
            self.seen.clear();
            let sim = cut.moment.power_cut(cut.choices, &fewer);
            if let Err(b) = self.survive(&sim, None, expected, boot + 1) {
                (cut.picks, broken) = (fewer, b);
            }
        }
        broken.preceded_by(describe(cut.moment, cut.choices, &cut.picks))
    }
}

/// The last operation of a workload, with what led there.
struct Last {
    points: Vec<Point>,
    boot: u128,
    trace: Trace,
}

impl Last {
    fn of(run: &mut Run<'_>, trace: Trace) -> Self {
        Self {
            points: run.points(),
            boot: run.boot,
            trace,
        }
    }

    fn name(&self) -> &'static str {
        self.trace.operations.last().map_or(OPENING, |o| o.name)
    }
}

fn perform(
    run: &mut Run<'_>,
    operation: &Operation,
    trace: impl Fn() -> Trace,
) -> Result<bool, Box<Violation>> {
    run.perform(operation)
        .map_err(|e| without_crash(trace(), e))
}

fn without_crash(trace: Trace, problem: String) -> Box<Violation> {
    violation(trace, Vec::new(), Broken::after("none")(problem))
}

fn violation(trace: Trace, acts: Vec<String>, broken: Broken) -> Box<Violation> {
    Box::new(Violation {
        trace,
        acts,
        crash: broken.crash,
        problem: broken.problem,
    })
}

/// A power cut: what it decides, and how.
struct Cut<'a> {
    moment: &'a Moment,
    choices: &'a [Choice],
    picks: Vec<usize>,
}

/// A recovery that was cut off and made again ends as one that was not: so one that is cut off serves every content of the
/// disk that the other one does.
fn same_shape(judged: Result<Survivor, String>, shape: Digest) -> Result<Survivor, String> {
    let survivor = judged?;
    if survivor.shape == shape {
        return Ok(survivor);
    }
    Err("a recovery that was cut off ends in another way than one that was not".to_owned())
}

fn all_combinations(options: &[usize]) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for options in options {
        let longer = |picks: &Vec<usize>| {
            let picks = picks.clone();
            (0..*options).map(move |o| [picks.clone(), vec![o]].concat())
        };
        all = all.iter().flat_map(longer).collect();
    }
    all
}

/// All that was removed is there again and nothing else was lost, and the other way round. Chance alone hardly ever meets
/// these where much was removed. Nothing if that is one with everything lost and everything kept.
fn removals_apart(choices: &[Choice]) -> Vec<Vec<usize>> {
    let removals = choices.iter().filter(|c| c.is_removal()).count();
    if removals == 0 || removals == choices.len() {
        return Vec::new();
    }
    let kept = |c: &Choice, is_kept| if is_kept { c.options() - 1 } else { 0 };
    let apart = |removals_kept: bool| {
        let pick = |c: &Choice| kept(c, c.is_removal() == removals_kept);
        choices.iter().map(pick).collect()
    };
    vec![apart(false), apart(true)]
}

/// The power cut in words: what was lost in it.
fn describe(moment: &Moment, choices: &[Choice], picks: &[usize]) -> String {
    let lost = || {
        let all = choices.iter().zip(picks);
        all.filter(|(c, p)| **p + 1 < c.options())
    };
    let shown = lost().take(MAX_SHOWN);
    let mut shown: Vec<_> = shown.map(|(c, p)| moment.describe(c, *p)).collect();
    if lost().count() > MAX_SHOWN {
        shown.push(format!("{} more", lost().count() - MAX_SHOWN));
    }
    format!("power cut [{}]", shown.join("; "))
}

/// Choices that are tried one by one when a failure is made smaller.
const MAX_SHRUNK: usize = 256;

/// Lost things that are told one by one.
const MAX_SHOWN: usize = 8;

fn acts(points: &[Point]) -> Vec<String> {
    let acts = points.iter().map(|p| p.moment.act());
    acts.map(|a| format!("{} ({})", a.site.0, a.on)).collect()
}
