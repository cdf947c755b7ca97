// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tries of steps that came to no end: the emulator lost a guest, or the lab host died.
//!
//! Nobody knows whether the emulator or what is tested is to blame. Therefore a step has two tries, whatever the first was lost
//! to, each second one is told, and a run fails that loses more than a few.

use std::collections::BTreeMap;
use std::fmt;

/// Tries that may be lost in a whole run.
const MOST: usize = 6;

/// How a try is lost if not by a guest.
pub const DEATH: &str = "the lab host died";

/// The tries that were lost in a run.
#[derive(Debug, Default)]
pub struct Losses(Vec<Loss>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Loss {
    step: String,
    how: String,
}

impl Losses {
    /// A try of `step` was lost.
    pub fn add(&mut self, step: &str, how: &str) {
        self.0.push(Loss {
            step: step.to_string(),
            how: how.to_string(),
        });
    }

    /// Those of `others` were tries of `step`.
    pub fn add_all(&mut self, step: &str, others: &Self) {
        for loss in &others.0 {
            self.add(step, &loss.how);
        }
    }

    /// How the first try of `step` was lost; `None` if it was not.
    pub fn first_of(&self, step: &str) -> Option<&str> {
        let loss = self.0.iter().find(|loss| loss.step == step)?;
        Some(&loss.how)
    }

    /// Says what is wrong if there are too many.
    pub fn fault(&self) -> Option<String> {
        (self.0.len() > MOST).then(|| format!("{self}, and {MOST} may be"))
    }
}

/// How many, and how.
impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no try was lost");
        }
        let mut counts = BTreeMap::<&str, usize>::new();
        for loss in &self.0 {
            *counts.entry(&loss.how).or_default() += 1;
        }
        let kinds: Vec<String> = counts
            .into_iter()
            .map(|(how, count)| format!("{count} because {how}"))
            .collect();
        write!(
            f,
            "tries that were lost: {} ({})",
            self.0.len(),
            kinds.join(", ")
        )
    }
}

/// What the end of a step's line says of a try before; nothing if there was none.
pub fn remark(first_try: Option<&str>) -> String {
    first_try.map_or(String::new(), |how| format!(" (second try: {how})"))
}

#[cfg(test)]
mod tests {
    use super::{DEATH, Losses};

    #[test]
    fn losses_are_counted_by_what_they_are_due_to() {
        let mut losses = Losses::default();
        assert_eq!(losses.to_string(), "no try was lost");
        losses.add("a", DEATH);
        losses.add("b", "of a cold");
        losses.add("c", DEATH);
        assert_eq!(
            losses.to_string(),
            "tries that were lost: 3 (1 because of a cold, 2 because the lab host died)"
        );
        assert_eq!(losses.first_of("b"), Some("of a cold"));
        assert_eq!(losses.first_of("d"), None);
    }

    #[test]
    fn more_than_a_few_are_a_fault_whatever_they_are_due_to() {
        let mut part = Losses::default();
        for _ in 0..6 {
            part.add("guest", "of a cold");
        }
        let mut losses = Losses::default();
        losses.add_all("a", &part);
        assert_eq!(losses.fault(), None);
        losses.add("b", DEATH);
        let fault = losses.fault().unwrap();
        assert!(
            fault.contains("lost: 7 (") && fault.ends_with("6 may be"),
            "{fault}"
        );
    }
}
