// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an operation may leave one of whose system calls failed.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use pcow_format::check::Report;
use pcow_tests::tracer::{Call, Failure, Fault};

use crate::operations::{Effect, Operation};
use crate::world::{BLOCK_BYTES, Run, Shown, World};

/// What came of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// The operation failed with an error.
    Refused,
    /// It went on.
    Tolerated,
    /// It was killed.
    Killed,
    /// The call did not come.
    Missed,
}

/// An operation, and what it does when nothing fails.
pub struct Whole<'a> {
    pub operation: &'a Operation,
    pub calls: Vec<Call>,
    stdout: Vec<u8>,
    old: Shown,
    new: Shown,
}

impl<'a> Whole<'a> {
    /// Does it once.
    pub fn new(start: &Path, operation: &'a Operation) -> Result<Self, String> {
        let world = World::new(start, operation);
        let old = world.shown()?;
        let run = world.run(operation, None);
        if !ended_well(operation, &run) {
            return Err(format!(
                "fails by itself: {}: {}",
                run.traced.status, run.stderr
            ));
        }
        let new = world.shown()?;
        if (operation.effect == Effect::Shows) != (old == new && !run.stdout.is_empty()) {
            // An operation may also change what does not show.
            let quiet = ["check", "flush", "compact", "rebase", "receive --abort"];
            if !quiet.iter().any(|word| operation.line.starts_with(word)) {
                return Err("does not do what it is there for".to_owned());
            }
        }
        Ok(Self {
            operation,
            calls: run.traced.calls,
            stdout: run.stdout,
            old,
            new,
        })
    }

    /// Does it with a fault, and looks at what is left.
    pub fn attempt(&self, start: &Path, fault: Fault) -> Result<Outcome, String> {
        let world = World::new(start, self.operation);
        let run = world.run(self.operation, Some(fault));
        let outcome = self.judge_end(&run, fault)?;
        let done = matches!(outcome, Outcome::Tolerated | Outcome::Missed);
        if done && self.operation.effect == Effect::Shows && !self.has_shown(&run) {
            let printed = String::from_utf8_lossy(&run.stdout);
            return Err(format!(
                "says that it is done, and prints something else: {printed}"
            ));
        }
        self.judge_images(&world, &run, fault)
            .and_then(|()| self.judge_shown(&world, done))
            .map_err(|e| format!("{e}\n{}\n{}", run.traced.status, run.stderr))?;
        Ok(outcome)
    }

    /// What it printed is what it prints; `info` and `list` show the rest if something cannot be looked at, and say so.
    fn has_shown(&self, run: &Run) -> bool {
        let printed = String::from_utf8_lossy(&run.stdout);
        let tells = ["(os error ", "cannot be read"];
        let may_tell = ["info", "list"];
        let starts = |word: &&str| self.operation.line.starts_with(word);
        run.stdout == self.stdout
            || may_tell.iter().any(starts) && tells.iter().any(|t| printed.contains(t))
    }

    fn judge_end(&self, run: &Run, fault: Fault) -> Result<Outcome, String> {
        let (status, stderr) = (run.traced.status, &run.stderr);
        let said = || format!("{status}: {stderr}");
        if stderr.contains("panicked") || status.code() == Some(101) {
            return Err(format!("a panic: {}", said()));
        }
        if run.traced.failed.is_empty() {
            return if ended_well(self.operation, run) {
                Ok(Outcome::Missed)
            } else {
                Err(format!("fails by itself: {}", said()))
            };
        }
        if fault.failure == Failure::Kill {
            return Ok(Outcome::Killed);
        }
        if let Some(signal) = status.signal() {
            return Err(format!("ended by signal {signal}: {}", said()));
        }
        if ended_well(self.operation, run) {
            return Ok(Outcome::Tolerated);
        }
        let refused = self.operation.codes_of_failure();
        if !status.code().is_some_and(|code| refused.contains(&code)) {
            return Err(format!("another exit code than {refused:?}: {}", said()));
        }
        if must_be_survived(fault) {
            return Err(format!("does not go on: {}", said()));
        }
        self.judge_error(run, fault)?;
        Ok(Outcome::Refused)
    }

    /// It says what failed and why, in one line; a check says it where it says what it found.
    fn judge_error(&self, run: &Run, fault: Fault) -> Result<(), String> {
        let Failure::Error(number) = fault.failure else {
            return Ok(());
        };
        let mut text = run.stderr.clone();
        if self.operation.line.starts_with("check") {
            text.push_str(&String::from_utf8_lossy(&run.stdout));
        } else if !text
            .lines()
            .any(|line| line.starts_with("pcow-img: cannot"))
        {
            return Err(format!("does not say what failed: {text}"));
        }
        if text.contains(&format!("(os error {number})")) {
            return Ok(());
        }
        Err(format!("does not say why: {text}"))
    }

    fn judge_images(&self, world: &World, run: &Run, fault: Fault) -> Result<(), String> {
        for image in world.marked() {
            world.mend(&image)?;
        }
        // What cannot be removed stays, and what is killed removes nothing. After a root that may not be durable both what the
        // old one names stays and what the new one does.
        let may_leave = fault.failure == Failure::Kill
            || fault.lasting
            || removes(&run.traced.failed)
            || fault.name == "fsync" && run.stderr.contains("cannot replace image.json");
        let leftovers = world.leftovers();
        // What could not be removed is named.
        let expected = |name: &String| name.ends_with(".receive.part") || run.stderr.contains(name);
        if !may_leave && !leftovers.iter().all(expected) {
            return Err(format!("leaves {leftovers:?}"));
        }
        for (image, report) in world.check()? {
            clean(&image, &report)?;
            // Storage that was made ready for a cluster is there for the next store to it.
            let is_ready = |leak: &String| leak.contains("outside of data clusters");
            if report.leaks.is_empty() || image == "littered" {
                continue;
            }
            if !may_leave && !report.leaks.iter().all(is_ready) {
                return Err(format!("{image}: leaks: {:?}", report.leaks));
            }
            world.mend(&image)?;
        }
        Ok(())
    }

    fn judge_shown(&self, world: &World, done: bool) -> Result<(), String> {
        let shown = world.shown()?;
        if shown == self.new {
            return Ok(());
        }
        if done {
            return Err(format!(
                "says that it is done, and is not: {}",
                difference(&shown, &self.new)
            ));
        }
        if self.operation.effect == Effect::Writes {
            // What is written over a file begins with zeros.
            let zeros = self.operation.line.starts_with("convert");
            either(&shown, &self.old, &self.new, zeros)?;
        } else if !each_as_a_whole(&shown, &self.old, &self.new) {
            return Err(format!(
                "is neither undone: {}; nor done: {}",
                difference(&shown, &self.old),
                difference(&shown, &self.new)
            ));
        }
        self.again(world)
    }

    /// Nothing fails any more.
    fn again(&self, world: &World) -> Result<(), String> {
        let run = world.run(self.operation, None);
        if !ended_well(self.operation, &run) {
            return Err(format!("fails again: {}", run.stderr));
        }
        let shown = world.shown()?;
        if shown != self.new {
            return Err(format!("done again: {}", difference(&shown, &self.new)));
        }
        Ok(())
    }
}

/// The disks that are compared differ.
fn ended_well(operation: &Operation, run: &Run) -> bool {
    let code = run.traced.status.code();
    if operation.line.starts_with("compare") {
        return code == Some(1);
    }
    code == Some(0)
}

/// What every program meets on a machine that works: a call that did less than it was asked for, and one interruption.
pub fn must_be_survived(fault: Fault) -> bool {
    let interrupted = fault.failure == Failure::Error(libc::EINTR);
    let may_be_interrupted = [
        "read",
        "pread64",
        "write",
        "pwrite64",
        "pwritev2",
        "copy_file_range",
        "openat",
        "openat2",
        "fallocate",
        "ftruncate",
        "fsync",
        "fdatasync",
    ];
    fault.failure == Failure::Short
        || interrupted && !fault.lasting && may_be_interrupted.contains(&fault.name)
}

fn removes(failed: &[Call]) -> bool {
    let names = ["unlink", "unlinkat", "rmdir"];
    failed.iter().any(|call| names.contains(&call.name))
}

fn clean(image: &str, report: &Report) -> Result<(), String> {
    let found = [&report.corruptions[..], &report.unchecked].concat();
    if found.is_empty() {
        return Ok(());
    }
    Err(format!("{image}: check: {}", found.join("; ")))
}

fn difference(found: &Shown, expected: &Shown) -> String {
    let mut texts = Vec::new();
    for (name, bytes) in expected {
        match found.get(name) {
            None => texts.push(format!("{name} is not there")),
            Some(found) if found == bytes => {}
            Some(found) => {
                let at = found.iter().zip(bytes).position(|(a, b)| a != b);
                texts.push(format!(
                    "{name} is another from block {at:?} on ({} blocks, not {})",
                    found.len(),
                    bytes.len()
                ));
            }
        }
    }
    let more = found.keys().filter(|name| !expected.contains_key(*name));
    texts.extend(more.map(|name| format!("{name} should not be there")));
    texts.join(", ")
}

/// Each image and each file is what it was or what it is to be: of two that are changed the first may be done.
fn each_as_a_whole(found: &Shown, old: &Shown, new: &Shown) -> bool {
    let of = |shown: &Shown, image: &str| {
        let is_of = |name: &&String| name.split('@').next() == Some(image);
        let mut shown = shown.clone();
        shown.retain(|name, _| is_of(&name));
        shown
    };
    let names = found.keys().chain(old.keys());
    let mut images = names.filter_map(|name| name.split('@').next());
    images.all(|image| {
        let found = of(found, image);
        found == of(old, image) || found == of(new, image)
    })
}

/// Each block is old or new.
fn either(found: &Shown, old: &Shown, new: &Shown, zeros: bool) -> Result<(), String> {
    let zero = zeros.then(|| crc32c::crc32c(&[0; BLOCK_BYTES]));
    for (name, bytes) in found {
        let (Some(old), Some(new)) = (old.get(name), new.get(name)) else {
            return Err(format!("{name} should not be there"));
        };
        let mut each = bytes.iter().zip(old).zip(new);
        let wrong = each.position(|((found, old), new)| {
            ![Some(*old), Some(*new), zero].contains(&Some(*found))
        });
        if let Some(at) = wrong {
            return Err(format!("block {at} of {name} is neither old nor new"));
        }
    }
    Ok(())
}
