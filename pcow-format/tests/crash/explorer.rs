// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Walks through everything that a crash can leave of a workload, and has each state judged.
//!
//! After every act of the last operation (earlier ones are the last ones of shorter workloads): the process dies, or the
//! power is cut with every combination of what survived, up to a bound, and a seeded sample above it. Recovery from a
//! power cut is itself cut at each of its acts. After a death the image is used, flushed and cut once more.

use std::collections::{BTreeSet, HashSet};
use std::fmt;

use pcow_format::medium::Site;
use pcow_format::medium::sim::{Choice, Moment, Sim};

use crate::model::Model;
use crate::oracle::{End, Survivor, Use, judge, use_and_flush};
use crate::setting::Setting;
use crate::workload::{OPERATIONS, Point, Run};

/// A small generator of reproducible numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).expect("usize is at most 64 bits");
        usize::try_from(self.next() % bound).expect("below a usize")
    }

    /// One outcome for each choice; how much survives differs from call to call.
    pub fn picks(&mut self, choices: &[Choice]) -> Vec<usize> {
        let density = self.below(5);
        let mut pick = |c: &Choice| match self.below(4) < density {
            true => c.options() - 1 - self.below(c.options()) / 2,
            false => self.below(c.options()) / 2,
        };
        choices.iter().map(&mut pick).collect()
    }
}

/// The outcome in which everything was written back.
pub fn newest(choices: &[Choice]) -> Vec<usize> {
    choices.iter().map(|c| c.options() - 1).collect()
}

/// How far to go at one act.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Up to this many combinations all are tried.
    pub exhaustive: usize,
    /// Above it, this many.
    pub samples: usize,
    /// The same for crashes within a recovery.
    pub nested: usize,
    /// In how many ways the image is used after a death, up to four.
    pub uses: usize,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Stats {
    pub workloads: u64,
    pub acts: u64,
    /// Sites of these acts.
    pub sites: BTreeSet<Site>,
    /// Crash states that were judged, each different from the others of its workload.
    pub states: u64,
    /// Digests of what was there after recovery.
    pub recovered: HashSet<u64>,
}

impl Stats {
    pub fn add(&mut self, other: Stats) {
        self.workloads += other.workloads;
        self.acts += other.acts;
        self.sites.extend(other.sites);
        self.states += other.states;
        self.recovered.extend(other.recovered);
    }
}

/// A crash after which a promise was broken.
#[derive(Debug)]
pub struct Violation {
    workload: Vec<&'static str>,
    seed: u64,
    /// Sites of the last operation, up to the cut.
    trace: Vec<String>,
    /// What happened then.
    crash: Vec<String>,
    pub problem: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.problem)?;
        writeln!(
            f,
            "  workload: {} (seed {})",
            self.workload.join(", "),
            self.seed
        )?;
        writeln!(
            f,
            "  last operation up to the crash: {}",
            self.trace.join(", ")
        )?;
        write!(f, "  crash: {}", self.crash.join(", then "))
    }
}

/// A broken promise, and how it came to it.
#[derive(Debug)]
struct Broken {
    crash: Vec<String>,
    problem: String,
}

impl Broken {
    fn after(crash: impl Into<String>) -> impl FnOnce(String) -> Self {
        let crash = vec![crash.into()];
        move |problem| Self { crash, problem }
    }

    fn preceded_by(mut self, crash: String) -> Self {
        self.crash.insert(0, crash);
        self
    }
}

/// Explores workloads of one setting.
#[derive(Debug)]
pub struct Explorer<'a> {
    setting: &'a Setting,
    limits: Limits,
    random: Random,
    /// Fingerprints of the crash states of this workload.
    seen: HashSet<u64>,
    pub stats: Stats,
}

impl<'a> Explorer<'a> {
    pub fn new(setting: &'a Setting, limits: Limits) -> Self {
        Self {
            setting,
            limits,
            random: Random(0),
            seen: HashSet::new(),
            stats: Stats::default(),
        }
    }

    /// Explores the last operation of a workload, given as indices into [`OPERATIONS`].
    pub fn explore(&mut self, workload: &[usize], seed: u64) -> Result<(), Box<Violation>> {
        self.seen.clear();
        self.random = Random(seed);
        let violation = |trace: Vec<String>, broken: Broken| {
            Box::new(Violation {
                workload: workload.iter().map(|i| OPERATIONS[*i].name).collect(),
                seed,
                trace,
                crash: broken.crash,
                problem: broken.problem,
            })
        };
        let mut run = match self.run(workload, seed) {
            Ok(Some(run)) => run,
            Ok(None) => return Ok(()),
            Err(problem) => return Err(violation(Vec::new(), Broken::after("none")(problem))),
        };
        self.stats.workloads += 1;
        let points = run.points();
        for (i, point) in points.iter().enumerate() {
            self.stats.acts += 1;
            self.stats.sites.insert(point.moment.act().site);
            if let Err(broken) = self.crash(&point.moment, &point.possible, run.boot) {
                return Err(violation(trace(&points[..=i]), broken));
            }
        }
        Ok(())
    }

    /// Performs a workload; `None` if it cannot be done.
    fn run(&self, workload: &[usize], seed: u64) -> Result<Option<Run<'a>>, String> {
        let mut run = Run::new(self.setting, seed)?;
        for operation in workload {
            if !run.perform(&OPERATIONS[*operation])? {
                return Ok(None);
            }
        }
        Ok(Some(run))
    }

    fn crash(&mut self, moment: &Moment, possible: &[Model], boot: u128) -> Result<(), Broken> {
        self.kill(moment, possible, boot)?;
        let choices = moment.choices();
        for picks in self.combinations(&choices, self.limits.exhaustive, self.limits.samples) {
            let sim = moment.power_cut(&choices, &picks);
            if !self.seen.insert(sim.fingerprint()) {
                continue;
            }
            if let Err(broken) = self.survive(&sim, possible, boot + 1) {
                return Err(self.shrink(moment, &choices, picks, possible, boot, broken));
            }
        }
        Ok(())
    }

    /// The process dies; the next one uses and flushes the image; then the power is cut.
    fn kill(&mut self, moment: &Moment, possible: &[Model], boot: u128) -> Result<(), Broken> {
        let uses = [Use::Data, Use::Nobodys, Use::All, Use::Tree];
        let first = self.random.below(uses.len());
        for which in uses.iter().cycle().skip(first).take(self.limits.uses) {
            let sim = moment.process_death();
            let mut survivor = judge(self.setting, &sim, boot, possible, End::Killed)
                .map_err(Broken::after("killed"))?;
            self.count(&survivor);
            use_and_flush(self.setting, &mut survivor, *which)
                .map_err(Broken::after("killed and used"))?;
            self.cut_later(&sim, &survivor.model, boot)
                .map_err(|b| b.preceded_by("killed, used and flushed".to_owned()))?;
        }
        Ok(())
    }

    fn cut_later(&mut self, sim: &Sim, model: &Model, boot: u128) -> Result<(), Broken> {
        let moment = sim.now();
        let choices = moment.choices();
        for picks in self.combinations(&choices, 2, 3) {
            let cut = moment.power_cut(&choices, &picks);
            let expected = std::slice::from_ref(model);
            judge(self.setting, &cut, boot + 1, expected, End::PowerCut)
                .map_err(|e| Broken::after(describe(&moment, &choices, &picks))(e))?;
        }
        Ok(())
    }

    /// Recovery after a power cut, with crashes inside of it, and use of the image afterwards.
    fn survive(&mut self, sim: &Sim, possible: &[Model], boot: u128) -> Result<(), Broken> {
        let mut survivor =
            judge(self.setting, sim, boot, possible, End::PowerCut).map_err(Broken::after(""))?;
        self.count(&survivor);
        let recovery = std::mem::take(&mut survivor.recovery);
        for moment in &recovery {
            self.stats.sites.insert(moment.act().site);
            self.crash_again(moment, &survivor.model, boot)
                .map_err(|b| b.preceded_by(format!("recovery up to {}", moment.act().site.0)))?;
        }
        use_and_flush(self.setting, &mut survivor, Use::All).map_err(Broken::after("use"))
    }

    fn crash_again(&mut self, moment: &Moment, model: &Model, boot: u128) -> Result<(), Broken> {
        let expected = std::slice::from_ref(model);
        let dead = moment.process_death();
        judge(self.setting, &dead, boot, expected, End::Killed).map_err(Broken::after("killed"))?;
        let choices = moment.choices();
        for picks in self.combinations(&choices, self.limits.nested, self.limits.nested) {
            let sim = moment.power_cut(&choices, &picks);
            if !self.seen.insert(sim.fingerprint()) {
                continue;
            }
            let judged = judge(self.setting, &sim, boot + 1, expected, End::PowerCut);
            let survivor =
                judged.map_err(|e| Broken::after(describe(moment, &choices, &picks))(e))?;
            self.count(&survivor);
        }
        Ok(())
    }

    fn count(&mut self, survivor: &Survivor) {
        self.stats.states += 1;
        self.stats.recovered.insert(survivor.digest);
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
            return all_combinations(choices);
        }
        let mut chosen = vec![vec![0; choices.len()], newest(choices)];
        while chosen.len() < samples {
            chosen.push(self.sample(choices));
        }
        chosen
    }

    /// One thing lost, one thing kept, or a mixture.
    fn sample(&mut self, choices: &[Choice]) -> Vec<usize> {
        let one = self.random.below(choices.len());
        let mut picks = match self.random.below(3) {
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
        moment: &Moment,
        choices: &[Choice],
        mut picks: Vec<usize>,
        possible: &[Model],
        boot: u128,
        mut broken: Broken,
    ) -> Broken {
        for i in (0..choices.len()).take(MAX_SHRUNK) {
            let mut fewer = picks.clone();
            fewer[i] = choices[i].options() - 1;
            self.seen.clear();
            let sim = moment.power_cut(choices, &fewer);
            if let Err(b) = self.survive(&sim, possible, boot + 1) {
                (picks, broken) = (fewer, b);
            }
        }
        broken.preceded_by(describe(moment, choices, &picks))
    }
}

fn all_combinations(choices: &[Choice]) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for choice in choices {
        let longer = |picks: &Vec<usize>| {
            let picks = picks.clone();
            (0..choice.options()).map(move |o| [picks.clone(), vec![o]].concat())
        };
        all = all.iter().flat_map(longer).collect();
    }
    all
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

fn trace(points: &[Point]) -> Vec<String> {
    let acts = points.iter().map(|p| p.moment.act());
    acts.map(|a| format!("{} ({})", a.site.0, a.on)).collect()
}
