// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel does while a test runs: its trace events (Documentation/trace/events.rst), in a buffer of the test's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

const TRACING: &str = "/sys/kernel/tracing";

/// A buffer with the events that were asked for; removed when dropped.
#[derive(Debug)]
pub struct Trace(PathBuf);

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The thread in which it happened, as `name-id`.
    pub thread: String,
    /// Which event.
    pub name: String,
    /// Its fields.
    pub text: String,
}

impl Trace {
    /// A buffer for those of `events` (as `system/name`) that this kernel has now: a filesystem's come with its module.
    ///
    /// # Panics
    /// If there is no tracefs, or this process may not use it.
    pub fn new(events: &[&str]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let instances = Path::new(TRACING).join("instances");
        let folder = instances.join(format!("pcow-{}-{number}", std::process::id()));
        fs::create_dir(&folder).unwrap_or_else(|e| panic!("no trace events at {TRACING}: {e}"));
        let trace = Self(folder);
        trace.write("tracing_on", "0");
        for event in events {
            let switch = format!("events/{event}/enable");
            if trace.0.join(&switch).exists() {
                trace.write(&switch, "1");
            }
        }
        trace
    }

    /// The events while `work` runs.
    pub fn during(&self, work: impl FnOnce()) -> Vec<Event> {
        self.write("trace", "");
        self.write("tracing_on", "1");
        work();
        self.write("tracing_on", "0");
        let text = fs::read_to_string(self.0.join("trace")).unwrap();
        let (_, lost) = text
            .lines()
            .find_map(|l| l.split_once("entries-in-buffer/entries-written: "))
            .expect("the head of a trace");
        let (kept, written) = lost
            .split_whitespace()
            .next()
            .unwrap()
            .split_once('/')
            .unwrap();
        assert_eq!(kept, written, "events were lost");
        text.lines().filter_map(event).collect()
    }

    fn write(&self, name: &str, value: &str) {
        let path = self.0.join(name);
        fs::write(&path, value).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // Best effort: an instance that stays only takes memory.
        let _ = fs::write(self.0.join("events/enable"), "0");
        let _ = fs::remove_dir(&self.0);
    }
}

impl Event {
    /// Whether it speaks of the file with this inode number.
    pub fn is_about(&self, inode: u64) -> bool {
        let number = self
            .text
            .split_whitespace()
            .skip_while(|w| *w != "ino")
            .nth(1);
        number.is_some_and(|n| match n.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16) == Ok(inode),
            None => n.parse() == Ok(inode),
        })
    }
}

/// `  name-id   [cpu] flags  seconds: event: text`; `None` for the head of a trace.
fn event(line: &str) -> Option<Event> {
    if line.starts_with('#') {
        return None;
    }
    let (thread, rest) = line.split_once('[')?;
    let (_, rest) = rest.split_once(": ")?;
    let (name, text) = rest.split_once(": ")?;
    Some(Event {
        thread: thread.trim().to_owned(),
        name: name.to_owned(),
        text: text.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::event;

    #[test]
    fn a_line_of_a_trace_is_taken_apart() {
        let line = "  jbd2/pmem0-8-112   [001] .....    10.230311: ext4_sync_file_enter: dev 259,0 ino 12 parent 2";
        let found = event(line).unwrap();
        assert_eq!(found.thread, "jbd2/pmem0-8-112");
        assert_eq!(found.name, "ext4_sync_file_enter");
        assert!(found.is_about(12) && !found.is_about(2));
        let hex = event(" a-1 [000] d..1. 1.5: dax_pmd_fault: dev 259:0 ino 0xc shared").unwrap();
        assert!(hex.is_about(12));
        assert_eq!(
            event("# entries-in-buffer/entries-written: 0/0   #P:2"),
            None
        );
    }
}
