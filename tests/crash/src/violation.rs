// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A broken promise, with what it takes to see it again.

use std::fmt;

use crate::explorer::Limits;
use crate::search;
use crate::setting::Scene;
use crate::workload::Operation;

/// Which operations of a workload are cut off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// The last one: after acts that chance chose, then after these.
    Last(Vec<usize>),
    /// All but so many at the beginning, in the order in which they are made.
    From(usize),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Last(acts) => {
                f.write_str("last")?;
                acts.iter().try_for_each(|act| write!(f, "+{act}"))
            }
            Self::From(first) => write!(f, "from {first}"),
        }
    }
}

impl Part {
    fn parse(text: &str) -> Option<Self> {
        if let Some(first) = text.strip_prefix("from ") {
            return first.parse().ok().map(Self::From);
        }
        // What is before the first sign is empty.
        let acts = text.strip_prefix("last")?.split('+').skip(1);
        let acts = acts.map(|act| act.parse().ok());
        acts.collect::<Option<_>>().map(Self::Last)
    }
}

/// What is explored: enough to do it again, with the same random numbers.
///
/// As text: scene, limits, part, seed and operations, as in `dax:brief:last:17:snapshot;flush`.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Name of the scene.
    pub scene: &'static str,
    /// How close to look.
    pub limits: Limits,
    /// Which of the operations are cut off.
    pub part: Part,
    /// Where chance starts from.
    pub seed: u64,
    /// The operations, in order; also those that could not be done, since chance may have had a part in that.
    pub operations: Vec<&'static Operation>,
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scene, limits) = (self.scene, self.limits.name);
        write!(f, "{scene}:{limits}:{}:{}:", self.part, self.seed)?;
        let names: Vec<_> = self.operations.iter().map(|o| o.name).collect();
        f.write_str(&names.join(";"))
    }
}

impl Trace {
    /// Reads the text form back; `None` if it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<_> = text.split(':').collect();
        let [scene, limits, part, seed, names] = parts[..] else {
            return None;
        };
        // None at all: the opening alone.
        let operations = names.split_terminator(';').map(Operation::named);
        let trace = Self {
            scene: Scene::named(scene)?.name,
            limits: search::limits_named(limits)?,
            part: Part::parse(part)?,
            seed: seed.parse().ok()?,
            operations: operations.collect::<Option<_>>()?,
        };
        // Numbers can be written in more ways than one, and so can the end of the names.
        (trace.to_string() == text).then_some(trace)
    }
}

/// A crash after which a promise was broken.
#[derive(Debug)]
pub struct Violation {
    /// What was explored.
    pub trace: Trace,
    /// Sites of the last operation, up to the cut.
    pub acts: Vec<String>,
    /// What happened then.
    pub crash: Vec<String>,
    /// What was wrong.
    pub problem: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.problem)?;
        let acts = self.acts.join(", ");
        writeln!(f, "  last operation up to the crash: {acts}")?;
        writeln!(f, "  crash: {}", self.crash.join(", then "))?;
        write!(f, "  again: cargo xtask crash --replay '{}'", self.trace)
    }
}

/// A broken promise, and how it came to it.
#[derive(Debug)]
pub(crate) struct Broken {
    pub(crate) crash: Vec<String>,
    pub(crate) problem: String,
}

impl Broken {
    pub(crate) fn after(crash: impl Into<String>) -> impl FnOnce(String) -> Self {
        let crash = vec![crash.into()];
        move |problem| Self { crash, problem }
    }

    pub(crate) fn preceded_by(mut self, crash: String) -> Self {
        self.crash.insert(0, crash);
        self
    }
}
