// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask test`: everything that a change must pass, from a fresh machine on.
//!
//! Later stages run even if earlier ones failed, so that one run shows all there is to mend;
//! only what a failed stage was to make keeps those that need it from running.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::arch;
use crate::boot::Boot;
use crate::cache::Cache;
use crate::crash;
use crate::error::{Error, Result};
use crate::failures::Failures;
use crate::guest;
use crate::lab;
use crate::packages::{self, Step};
use crate::qemu;
use crate::run::{self, Log};

/// The package whose tests boot guests.
const END_TO_END: &str = "pcow-tests";

/// Arguments of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Leave out the end-to-end tests, and with them QEMU and the guest
    #[arg(long)]
    no_guest: bool,
    /// Leave out the short form of `cargo xtask lab`, and with it KVM and DAX
    #[arg(long)]
    no_lab: bool,
    /// What `cargo test` is given besides, such as the name of a test
    #[arg(last = true)]
    cargo_arguments: Vec<String>,
}

impl Arguments {
    /// Who names a test wants that one, not the search for crashes.
    fn is_whole(&self) -> bool {
        self.cargo_arguments.is_empty()
    }

    /// The lab host runs the same programs as the end-to-end tests.
    fn with_lab(&self) -> bool {
        !self.no_lab && !self.no_guest
    }
}

/// Runs all stages and prints how long each took.
///
/// # Errors
/// A stage failed: the error names all that did.
pub fn command(cache: &Cache, arguments: &Arguments) -> Result<()> {
    let mut report = Report::default();
    report.cargo("format", &["fmt", "--all", "--check"]);
    let ready = report.run("packages", || install(cache, arguments));
    if ready.is_some() {
        checked_and_tested(cache, arguments, &mut report);
    }
    report.print();
    if arguments.no_guest {
        eprintln!("left out as asked: the end-to-end tests of {END_TO_END}");
    }
    if !arguments.with_lab() {
        eprintln!("left out as asked: what needs KVM and DAX");
    }
    report.result()
}

fn install(cache: &Cache, arguments: &Arguments) -> Result<()> {
    let log = Log::create(&cache.folder("test")?.join("log"))?;
    let steps: &[Step] = if arguments.no_guest {
        &[Step::Test]
    } else {
        &[Step::Test, Step::Qemu, Step::Guest, Step::Lab]
    };
    packages::ensure(steps, &log)
}

fn checked_and_tested(cache: &Cache, arguments: &Arguments, report: &mut Report) {
    let lint = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    report.cargo("lint", &lint);
    // What --all-targets leaves out, because only the lab host can run it.
    let lint_lab = [
        "clippy",
        "--package",
        END_TO_END,
        "--test",
        "dax",
        "--",
        "-D",
        "warnings",
    ];
    report.cargo("lint-lab", &lint_lab);
    if has_rustup() {
        report.run("aarch64", compile_for_aarch64);
    } else {
        eprintln!("rustup is not there, so nothing is compiled for aarch64");
        report.left_out("aarch64");
    }
    let built = report.cargo("build", &["build", "--release", "--bins"]);
    let machine = if arguments.no_guest {
        Some(None)
    } else {
        make_machine(cache, report).map(Some)
    };
    match (built, machine) {
        (Some(()), Some(machine)) => {
            test(arguments, machine.as_ref(), report);
            if arguments.is_whole() {
                report.run("crash", || crash::search(&[]));
            }
            if arguments.with_lab() {
                report.run("lab", || lab::short(cache));
            }
        }
        _ => {
            report.not_run("test");
            if arguments.is_whole() {
                report.not_run("crash");
            }
            if arguments.with_lab() {
                report.not_run("lab");
            }
        }
    }
}

/// Only rustup can fetch the standard library of another architecture.
fn has_rustup() -> bool {
    let mut version = Command::new("rustup");
    version
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    version.status().is_ok_and(|s| s.success())
}

/// Compiles for aarch64 what has code of its own there, its assembly included. Nothing is linked, so no linker for it is needed.
fn compile_for_aarch64() -> Result<()> {
    const TARGET: &str = "aarch64-unknown-linux-gnu";
    let mut add = Command::new("rustup");
    add.args(["target", "add", TARGET]);
    shown(&mut add)?;
    let build = [
        "build",
        "--lib",
        "--target",
        TARGET,
        "-p",
        "pcow-format",
        "-p",
        "pcow-protocol",
    ];
    shown(&mut run::cargo(&build))
}

/// What the end-to-end tests run their guests with.
#[derive(Debug)]
struct Machine {
    qemu: PathBuf,
    guest: Boot,
}

fn make_machine(cache: &Cache, report: &mut Report) -> Option<Machine> {
    let qemu = report.run("qemu", || qemu::build(cache));
    let guest = report.run("guest", || guest::build(cache));
    Some(Machine {
        qemu: qemu?,
        guest: guest?,
    })
}

fn test(arguments: &Arguments, machine: Option<&Machine>, report: &mut Report) {
    let mut command = run::cargo(&["test", "--workspace", "--release", "--no-fail-fast"]);
    match machine {
        Some(machine) => command.envs(machine.variables()),
        None => command.args(["--exclude", END_TO_END]),
    };
    command.args(&arguments.cargo_arguments);
    let mut failures = Failures::default();
    report.run("test", || {
        said(run::echoed(&mut command, |line| failures.line(line))?)
    });
    report.failures = failures.finish();
}

impl Machine {
    /// How the tests find QEMU, its firmware folders (as in `PATH`), the kernel and the initramfs.
    fn variables(&self) -> [(&'static str, OsString); 4] {
        [
            ("PCOW_QEMU", self.qemu.clone().into()),
            (
                "PCOW_QEMU_FIRMWARE",
                arch::FIRMWARE_FOLDERS.join(":").into(),
            ),
            ("PCOW_GUEST_KERNEL", self.guest.kernel.clone().into()),
            ("PCOW_GUEST_INITRD", self.guest.initramfs.clone().into()),
        ]
    }
}

fn shown(command: &mut Command) -> Result<()> {
    said(run::shown(command)?)
}

/// The result of a program that has said by itself what is wrong.
fn said(succeeded: bool) -> Result<()> {
    if succeeded {
        return Ok(());
    }
    Err(Error::Failed("see above".into()))
}

/// How a stage ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    /// What it needs was not made.
    NotRun,
    /// This machine cannot do it, which is no fault of what is tested.
    LeftOut,
}

/// The stages so far.
#[derive(Debug, Default)]
struct Report {
    stages: Vec<(&'static str, Outcome, Duration)>,
    /// What the tests said of their failures, far above.
    failures: String,
}

impl Report {
    /// Runs a stage, and says at once if it fails.
    fn run<T>(&mut self, name: &'static str, stage: impl FnOnce() -> Result<T>) -> Option<T> {
        eprintln!("== {name}");
        let start = Instant::now();
        let result = stage();
        let outcome = match &result {
            Ok(_) => Outcome::Passed,
            Err(error) => {
                crate::report(error);
                Outcome::Failed
            }
        };
        self.stages.push((name, outcome, start.elapsed()));
        result.ok()
    }

    fn cargo(&mut self, name: &'static str, arguments: &[&str]) -> Option<()> {
        self.run(name, || shown(&mut run::cargo(arguments)))
    }

    fn not_run(&mut self, name: &'static str) {
        self.stages.push((name, Outcome::NotRun, Duration::ZERO));
    }

    fn left_out(&mut self, name: &'static str) {
        self.stages.push((name, Outcome::LeftOut, Duration::ZERO));
    }

    fn print(&self) {
        if !self.failures.is_empty() {
            eprintln!("== what failed among the tests\n{}", self.failures);
        }
        eprintln!("== stages");
        for (name, outcome, duration) in &self.stages {
            let outcome = match outcome {
                Outcome::Passed => "passed",
                Outcome::Failed => "FAILED",
                Outcome::NotRun => "NOT RUN",
                Outcome::LeftOut => "left out",
            };
            eprintln!("{name:<10}{outcome:<10}{}", run::seconds(*duration));
        }
    }

    fn result(&self) -> Result<()> {
        let bad: Vec<&str> = self
            .stages
            .iter()
            .filter(|(_, outcome, _)| matches!(outcome, Outcome::Failed | Outcome::NotRun))
            .map(|(name, _, _)| *name)
            .collect();
        if bad.is_empty() {
            return Ok(());
        }
        Err(Error::Failed(bad.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::Report;
    use crate::error::Error;

    #[test]
    fn one_failed_or_omitted_stage_fails_the_whole() {
        let mut report = Report::default();
        assert_eq!(report.run("good", || Ok(1)), Some(1));
        assert!(report.result().is_ok());
        report.run::<()>("bad", || Err(Error::Unusable("no".into())));
        report.not_run("late");
        report.left_out("elsewhere");
        assert_eq!(
            report.result().unwrap_err().to_string(),
            "failed: bad, late"
        );
    }
}
