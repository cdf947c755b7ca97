// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `doctor`: what this host can do, and what to do where it cannot.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use pcow_format::medium::real::RealDirectory;
use pcow_format::medium::{Directory, Domain, File, Hindrance, Site};
use serde::Serialize;
use uuid::Uuid;

use crate::console::Console;
use crate::failure::{Failure, Status};

/// Say whether this host can run virtual machines on images, and what to do where it cannot
///
/// The exit code is 1 if something is missing without which nothing runs.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Where images are to be: which promises its filesystem can keep
    #[arg(default_value = ".")]
    directory: PathBuf,

    /// The QEMU that is to be used
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: OsString,
}

/// What was looked at.
#[derive(Debug, Serialize)]
struct Findings {
    /// Each with its result.
    checks: Vec<Finding>,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    /// What.
    name: &'static str,
    /// How it is.
    result: Verdict,
    /// In words.
    text: String,
    /// What to do, or null.
    advice: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// As it should be.
    Good,
    /// It works with less.
    Limited,
    /// Nothing runs without it.
    Missing,
}

/// Mappings that a process may have by default; more let large guests have more of their image mapped at a time.
const DEFAULT_MAP_COUNT: u64 = 65_530;

impl Doctor {
    /// Looks at everything.
    pub fn run(&self, console: &mut Console) -> Result<Status, Failure> {
        let checks = vec![
            kernel(),
            userfaultfd(),
            map_count(),
            dax(&self.directory)?,
            reflink(&self.directory)?,
            qemu(&self.qemu),
            qemu_img(),
        ];
        let missing = checks.iter().any(|c| c.result == Verdict::Missing);
        console.show(&Findings { checks })?;
        Ok(if missing { Status::Failed } else { Status::Ok })
    }
}

fn finding(name: &'static str, result: Verdict, text: impl Into<String>) -> Finding {
    Finding {
        name,
        result,
        text: text.into(),
        advice: None,
    }
}

impl Finding {
    fn advising(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

/// Write protection of shared memory by userfaultfd came with Linux 5.19, `/dev/userfaultfd` with 6.1.
fn kernel() -> Finding {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 1) {
        finding("kernel", Verdict::Good, format!("Linux {release}"))
    } else {
        finding(
            "kernel",
            Verdict::Missing,
            format!("Linux {release} is too old"),
        )
        .advising("use Linux 6.1 or newer")
    }
}

fn userfaultfd() -> Finding {
    let device = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd");
    let name = "userfaultfd";
    match device {
        Ok(_) => finding(name, Verdict::Good, "/dev/userfaultfd can be opened"),
        Err(_) if rustix::process::geteuid().is_root() => {
            finding(name, Verdict::Good, "the system call is there for root")
        }
        Err(_) if number("/proc/sys/vm/unprivileged_userfaultfd") == Some(1) => {
            finding(name, Verdict::Good, "the system call is there for everybody")
        }
        Err(e) => finding(name, Verdict::Missing, format!("/dev/userfaultfd: {e}")).advising(
            "let the group of the backend open it: a udev rule with KERNEL==\"userfaultfd\", GROUP=\"kvm\", MODE=\"0660\"",
        ),
    }
}

fn map_count() -> Finding {
    let name = "map count";
    match number("/proc/sys/vm/max_map_count") {
        Some(n) if n >= DEFAULT_MAP_COUNT => {
            finding(name, Verdict::Good, format!("vm.max_map_count is {n}"))
        }
        Some(n) => finding(name, Verdict::Limited, format!("vm.max_map_count is {n}")).advising(
            format!("sysctl vm.max_map_count={DEFAULT_MAP_COUNT}, the kernel's default"),
        ),
        None => finding(name, Verdict::Limited, "vm.max_map_count cannot be read"),
    }
}

fn number(path: &str) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A file that is gone when the work with it is done.
fn with_file<T>(
    directory: &Path,
    work: impl FnOnce(&dyn Directory, &dyn File) -> io::Result<T>,
) -> Result<T, Failure> {
    let name = format!("pcow-img.{}.part", Uuid::new_v4());
    let tried = RealDirectory::open(directory).and_then(|dir| {
        let file = dir.create(Site("doctor.create"), &name)?;
        let done = work(dir.as_ref(), file.as_ref());
        dir.unlink(Site("doctor.unlink"), &name)?;
        done
    });
    tried.map_err(|e| {
        let what = format!("cannot try out {}: {e}", directory.display());
        Failure::refused(what).advising("give a directory that can be written to")
    })
}

fn dax(directory: &Path) -> Result<Finding, Failure> {
    let (domain, hindrance) = with_file(directory, |_, file| {
        file.set_len(Site("doctor.len"), 2 << 20)?;
        Ok((file.domain()?, file.as_real().and_then(Hindrance::of)))
    })?;
    let name = "DAX";
    let place = directory.display();
    Ok(match (domain, hindrance) {
        (Domain::Dax, _) => finding(name, Verdict::Good, format!("{place}: a guest's own flushes are durable")),
        (Domain::PageCache, Some(why)) => {
            let text = format!("{place}: a new file {}", why.reason());
            let found = finding(name, Verdict::Limited, text);
            match why.advice() {
                Some(advice) => found.advising(advice),
                None => found,
            }
        }
        (Domain::PageCache, None) => finding(
            name,
            Verdict::Limited,
            format!("{place}: page cache; what a guest stored is durable after a flush of the image"),
        )
        .advising("attach images with virtio-pmem, whose flushes reach the image, or use a filesystem on persistent memory"),
    })
}

fn reflink(directory: &Path) -> Result<Finding, Failure> {
    let shares = with_file(directory, |dir, file| {
        file.write_at(Site("doctor.write"), &[1; 4096], 0)?;
        let name = format!("pcow-img.{}.part", Uuid::new_v4());
        let copy = dir.create(Site("doctor.create"), &name)?;
        dir.unlink(Site("doctor.unlink"), &name)?;
        let (Some(from), Some(to)) = (file.as_real(), copy.as_real()) else {
            return Ok(false);
        };
        Ok(rustix::fs::ioctl_ficlone(to.as_fd(), from.as_fd()).is_ok())
    })?;
    let place = directory.display();
    Ok(if shares {
        finding(
            "reflink",
            Verdict::Good,
            format!("{place}: files can share storage"),
        )
    } else {
        finding(
            "reflink",
            Verdict::Limited,
            format!("{place}: files cannot share storage; what must be copied takes space"),
        )
        .advising("clones and snapshots do not need it; XFS has it")
    })
}

fn qemu(program: &OsString) -> Finding {
    let shown = Path::new(program).display();
    match says(program, &["-object", "help"]) {
        None => finding(
            "QEMU",
            Verdict::Missing,
            format!("{shown} cannot be started"),
        )
        .advising("build the patched QEMU ('cargo xtask qemu'), and name it with --qemu"),
        Some(text) if text.contains("memory-backend-pcow") => finding(
            "QEMU",
            Verdict::Good,
            format!("{shown} knows memory-backend-pcow"),
        ),
        Some(_) => finding(
            "QEMU",
            Verdict::Missing,
            format!("{shown} does not know memory-backend-pcow"),
        )
        .advising("build the patched QEMU ('cargo xtask qemu'), and name it with --qemu"),
    }
}

fn qemu_img() -> Finding {
    match says(&OsString::from("qemu-img"), &["--version"]) {
        Some(text) => {
            let version = text.lines().next().unwrap_or_default().to_owned();
            finding("qemu-img", Verdict::Good, version)
        }
        None => finding(
            "qemu-img",
            Verdict::Limited,
            "not there: qcow2 and VMDK cannot be converted",
        )
        .advising("install it (qemu-utils) if you need that"),
    }
}

fn says(program: &OsString, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let done = command.output().ok()?;
    Some(String::from_utf8_lossy(&done.stdout).into_owned())
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let mark = match check.result {
                Verdict::Good => "good",
                Verdict::Limited => "limited",
                Verdict::Missing => "MISSING",
            };
            writeln!(f, "{mark:<9}{:<13}{}", check.name, check.text)?;
            if let Some(advice) = &check.advice {
                writeln!(f, "{:22}→ {advice}", "")?;
            }
        }
        Ok(())
    }
}
