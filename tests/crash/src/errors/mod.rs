// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every call of every operation fails: once and for ever, with each error that it may have, and short reads and writes.
//!
//! Whatever happens there is no panic; an error says what failed and why; the disk shows what it must, through the same
//! image and through the next one; `check` finds nothing; a failed flush stays (I7); and the operation can be done again.

mod receiving;
mod scenarios;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use pcow_format::medium::Directory;
use pcow_format::medium::faulty::{Call, Failure, Faults, Plan};
use pcow_format::{ErrorKind, FLUSH_FAILED_FILE, Image};

use crate::setting::{chain_text, text};
use pcow_format::medium::{Access, Domain, Site};
pub use scenarios::{SCENARIOS, Scenario};
use world::Start;
pub use world::{Medium, World};

/// The ways in which a call fails.
pub const FAILURES: [(&str, Failure); 6] = [
    ("EIO", Failure::Error(libc::EIO)),
    ("ENOSPC", Failure::Error(libc::ENOSPC)),
    ("ENOMEM", Failure::Error(libc::ENOMEM)),
    ("EINTR", Failure::Error(libc::EINTR)),
    ("short", Failure::Short),
    ("write-back before it", Failure::WriteBack),
];

/// Only in the page cache does the system write back by itself, and on the machine it cannot be made to fail.
fn can_fail(medium: Medium, failure: Failure, lasting: bool) -> bool {
    failure != Failure::WriteBack || medium == Medium::Sim(Domain::PageCache) && !lasting
}

/// What an operation does when a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It fails with an error.
    Refused,
    /// It goes on: the call was not needed.
    Tolerated,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refused => "refused",
            Self::Tolerated => "tolerated",
        })
    }
}

/// Calls of one kind in one operation, and what came of their failures.
pub type Cases = BTreeMap<(&'static str, Call), BTreeMap<Outcome, u64>>;

/// Fails every call of every operation on `medium`.
///
/// # Errors
/// The first case that was not handled.
pub fn fail_all(medium: Medium) -> Result<Cases, String> {
    let mut cases = Cases::new();
    let start = World::new(medium, &Faults::default(), None)?.start();
    for scenario in SCENARIOS {
        let whole = attempt(medium, &start, scenario, None);
        let calls = whole.map_err(|e| format!("{}: {e}", scenario.name))?.0;
        for (number, call) in calls.iter().enumerate() {
            // Each attempt on the machine builds the images anew: the first call of a kind stands for the others.
            let first = calls.iter().position(|c| c == call) == Some(number);
            if medium == Medium::Real && !first {
                continue;
            }
            for (name, failure) in FAILURES {
                for lasting in [false, true] {
                    if !can_fail(medium, failure, lasting) {
                        continue;
                    }
                    let plan = Plan {
                        number,
                        failure,
                        lasting,
                    };
                    let tried = attempt(medium, &start, scenario, Some(plan));
                    let (_, outcome) = tried.map_err(|e| {
                        let for_ever = if lasting { "from then on" } else { "once" };
                        format!("{medium:?}, {}, call {number} ({call}) fails with {name} {for_ever}: {e}", scenario.name)
                    })?;
                    let case = cases.entry((scenario.name, call.clone())).or_default();
                    if let Some(outcome) = outcome {
                        *case.entry(outcome).or_default() += 1;
                    }
                }
            }
        }
    }
    Ok(cases)
}

/// Runs a scenario with a call failing, and looks at what is left. Returns the calls, and the outcome if one failed.
fn attempt(
    medium: Medium,
    start: &Start,
    scenario: &Scenario,
    plan: Option<Plan>,
) -> Result<(Vec<Call>, Option<Outcome>), String> {
    let faults = Faults::default();
    let mut world = World::new(medium, &faults, Some(start))?;
    (scenario.prepare)(&mut world).map_err(text)?;
    world.close_for(scenario);
    faults.begin(plan);
    let done = catch_unwind(AssertUnwindSafe(|| (scenario.run)(&mut world)));
    let (calls, fired) = faults.end();
    let result = done.map_err(|_| "a panic".to_owned())?;
    let outcome = match (&result, fired) {
        (Err(e), false) => return Err(format!("fails by itself: {e}")),
        (Err(e), true) => {
            check_error(e, plan)?;
            Some(Outcome::Refused)
        }
        (Ok(()), true) => Some(Outcome::Tolerated),
        (Ok(()), false) => None,
    };
    let failed_flush = matches!(&result, Err(e) if e.kind() == ErrorKind::FlushFailed);
    if let Err(e) = &result {
        check_taken_back(&world, scenario.makes, e)?;
    }
    let unreported = faults.unreported();
    let failed_flush = failed_flush || world.lost_bytes(&unreported)?;
    let again = scenario.again && result.is_err() && unreported.is_empty();
    check_left(&mut world, scenario, again, failed_flush)?;
    Ok((calls, outcome))
}

/// An error says what could not be done, and the cause that the system gave.
fn check_error(error: &pcow_format::Error, plan: Option<Plan>) -> Result<(), String> {
    let whole = chain_text(error);
    let code = match plan.map(|p| p.failure) {
        Some(Failure::Error(code)) => code,
        Some(Failure::WriteBack) => libc::EIO,
        Some(Failure::Short) | None => return Ok(()),
    };
    let cause = std::io::Error::from_raw_os_error(code).to_string();
    let cause = cause.split(" (").next().unwrap_or(&cause);
    let Some(what) = whole.find(cause) else {
        return Err(format!("an error without its cause, '{cause}': {whole}"));
    };
    let said = whole[..what].split_whitespace();
    if said.count() < 3 {
        return Err(format!("an error that says only its cause: {whole}"));
    }
    Ok(())
}

/// A creation that failed leaves nothing under the name, or says that it does.
fn check_taken_back(
    world: &World,
    made: Option<&str>,
    error: &pcow_format::Error,
) -> Result<(), String> {
    let names = world.plain.names().map_err(|e| e.to_string())?;
    let left = made.is_some_and(|image| names.iter().any(|n| n == image));
    if left && !error.to_string().contains("could not be removed") {
        return Err("a failed creation leaves an image and does not say so".to_owned());
    }
    Ok(())
}

fn check_left(
    world: &mut World,
    scenario: &Scenario,
    again: bool,
    failed_flush: bool,
) -> Result<(), String> {
    let marked = world.marked()?;
    // A creation that fails has removed the image, with the mark in it; a reception begins with one.
    let may_be_removed = scenario.makes.is_some() || world.stream.is_some();
    if failed_flush && marked.is_empty() && !may_be_removed {
        return Err("a failed flush leaves no mark".to_owned());
    }
    // The flush that failed may have been of a base that was to be sealed.
    let failed_flush = marked.iter().any(|name| name == world::IMAGE);
    if world.image.is_some() {
        world.settle_change()?;
        let image = world.image();
        check_disk(
            |at, buf| image.read(at, buf),
            &world.expected,
            "the same image",
        )?;
        if failed_flush && image.flush().is_ok() {
            return Err("a flush after one that failed succeeds".to_owned());
        }
        world.go_on()?;
        let image = world.image();
        check_disk(|at, buf| image.read(at, buf), &world.expected, "used on")?;
        if !failed_flush {
            image.flush().map_err(|e| format!("used on: {}", text(e)))?;
        }
        if marked.is_empty() {
            world.check_after_cut()?;
        }
        world.image = None;
    }
    world.remove_marks(&marked)?;
    if failed_flush {
        world.accept_what_was_given_up()?;
    }
    world.check_images("afterwards")?;
    if again {
        world
            .reopen(scenario)
            .map_err(|e| format!("to do it again: {e}"))?;
        let done = (scenario.run)(world);
        done.map_err(|e| format!("done again: {}", text(e)))?;
        world.image = None;
        world.check_images("after it was done again")?;
    }
    Ok(())
}

/// Each byte is one of two.
fn check_either(found: &[u8], old: &[u8], new: &[u8]) -> Result<(), String> {
    let mut bytes = found.iter().zip(old).zip(new);
    match bytes.position(|((found, old), new)| found != old && found != new) {
        None => Ok(()),
        Some(at) => Err(format!(
            "byte {at} is neither what it was nor what was written"
        )),
    }
}

/// Compares what `read` gives with what must be shown.
fn check_disk(
    read: impl Fn(u64, &mut [u8]) -> pcow_format::Result<()>,
    expected: &[u8],
    what: &str,
) -> Result<(), String> {
    let mut found = [0; HEAD_BYTES];
    for (number, cluster) in (0..).zip(expected.chunks(world::CLUSTER_LEN)) {
        let offset = number * world::CLUSTER;
        read(offset, &mut found).map_err(|e| format!("{what}: {}", text(e)))?;
        if found != cluster[..HEAD_BYTES] {
            return Err(format!("{what} shows other bytes in cluster {number}"));
        }
    }
    Ok(())
}

/// Bytes of each cluster that are compared: those that are stored to, and some behind them.
const HEAD_BYTES: usize = 8192;

impl World {
    /// The images of which a flush has failed.
    fn marked(&self) -> Result<Vec<String>, String> {
        let mut names = self.plain.names().map_err(|e| e.to_string())?;
        names.retain(|name| {
            let dir = self.plain.open_dir(name);
            dir.is_ok_and(|d| d.open(FLUSH_FAILED_FILE, Access::Read).is_ok())
        });
        Ok(names)
    }

    /// Whether write-back of the open image has failed and no sync has said so yet: then the next flush does.
    fn lost_bytes(&self, unreported: &BTreeSet<String>) -> Result<bool, String> {
        let Some(image) = &self.image else {
            return Ok(false);
        };
        let layer = image.root().active.to_string();
        if !unreported.iter().any(|name| name.starts_with(&layer)) {
            return Ok(false);
        }
        match image.flush() {
            Ok(()) => Err("a flush says nothing of write-back that failed before".to_owned()),
            Err(_) => Ok(true),
        }
    }

    /// Removes the marks, as somebody does who has checked the medium.
    fn remove_marks(&self, names: &[String]) -> Result<(), String> {
        for name in names {
            let dir = self.plain.open_dir(name).map_err(|e| e.to_string())?;
            let removed = dir.unlink(Site("user.unlink"), FLUSH_FAILED_FILE);
            removed.map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// After a failed flush a cluster shows what was stored last, or what was durable (M14).
    fn accept_what_was_given_up(&mut self) -> Result<(), String> {
        let dir = self.plain.open_dir(world::IMAGE);
        let dir = dir.map_err(|e| e.to_string())?;
        let image = Image::load(dir, self.environment(false)).map_err(text)?;
        let mut found = [0; HEAD_BYTES];
        let clusters = self.expected.chunks_mut(world::CLUSTER_LEN);
        let pairs = clusters.zip(self.durable.chunks(world::CLUSTER_LEN));
        for (number, (expected, durable)) in (0..).zip(pairs) {
            let read = image.read(number * world::CLUSTER, &mut found);
            read.map_err(text)?;
            if found == durable[..HEAD_BYTES] {
                expected.copy_from_slice(durable);
            }
        }
        Ok(())
    }

    /// Whatever failed before, what is flushed now is there when the power goes. On the machine it cannot go.
    fn check_after_cut(&mut self) -> Result<(), String> {
        let Some(cut) = self.cut_power() else {
            return Ok(());
        };
        let plain = std::mem::replace(&mut self.plain, cut.top());
        self.boot += 1;
        let checked = self.check_image(world::IMAGE, "used on, after a power cut");
        self.boot -= 1;
        self.plain = plain;
        checked
    }

    fn check_images(&self, when: &str) -> Result<(), String> {
        for name in self.plain.names().map_err(|e| e.to_string())? {
            if name.ends_with(".part") || name == world::RAW {
                continue;
            }
            self.check_image(&name, when)?;
        }
        Ok(())
    }

    fn check_image(&self, name: &str, when: &str) -> Result<(), String> {
        let dir: Arc<dyn Directory> = self.plain.open_dir(name).map_err(|e| e.to_string())?;
        let image = Image::load(dir, self.environment(false));
        let image = image.map_err(|e| format!("{when}, {name}: {}", text(e)))?;
        let what = format!("{when}, {name}");
        check_disk(|at, buf| image.read(at, buf), &self.shown_by(name), &what)?;
        drop(image);
        let checked = self.check_structure(name);
        checked.map_err(|e| format!("{when}, {e}"))
    }
}
