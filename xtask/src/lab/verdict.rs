// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest was told to be durable before its host lost power, against what is there afterwards.
//!
//! The reports are `LAB-TOLD <writer> <records>` (the guest's fsync has returned), `LAB-HELD <writer> <records>` (these had
//! been told before a flush by the backend began, and it has ended) and, after the loss, `LAB-FOUND <writer> <records>`.
//! Knows no machine.

use std::collections::BTreeMap;

/// Which records have to outlive a loss of power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// All that the guest was told to be durable (virtio-pmem).
    Told,
    /// Those that the backend had flushed (nvdimm in the page cache).
    Held,
}

/// Records, by the name of their writer.
type Counts = BTreeMap<String, u64>;

/// What was reported so far, before and after the loss.
#[derive(Debug, Default)]
pub struct Records {
    told: Counts,
    held: Counts,
    found: Counts,
    /// `LAB-TOLD` lines that came since what is promised was known.
    acknowledgements: u64,
}

impl Records {
    /// Takes in one line, and returns whether it is an acknowledgement that came when something had been promised already.
    pub fn take(&mut self, line: &str, promise: Promise) -> bool {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [kind, writer, number] = words[..] else {
            return false;
        };
        let counts = match kind {
            "LAB-TOLD" => &mut self.told,
            "LAB-HELD" => &mut self.held,
            "LAB-FOUND" => &mut self.found,
            _ => return false,
        };
        let Ok(number) = number.parse() else {
            return false;
        };
        counts.insert(writer.to_string(), number);
        let counted = kind == "LAB-TOLD" && !self.promised(promise).is_empty();
        self.acknowledgements += u64::from(counted);
        counted
    }

    /// How many acknowledgements came when something had been promised already.
    pub fn acknowledgements(&self) -> u64 {
        self.acknowledgements
    }

    fn promised(&self, promise: Promise) -> &Counts {
        match promise {
            Promise::Told => &self.told,
            Promise::Held => &self.held,
        }
    }

    /// How many records the guest was told to be durable and are not there.
    pub fn lost(&self) -> u64 {
        self.told
            .iter()
            .map(|(writer, told)| told.saturating_sub(count(&self.found, writer)))
            .sum()
    }

    /// Says which promise was broken, if one was.
    pub fn fault(&self, promise: Promise) -> Option<String> {
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
    pub fn summary(&self) -> String {
        let writers = self.told.iter().map(|(writer, told)| {
            let held = self.held.get(writer);
            let held = held.map_or(String::new(), |n| format!(", {n} flushed by the backend"));
            let found = count(&self.found, writer);
            format!("{writer}: {told} acknowledged{held}, {found} there")
        });
        let writers: Vec<String> = writers.collect();
        format!("{}; lost {}", writers.join("; "), self.lost())
    }
}

fn count(counts: &Counts, writer: &str) -> u64 {
    counts.get(writer).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{Promise, Records};

    fn records(lines: &[&str], promise: Promise) -> Records {
        let mut records = Records::default();
        for line in lines {
            records.take(line, promise);
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
    fn a_run_without_a_promise_proves_nothing() {
        let lines = ["LAB-TOLD a 4", "LAB-FOUND a 4", "LAB-TOLD a", "noise"];
        assert!(
            records(&lines, Promise::Held)
                .fault(Promise::Held)
                .is_some()
        );
        assert!(records(&[], Promise::Told).fault(Promise::Told).is_some());
    }
}
