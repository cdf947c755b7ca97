// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A broken promise, with what it takes to see it again.

use std::fmt;

use crate::workload::Operation;

/// What is explored: enough to do it again.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Name of the scene.
    pub scene: &'static str,
    /// The operations, in order.
    pub operations: Vec<&'static Operation>,
    /// Where chance starts from.
    pub seed: u64,
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.operations.iter().map(|o| o.name).collect();
        write!(f, "{}:{}:{}", self.scene, self.seed, names.join(";"))
    }
}

impl Trace {
    /// Reads the text form back; `None` if it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ':');
        let scene = crate::setting::Scene::named(parts.next()?)?.name;
        let seed = parts.next()?.parse().ok()?;
        // None at all: the opening alone.
        let names = parts.next()?.split_terminator(';');
        let operations = names.map(Operation::named);
        Some(Self {
            scene,
            operations: operations.collect::<Option<_>>()?,
            seed,
        })
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
