// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest was told to be durable before its host lost power, against what is there afterwards.
//!
//! The reports are `LAB-TOLD <writer> <records>` (the guest's fsync has returned), `LAB-HELD <writer> <records>` (these had
//! been told before a flush by the backend began, and it has ended), `LAB-LATE` (the backend said that its flushes do not keep
//! up), `LAB-IN-TIME` (that they do again) and, after the loss, `LAB-FOUND <writer> <records>`.
//! Knows no machine.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Which records have to outlive a loss of power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// All that the guest was told to be durable (virtio-pmem).
    Told,
    /// Those that the backend had flushed when it was asked to (nvdimm in the page cache).
    Held,
    /// Those that are older than this (nvdimm in the page cache, flushed at intervals).
    Older(Duration),
}

/// Records, by the name of their writer.
type Counts = BTreeMap<String, u64>;

/// A `LAB-TOLD` line.
#[derive(Debug)]
struct Told {
    writer: String,
    records: u64,
    /// When it was read: no earlier than the records were stored.
    at: Instant,
}

/// What was reported so far, before and after the loss.
#[derive(Debug, Default)]
pub struct Records {
    told: Vec<Told>,
    held: Counts,
    found: Counts,
    is_late: bool,
    /// `LAB-TOLD` lines that came since what is promised was known.
    acknowledgements: u64,
}

impl Records {
    /// Takes in one line that was read at `at`. The power is lost no earlier than the last acknowledgement is.
    pub fn take(&mut self, line: &str, promise: Promise, at: Instant) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["LAB-LATE"] => self.is_late = true,
            ["LAB-IN-TIME"] => self.is_late = false,
            _ => {}
        }
        let [kind, writer, number] = words[..] else {
            return;
        };
        let (Ok(records), writer) = (number.parse(), writer.to_string()) else {
            return;
        };
        match kind {
            "LAB-TOLD" => {
                self.told.push(Told {
                    writer,
                    records,
                    at,
                });
                self.acknowledgements += u64::from(!self.promised(promise).is_empty());
            }
            "LAB-HELD" => drop(self.held.insert(writer, records)),
            "LAB-FOUND" => drop(self.found.insert(writer, records)),
            _ => {}
        }
    }

    /// How many acknowledgements came when something had been promised already.
    pub fn acknowledgements(&self) -> u64 {
        self.acknowledgements
    }

    fn promised(&self, promise: Promise) -> Counts {
        match promise {
            Promise::Told => self.told_if(|_| true),
            Promise::Held => self.held.clone(),
            Promise::Older(age) => self.told_if(|told| self.age(told) > age),
        }
    }

    fn told_if(&self, is_meant: impl Fn(&Told) -> bool) -> Counts {
        let meant = self.told.iter().filter(|told| is_meant(told));
        meant.map(|t| (t.writer.clone(), t.records)).collect()
    }

    /// How old it was when the last acknowledgement came.
    fn age(&self, told: &Told) -> Duration {
        self.told
            .last()
            .map_or(Duration::ZERO, |last| last.at - told.at)
    }

    /// How many records the guest was told to be durable and are not there.
    pub fn lost(&self) -> u64 {
        self.told_if(|_| true)
            .iter()
            .map(|(writer, told)| told.saturating_sub(count(&self.found, writer)))
            .sum()
    }

    /// The age of the oldest that was lost.
    fn oldest_lost(&self) -> Option<Duration> {
        let mut lost = self
            .told
            .iter()
            .filter(|told| told.records > count(&self.found, &told.writer));
        lost.next().map(|told| self.age(told))
    }

    /// Says which promise was broken, if one was, or that there was none.
    pub fn fault(&self, promise: Promise) -> Option<String> {
        if self.is_late {
            return Some("the backend said that it was late, so nothing was promised".to_string());
        }
        let promised = self.promised(promise);
        if promised.is_empty() {
            return Some("nothing was promised".to_string());
        }
        let broken: Vec<String> = promised
            .iter()
            .filter(|(writer, promised)| count(&self.found, writer) < **promised)
            .map(|(writer, promised)| {
                let found = self.found.get(writer);
                let found = found.map_or("none".to_string(), u64::to_string);
                format!("of {promised} records of {writer} that were promised {found} are there")
            })
            .collect();
        (!broken.is_empty()).then(|| broken.join("; "))
    }

    /// One line for people.
    pub fn summary(&self, promise: Promise) -> String {
        let (all, promised) = (self.told_if(|_| true), self.promised(promise));
        let writers = all.iter().map(|(writer, told)| {
            let promised = count(&promised, writer);
            let found = count(&self.found, writer);
            format!("{writer}: {told} acknowledged, {promised} promised, {found} there")
        });
        let writers: Vec<String> = writers.collect();
        let oldest = self.oldest_lost().map_or(String::new(), |age| {
            format!(", of which the oldest was {:.1} s old", age.as_secs_f32())
        });
        format!("{}; lost {}{oldest}", writers.join("; "), self.lost())
    }
}

fn count(counts: &Counts, writer: &str) -> u64 {
    counts.get(writer).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{Promise, Records};
    use std::time::{Duration, Instant};

    /// The lines come a second after each other.
    fn records(lines: &[&str], promise: Promise) -> Records {
        let mut records = Records::default();
        let mut now = Instant::now();
        for line in lines {
            records.take(line, promise, now);
            now += Duration::from_secs(1);
        }
        records
    }

    #[test]
    fn all_that_was_told_has_to_be_there() {
        let lines = [
            "LAB-TOLD a 1",
            "LAB-TOLD b 7",
            "LAB-TOLD a 2",
            "LAB-FOUND a 3",
            "LAB-FOUND b 7",
        ];
        let good = records(&lines, Promise::Told);
        assert_eq!(good.fault(Promise::Told), None);
        assert_eq!((good.acknowledgements(), good.lost()), (3, 0));
        let one_less = records(&[&lines[..], &["LAB-FOUND b 6"]].concat(), Promise::Told);
        let fault = one_less.fault(Promise::Told).unwrap();
        assert!(fault.contains("of 7 records of b"), "{fault}");
        let none = records(&lines[..4], Promise::Told);
        assert!(none.fault(Promise::Told).unwrap().contains("none are"));
    }

    #[test]
    fn of_what_a_backend_has_flushed_nothing_may_be_missing_and_more_may() {
        let lines = [
            "LAB-TOLD a 4",
            "LAB-HELD a 4",
            "LAB-TOLD a 9",
            "LAB-FOUND a 5",
        ];
        let good = records(&lines, Promise::Held);
        assert_eq!(good.fault(Promise::Held), None);
        assert_eq!((good.acknowledgements(), good.lost()), (1, 4));
        let bad = records(&[&lines[..], &["LAB-FOUND a 3"]].concat(), Promise::Held);
        assert!(bad.fault(Promise::Held).is_some());
    }

    #[test]
    fn what_is_old_enough_has_to_be_there() {
        const PROMISE: Promise = Promise::Older(Duration::from_secs(2));
        let told = [
            "LAB-TOLD a 1",
            "LAB-TOLD a 4",
            "LAB-TOLD a 6",
            "LAB-TOLD a 7",
        ];
        let found = |line| records(&[&told[..], &[line]].concat(), PROMISE);
        let good = found("LAB-FOUND a 1");
        assert_eq!(good.fault(PROMISE), None);
        assert_eq!((good.acknowledgements(), good.lost()), (1, 6));
        let summary = good.summary(PROMISE);
        assert!(summary.contains("the oldest was 2.0 s old"), "{summary}");
        let bad = found("LAB-FOUND a 0").fault(PROMISE).unwrap();
        assert!(bad.contains("of 1 records of a"), "{bad}");
        let late = found("LAB-LATE").fault(PROMISE).unwrap();
        assert!(late.contains("was late"), "{late}");
        let before = [&["LAB-LATE", "LAB-IN-TIME"], &told[..], &["LAB-FOUND a 1"]].concat();
        assert_eq!(records(&before, PROMISE).fault(PROMISE), None);
    }

    #[test]
    fn a_run_without_a_promise_proves_nothing() {
        let lines = ["LAB-TOLD a 4", "LAB-FOUND a 4", "LAB-TOLD a", "noise"];
        for promise in [Promise::Held, Promise::Older(Duration::ZERO)] {
            assert!(records(&lines, promise).fault(promise).is_some());
        }
        assert!(records(&[], Promise::Told).fault(Promise::Told).is_some());
    }
}
