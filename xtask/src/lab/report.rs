// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the lab host says of its steps, and the judgement of it.
//!
//! Its lines are `LAB-TRY <name>`, `LAB-LOST <name> <how>` of a try of which the emulator lost a guest,
//! `LAB-STEP <name> ok`, `LAB-STEP <name> FAILED`, `LAB-VALUE <what>: <number>` and, at the end,
//! `LAB-RESULT <passed> <failed>`; any other line is none of its reports. Knows no machine.

use super::losses::{DEATH, Losses, remark};

/// Lines of a failed step's log that are shown.
const SHOWN_LINES: usize = 40;

/// What is tried before the first step.
const BOOT: &str = "host/boot";

/// One step that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Its name, without blanks.
    pub name: String,
    /// Whether it did what it should.
    pub passed: bool,
    /// How its first try was lost, if it was.
    pub lost: Option<String>,
}

impl Step {
    /// What came of it.
    pub fn outcome(&self) -> &'static str {
        if self.passed { "ok" } else { "FAILED" }
    }

    /// The end of its line: empty as a rule.
    pub fn remark(&self) -> String {
        remark(self.lost.as_deref())
    }
}

/// Where another lab host goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumption {
    /// The last step that has ended, `""` if none has.
    pub after: String,
    /// The step that has no more than one try left.
    pub tried: String,
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
    /// How many of the steps lab hosts before this one have ended, if this is not the first.
    earlier: usize,
    /// The last step that no earlier lab host has ended.
    reached: String,
    /// The step that is being tried.
    tried: Option<String>,
    losses: Losses,
}

impl Report {
    /// Whether the lab host has not come to its end.
    pub fn is_cut_off(&self) -> bool {
        self.result.is_none()
    }

    /// The lab host has died, and another one goes on as is returned; `None` if there shall be none: the step that was tried
    /// has failed because it was its second try, or too many tries were lost.
    pub fn go_on(&mut self) -> Option<Resumption> {
        let step = self.tried.take().unwrap_or_else(|| BOOT.to_string());
        let first = self.losses.first_of(&step).map(str::to_string);
        self.losses.add(&step, DEATH);
        if first.is_some() {
            self.steps.push(Step {
                name: step,
                passed: false,
                lost: first,
            });
            return None;
        }
        self.earlier = self.steps.len();
        self.losses.fault().is_none().then(|| Resumption {
            after: self.reached.clone(),
            tried: step,
        })
    }

    /// Takes in one line, and returns the step if the line tells how it ended.
    pub fn take(&mut self, line: &str) -> Option<&Step> {
        if let Some(value) = line.strip_prefix("LAB-VALUE ") {
            self.values.extend(Value::parse(value));
            return None;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["LAB-TRY", name] => self.tried = Some(name.to_string()),
            ["LAB-LOST", name, ref how @ ..] => self.losses.add(name, &how.join(" ")),
            ["LAB-STEP", name, outcome @ ("ok" | "FAILED")] => return self.end(name, outcome),
            ["LAB-RESULT", passed, failed] => {
                self.result = passed.parse().ok().zip(failed.parse().ok());
            }
            _ => (),
        }
        None
    }

    fn end(&mut self, name: &str, outcome: &str) -> Option<&Step> {
        // What prepares others is done by each lab host.
        if !self.steps.iter().any(|step| step.name == name) {
            self.reached = name.to_string();
        }
        self.tried = None;
        self.steps.push(Step {
            name: name.to_string(),
            passed: outcome == "ok",
            lost: self.losses.first_of(name).map(str::to_string),
        });
        self.steps.last()
    }

    /// The tries that were lost.
    pub fn losses(&self) -> &Losses {
        &self.losses
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
        let counted = self.steps[self.earlier..]
            .iter()
            .fold((0, 0), |(passed, failed), step| match step.passed {
                true => (passed + 1, failed),
                false => (passed, failed + 1),
            });
        let incomplete = match self.result {
            None => Some(format!("no result came; {}", self.last())),
            Some(result) if result != counted => Some(format!(
                "reports were lost: {counted:?} came of {result:?} that passed and failed"
            )),
            Some((0, 0)) => Some("no step was run".to_string()),
            Some(_) => None,
        };
        let failed = (!failed.is_empty()).then(|| format!("failed: {}", failed.join(", ")));
        let lost = self.losses.fault();
        let faults: Vec<String> = failed.into_iter().chain(lost).chain(incomplete).collect();
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
    use super::{Report, Resumption, tail_of};

    fn fault(lines: &[&str]) -> Option<String> {
        report(lines).fault()
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

    fn report(lines: &[&str]) -> Report {
        let mut report = Report::default();
        take(&mut report, lines);
        report
    }

    fn take(report: &mut Report, lines: &[&str]) {
        for line in lines {
            report.take(line);
        }
    }

    /// The resumption's `after` and `tried`.
    fn go_on(report: &mut Report) -> Option<(String, String)> {
        let Resumption { after, tried } = report.go_on()?;
        Some((after, tried))
    }

    fn places(after: &str, tried: &str) -> Option<(String, String)> {
        Some((after.to_string(), tried.to_string()))
    }

    const RESET: &str = "LAB-LOST a the emulator lost the guest";

    #[test]
    fn a_second_try_is_told_with_its_reason_and_counted() {
        let mut report = report(&["LAB-TRY a", RESET, "LAB-TRY a"]);
        let step = report.take("LAB-STEP a ok").unwrap();
        assert_eq!(
            (step.outcome(), &*step.remark()),
            ("ok", " (second try: the emulator lost the guest)")
        );
        let step = report.take("LAB-STEP b ok").unwrap();
        assert_eq!(step.remark(), "");
        report.take("LAB-RESULT 2 0");
        assert_eq!(report.fault(), None);
        let losses = report.losses().to_string();
        assert_eq!(
            losses,
            "tries that were lost: 1 (1 because the emulator lost the guest)"
        );
    }

    #[test]
    fn a_step_whose_second_try_is_lost_has_failed() {
        let lines = [
            "LAB-TRY a",
            RESET,
            "LAB-TRY a",
            RESET,
            "LAB-STEP a FAILED",
            "LAB-RESULT 0 1",
        ];
        assert_eq!(fault(&lines).unwrap(), "failed: a");
    }

    #[test]
    fn another_lab_host_goes_on_where_one_died_but_not_twice_at_one_step() {
        let mut report = report(&["LAB-STEP mount ok", "LAB-STEP a ok", "LAB-TRY b"]);
        assert!(report.is_cut_off());
        assert_eq!(go_on(&mut report), places("a", "b"));
        take(&mut report, &["LAB-STEP mount ok", "LAB-TRY b"]);
        let step = report.take("LAB-STEP b FAILED").unwrap();
        assert_eq!(step.remark(), " (second try: the lab host died)");
        take(&mut report, &["LAB-TRY c"]);
        assert_eq!(go_on(&mut report), places("b", "c"));
        take(&mut report, &["LAB-STEP mount ok", "LAB-TRY c"]);
        assert_eq!(go_on(&mut report), None);
        let fault = report.fault().unwrap();
        assert!(fault.starts_with("failed: b, c; no result"), "{fault}");
    }

    #[test]
    fn a_lab_host_that_does_not_come_up_is_started_twice() {
        let mut report = Report::default();
        assert_eq!(go_on(&mut report), places("", "host/boot"));
        assert_eq!(go_on(&mut report), None);
        assert!(report.fault().unwrap().starts_with("failed: host/boot"));
    }

    /// A guest was lost in the first try, and the lab host dies in the second one, or the other way round.
    #[test]
    fn two_tries_are_all_whatever_they_were_lost_to() {
        let mut guest_first = report(&["LAB-TRY a", RESET, "LAB-TRY a"]);
        assert_eq!(go_on(&mut guest_first), None);
        assert!(guest_first.fault().unwrap().starts_with("failed: a"));
        let mut host_first = report(&["LAB-TRY a"]);
        assert_eq!(go_on(&mut host_first), places("", "a"));
        // The lab host was told that there is no other try.
        let rest = ["LAB-TRY a", RESET, "LAB-STEP a FAILED", "LAB-RESULT 0 1"];
        take(&mut host_first, &rest);
        assert_eq!(host_first.fault().unwrap(), "failed: a");
        assert_eq!(
            host_first.losses().to_string(),
            "tries that were lost: 2 (1 because the emulator lost the guest, 1 because the lab host died)"
        );
    }

    #[test]
    fn what_a_later_lab_host_passes_does_not_make_up_for_what_failed_before() {
        let mut report = report(&["LAB-STEP a FAILED", "LAB-TRY b"]);
        assert_eq!(go_on(&mut report), places("a", "b"));
        take(&mut report, &["LAB-STEP b ok", "LAB-RESULT 1 0"]);
        assert!(!report.is_cut_off());
        assert_eq!(report.fault().unwrap(), "failed: a");
    }

    #[test]
    fn a_run_that_loses_too_many_tries_fails_and_says_so() {
        let mut report = Report::default();
        for step in ["a", "b", "c", "d", "e", "f"] {
            take(
                &mut report,
                &[
                    &format!("LAB-LOST {step} of a cold"),
                    &format!("LAB-STEP {step} ok"),
                ],
            );
        }
        report.take("LAB-RESULT 6 0");
        assert_eq!(report.fault(), None);
        report.take("LAB-LOST g of a cold");
        assert_eq!(
            report.fault().unwrap(),
            "tries that were lost: 7 (7 because of a cold), and 6 may be"
        );
        // Nor is there another lab host.
        report.take("LAB-TRY h");
        assert_eq!(go_on(&mut report), None);
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
