// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the lab host says of its steps, and the judgement of it.
//!
//! Its lines are `LAB-STEP <name> ok`, `LAB-STEP <name> FAILED`, `LAB-VALUE <what>: <number>` and, at
//! the end, `LAB-RESULT <passed> <failed>`; any other line is none of its reports. Knows no machine.

/// Lines of a failed step's log that are shown.
const SHOWN_LINES: usize = 40;

/// One step that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Its name, without blanks.
    pub name: String,
    /// Whether it did what it should.
    pub passed: bool,
}

impl Step {
    /// What came of it.
    pub fn outcome(&self) -> &'static str {
        if self.passed { "ok" } else { "FAILED" }
    }
}

/// Something that was measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// What.
    pub name: String,
    /// How much.
    pub number: String,
}

impl Value {
    /// Reads `<what>: <number>`.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, number) = text.trim().rsplit_once(": ")?;
        number.parse::<f64>().ok()?;
        Some(Self {
            name: name.to_string(),
            number: number.to_string(),
        })
    }
}

/// What was reported so far.
#[derive(Debug, Default)]
pub struct Report {
    steps: Vec<Step>,
    values: Vec<Value>,
    result: Option<(usize, usize)>,
}

impl Report {
    /// Takes in one line, and returns the step if the line tells how it ended.
    pub fn take(&mut self, line: &str) -> Option<&Step> {
        if let Some(value) = line.strip_prefix("LAB-VALUE ") {
            self.values.extend(Value::parse(value));
            return None;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["LAB-STEP", name, outcome @ ("ok" | "FAILED")] => {
                self.steps.push(Step {
                    name: name.to_string(),
                    passed: outcome == "ok",
                });
                self.steps.last()
            }
            ["LAB-RESULT", passed, failed] => {
                self.result = passed.parse().ok().zip(failed.parse().ok());
                None
            }
            _ => None,
        }
    }

    /// What was measured.
    pub fn into_values(self) -> Vec<Value> {
        self.values
    }

    /// The steps that failed.
    pub fn failed(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(|step| !step.passed)
    }

    /// Says what is wrong, if anything is.
    pub fn fault(&self) -> Option<String> {
        let failed: Vec<&str> = self.failed().map(|step| step.name.as_str()).collect();
        let counted = (self.steps.len() - failed.len(), failed.len());
        let incomplete = match self.result {
            None => Some(format!("no result came; {}", self.last())),
            Some(result) if result != counted => Some(format!(
                "reports were lost: {counted:?} came of {result:?} that passed and failed"
            )),
            Some((0, 0)) => Some("no step was run".to_string()),
            Some(_) => None,
        };
        let failed = (!failed.is_empty()).then(|| format!("failed: {}", failed.join(", ")));
        let faults: Vec<String> = failed.into_iter().chain(incomplete).collect();
        (!faults.is_empty()).then(|| faults.join("; "))
    }

    fn last(&self) -> String {
        match self.steps.last() {
            Some(step) => format!("the last step that ended is {}", step.name),
            None => "no step has ended".to_string(),
        }
    }
}

/// The last lines that the log of the whole run, `log`, has of the step `name`; of a step that it
/// does not have, the last lines of all.
pub fn tail_of(name: &str, log: &str) -> String {
    let head = format!("== {name}");
    let lines: Vec<&str> = log.lines().map(str::trim_end).collect();
    let start = lines.iter().position(|line| *line == head).unwrap_or(0);
    let step = &lines[start..];
    let length = step
        .iter()
        .position(|line| line.starts_with(&format!("LAB-STEP {name} ")))
        .map_or(step.len(), |last| last + 1);
    let first = length.saturating_sub(SHOWN_LINES);
    let shown: Vec<String> = step[first..length]
        .iter()
        .map(|l| format!("  {l}"))
        .collect();
    shown.join("\n")
}

#[cfg(test)]
mod tests {
    use super::{Report, tail_of};

    fn fault(lines: &[&str]) -> Option<String> {
        let mut report = Report::default();
        for line in lines {
            report.take(line);
        }
        report.fault()
    }

    #[test]
    fn only_a_complete_report_without_failures_is_good() {
        let good = ["noise", "LAB-STEP a ok", "LAB-STEP b ok", "LAB-RESULT 2 0"];
        assert_eq!(fault(&good), None);
        assert!(fault(&good[..3]).unwrap().contains("is b"));
        assert!(fault(&[]).unwrap().contains("no step has ended"));
        assert!(fault(&["LAB-RESULT 0 0"]).unwrap().contains("no step"));
        let lost = ["LAB-STEP b ok", "LAB-RESULT 2 0"];
        assert!(fault(&lost).unwrap().contains("lost"));
        let unreadable = ["LAB-STEP b ok", "LAB-RESULT 1 x"];
        assert!(fault(&unreadable).unwrap().contains("no result"));
    }

    #[test]
    fn a_failed_step_is_named_whether_the_result_came_or_not() {
        let lines = ["LAB-STEP a FAILED", "LAB-STEP b ok", "LAB-RESULT 1 1"];
        assert_eq!(fault(&lines).unwrap(), "failed: a");
        let cut = fault(&lines[..1]).unwrap();
        assert!(cut.starts_with("failed: a; no result came"), "{cut}");
    }

    #[test]
    fn values_are_names_with_a_number() {
        let mut report = Report::default();
        for line in ["LAB-VALUE a, b: 1.25", "LAB-VALUE c: none", "d: 2"] {
            assert_eq!(report.take(line), None);
        }
        let values = report.into_values();
        assert_eq!(values.len(), 1);
        assert_eq!((&*values[0].name, &*values[0].number), ("a, b", "1.25"));
    }

    #[test]
    fn the_tail_of_a_step_has_nothing_of_its_neighbours() {
        let log = "boot\n== a\none\nLAB-STEP a ok\n== b\r\ntwo\r\nLAB-STEP b FAILED\r\n== c\n";
        assert_eq!(tail_of("b", log), "  == b\n  two\n  LAB-STEP b FAILED");
        assert!(tail_of("none", log).ends_with("  == c"));
    }
}
