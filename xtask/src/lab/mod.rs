// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask lab`: runs the whole production stack where it is meant to run, on any machine.
//!
//! QEMU without KVM emulates AMD's SVM with nested paging and an NVDIMM, so that its guest, the
//! *lab host*, has the real kvm_amd and real DAX filesystems. There the tests run, and the patched
//! QEMU boots a guest of its own under KVM.

mod contents;
mod machine;
mod power;
mod programs;
mod report;
mod verdict;

use std::fs;
use std::path::Path;
use std::time::Instant;

use clap::ValueEnum;

use crate::boot::Recipe;
use crate::cache::{self, Cache};
use crate::error::{Error, Result};
use crate::guest;
use crate::modules::{module, optional};
use crate::packages::{self, Step};
use crate::qemu;
use crate::run::{self, Log};

use contents::Contents;
use machine::Machine;
use report::{Report, tail_of};

pub use report::Value;

/// Arguments of `cargo xtask lab`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The Debian release whose kernel the lab host runs [default: both; bookworm with --short and --shell]
    #[arg(long, value_enum)]
    kernel: Option<Kernel>,
    /// Run only the steps that `cargo xtask test` runs, too
    #[arg(long)]
    short: bool,
    /// Cut the lab host's power while a guest inside writes, and look what is left: an image in the page cache, on ext4 and
    /// on XFS, as virtio-pmem and as nvdimm
    #[arg(long, conflicts_with_all = ["short", "shell"])]
    power_loss: bool,
    /// Run only this step, such as `ext4/clone`, or `clone` on each filesystem; may be repeated. With --power-loss the steps
    /// are `ext4/virtio-pmem` and so on
    #[arg(long = "step", value_name = "NAME", value_parser = step_name, conflicts_with = "short")]
    steps: Vec<String>,
    /// Run no step; give a shell in the lab host instead (`poweroff -f` ends it)
    #[arg(long, conflicts_with_all = ["short", "steps"])]
    shell: bool,
}

/// Names go to the lab host on its kernel's command line.
fn step_name(text: &str) -> std::result::Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_/".contains(c);
    if !text.is_empty() && text.chars().all(allowed) {
        return Ok(text.to_string());
    }
    Err("a name is made of letters, digits, '-', '_' and '/'".to_string())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kernel {
    /// Debian 12
    Bookworm,
    /// Debian 13
    Trixie,
    /// One after the other
    Both,
}

impl Kernel {
    fn releases(self) -> &'static [&'static str] {
        match self {
            Self::Bookworm => &["bookworm"],
            Self::Trixie => &["trixie"],
            Self::Both => &["bookworm", "trixie"],
        }
    }
}

const HOST: Recipe = Recipe {
    name: "lab",
    packages: &["busybox-static", "e2fsprogs", "ndctl", "xfsprogs"],
    programs: &[
        "busybox",
        "chattr",
        "debugfs",
        "dumpe2fs",
        "e2fsck",
        "filefrag",
        "mke2fs",
        "mkfs.ext4",
        "mkfs.xfs",
        "ndctl",
        "xfs_db",
        "xfs_io",
        "xfs_repair",
    ],
    modules: &[
        optional("crc32c_generic"),
        optional("crc32c_intel"),
        module("irqbypass"),
        module("kvm"),
        module("ccp"),
        module("kvm_amd"),
        module("libnvdimm"),
        module("nfit"),
        module("nd_btt"),
        module("nd_pmem"),
        module("dax"),
        module("loop"),
        module("ext4"),
        module("xfs"),
        // A disk that outlives the lab host.
        module("virtio_pci"),
        module("virtio_blk"),
        // What shares a guest's memory with the host's kernel.
        module("tun"),
        module("vhost_net"),
        module("vhost_vsock"),
        // What lets a device reach all of a guest's memory.
        module("vfio_iommu_type1"),
        module("vfio_pci"),
    ],
    init: guest::INIT,
};

/// Runs the lab host with each kernel asked for.
///
/// # Errors
/// Something cannot be made, or a step in the lab host failed or said nothing.
pub fn command(cache: &Cache, arguments: &Arguments) -> Result<()> {
    let form = match arguments {
        Arguments { shell: true, .. } => Form::Shell,
        Arguments { short: true, .. } => Form::Short,
        _ => Form::Full,
    };
    let lab = Lab::new(cache)?;
    let mut failed = Vec::new();
    let usual = match form {
        Form::Full => Kernel::Both,
        _ => Kernel::Bookworm,
    };
    for release in arguments.kernel.unwrap_or(usual).releases() {
        let outcome = if arguments.power_loss {
            power::run(&lab, release, &arguments.steps)
        } else {
            lab.run(release, form, &arguments.steps).map(drop)
        };
        if let Err(error) = outcome {
            crate::report(&error);
            failed.push(*release);
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::Failed(failed.join(", ")))
}

/// Runs the short form with the kernel that most hosts have: what `cargo xtask test` runs.
///
/// # Errors
/// As [`command`].
pub fn short(cache: &Cache) -> Result<()> {
    Lab::new(cache)?.run("bookworm", Form::Short, &[]).map(drop)
}

/// Measures on the lab host's DAX filesystem, and returns what `pcow-bench --ratios` says there.
///
/// # Errors
/// As [`command`].
pub fn bench(cache: &Cache) -> Result<Vec<Value>> {
    Lab::new(cache)?.run("bookworm", Form::Bench, &[])
}

/// What the lab host is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Short,
    Full,
    Bench,
    Shell,
}

impl Form {
    /// As the scripts know it, with the names of the `steps` that are chosen, if any are.
    fn environment(self, steps: &[String]) -> String {
        let form = match self {
            Self::Short => "short",
            Self::Full => "full",
            Self::Bench => "bench",
            Self::Shell => "shell",
        };
        format!("LAB_FORM={form} LAB_STEPS={}", steps.join(","))
    }
}

#[derive(Debug)]
struct Lab<'a> {
    cache: &'a Cache,
    contents: Contents,
}

impl<'a> Lab<'a> {
    /// Builds everything that does not depend on the lab host's kernel.
    fn new(cache: &'a Cache) -> Result<Self> {
        let log = Log::create(&cache.folder("lab")?.join("packages.log"))?;
        packages::ensure(&[Step::Lab], &log)?;
        let contents = Contents {
            qemu: qemu::build(cache)?,
            guest: guest::build(cache)?,
            programs: programs::build()?,
        };
        Ok(Self { cache, contents })
    }

    fn run(&self, release: &'static str, form: Form, steps: &[String]) -> Result<Vec<Value>> {
        let base = HOST.build(self.cache, Some(release))?;
        let part = format!("lab-{release}");
        let _lock = self.cache.lock(&part)?;
        let folder = self.cache.folder(&part)?;
        let work = folder.join("work");
        cache::remove_folder(&work)?;
        let boot = self.contents.add_to(&base, &work)?;
        let machine = Machine {
            qemu: &self.contents.qemu,
            boot: &boot,
            log: folder.join("console.log"),
            work: &work,
            environment: form.environment(steps),
            disk: None,
        };
        let outcome = match form {
            Form::Shell => machine.run_on_terminal().map(|()| Vec::new()),
            Form::Short | Form::Full | Form::Bench => run_steps(&machine, release),
        };
        // They take much space; the log stays.
        cache::remove_folder(&work)?;
        outcome
    }
}

/// Runs the steps, and returns what was measured.
fn run_steps(machine: &Machine<'_>, release: &'static str) -> Result<Vec<Value>> {
    eprintln!(
        "the lab host with the kernel of {release}; its log is {}",
        machine.log.display()
    );
    let (begin, mut last) = (Instant::now(), Instant::now());
    let mut report = Report::default();
    let ended = machine.run(|line| {
        if let Some(step) = report.take(line) {
            eprintln!(
                "  {:<32}{:<8}{}",
                step.name,
                step.outcome(),
                run::seconds(last.elapsed())
            );
            last = Instant::now();
        }
    });
    eprintln!("  in all {}", run::seconds(begin.elapsed()));
    match fault(&report, ended) {
        None => Ok(report.into_values()),
        Some(fault) => Err(failure(release, &machine.log, &report, fault)),
    }
}

/// Says what is wrong with a run that ended so, if anything is.
fn fault(report: &Report, ended: Result<()>) -> Option<String> {
    match (report.fault(), ended) {
        (fault, Ok(())) => fault,
        (None, Err(error)) => Some(error.to_string()),
        (Some(fault), Err(error)) => Some(format!("{fault}; {error}")),
    }
}

/// What went wrong, with what the log says of it.
fn failure(kernel: &'static str, log: &Path, report: &Report, fault: String) -> Error {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut tails: Vec<String> = report
        .failed()
        .map(|step| tail_of(&step.name, &text))
        .collect();
    if tails.is_empty() {
        tails.push(tail_of("", &text));
    }
    Error::Lab {
        kernel,
        fault,
        tail: tails.join("\n"),
        log: log.to_path_buf(),
    }
}
