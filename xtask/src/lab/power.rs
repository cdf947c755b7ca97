// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask lab --power-loss`: the lab host loses its power while a guest inside writes.
//!
//! The image is in the lab host's page cache, on an ordinary disk that outlives it. Killing the emulator (SIGKILL) loses
//! that page cache as a power cut does, and keeps what had reached the disk, which has no cache of its own that could be lost:
//! that syncs empty such caches is the kernel's part. The lab host is then booted again on the disk:
//! its filesystem and the image have to be sound, and records that were promised to be durable have to be there.
//! The lab host's kernel is told to write nothing back by itself, and each case shows that it did not: a file that nobody
//! synced is gone, and where the guest's own flushes promise nothing, records are lost indeed.

use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::boot::Boot;
use crate::cache;
use crate::error::{Error, Result};
use crate::lab::machine::{End, Machine};
use crate::lab::report::Report;
use crate::lab::verdict::{Promise, Records};
use crate::lab::{HOST, Lab, failure, fault};
use crate::run;

/// The disk, a file in the folder of the machine's other files.
const DISK: &str = "disk";

const DISK_BYTES: u64 = 1 << 30;

/// Acknowledgements after which the power is lost; how many of them is chosen at random.
const ACKNOWLEDGEMENTS: std::ops::Range<u64> = 40..200;

/// Within which a backend makes durable what was stored, by default.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);

/// Until what a backend logs has come out of a machine that is busy: that its flushes are late, which it says at once.
const TELLING: Duration = Duration::from_secs(1);

/// Before and after the loss; each has a boot and a log of its own.
const PHASES: &[&str] = &["write", "verify"];

const FILESYSTEMS: &[&str] = &["ext4", "xfs"];

/// How the guest has the image, and what makes its records durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Device {
    /// Its own flushes reach the backend. Nothing else flushes.
    VirtioPmem,
    /// Its own flushes are none. One flush is asked of the backend.
    NvdimmFlush,
    /// Its own flushes are none. The backend flushes by itself, as it does by default.
    NvdimmInterval,
}

impl Device {
    const ALL: &[Self] = &[Self::VirtioPmem, Self::NvdimmFlush, Self::NvdimmInterval];

    /// As the scripts know it.
    fn name(self) -> &'static str {
        match self {
            Self::VirtioPmem => "virtio-pmem",
            Self::NvdimmFlush => "nvdimm-flush",
            Self::NvdimmInterval => "nvdimm-interval",
        }
    }

    fn promise(self) -> Promise {
        match self {
            Self::VirtioPmem => Promise::Told,
            Self::NvdimmFlush => Promise::Held,
            Self::NvdimmInterval => Promise::Older(FLUSH_INTERVAL + TELLING),
        }
    }

    /// Whether the guest must have lost records. If it has not, the page cache was not lost, and no case proves anything.
    fn has_to_lose(self) -> bool {
        self == Self::NvdimmFlush
    }
}

#[derive(Debug, Clone, Copy)]
struct Case {
    filesystem: &'static str,
    device: Device,
}

impl Case {
    fn name(self) -> String {
        format!("{}/{}", self.filesystem, self.device.name())
    }

    /// All that `chosen` names, or all.
    fn chosen(chosen: &[String]) -> Vec<Self> {
        let all = FILESYSTEMS.iter().flat_map(|filesystem| {
            Device::ALL.iter().map(|device| Self {
                filesystem,
                device: *device,
            })
        });
        all.filter(|case| {
            let mut names = chosen.iter();
            chosen.is_empty()
                || names.any(|name| *name == case.name() || *name == case.device.name())
        })
        .collect()
    }
}

/// Runs the cases that `steps` choose with the kernel of `release`.
///
/// # Errors
/// A promise was broken, a case proves nothing, or something cannot be made.
pub fn run(lab: &Lab<'_>, release: &'static str, steps: &[String]) -> Result<()> {
    let cases = Case::chosen(steps);
    if cases.is_empty() {
        return Err(Error::Unusable(format!(
            "there is no step {}",
            steps.join(", ")
        )));
    }
    let base = HOST.build(lab.cache, Some(release))?;
    let part = format!("lab-power-{release}");
    let _lock = lab.cache.lock(&part)?;
    let folder = lab.cache.folder(&part)?;
    let work = folder.join("work");
    cache::remove_folder(&work)?;
    let host = Host {
        release,
        qemu: &lab.contents.qemu,
        boot: lab.contents.add_to(&base, &work)?,
        work: &work,
        folder: &folder,
    };
    eprintln!(
        "the lab host with the kernel of {release} loses its power; its logs are in {}",
        folder.display()
    );
    let failed = cases.into_iter().filter(|case| !host.passes(*case)).count();
    // They take much space; the logs stay.
    cache::remove_folder(&work)?;
    if failed == 0 {
        return Ok(());
    }
    Err(Error::Failed(format!(
        "{failed} cases of power loss with the kernel of {release}"
    )))
}

/// What all cases have in common.
#[derive(Debug)]
struct Host<'a> {
    release: &'static str,
    qemu: &'a Path,
    boot: Boot,
    work: &'a Path,
    folder: &'a Path,
}

impl Host<'_> {
    /// Runs a case, and says how it ended.
    fn passes(&self, case: Case) -> bool {
        let begin = Instant::now();
        let outcome = self.run(case);
        let name = case.name();
        let time = run::seconds(begin.elapsed());
        match outcome {
            Ok(summary) => {
                eprintln!("  {name:<24}ok      {time:<14}{summary}");
                true
            }
            Err(error) => {
                eprintln!("  {name:<24}FAILED  {time}");
                crate::report(&error);
                false
            }
        }
    }

    fn run(&self, case: Case) -> Result<String> {
        // What the last run said is none of this one's.
        for phase in PHASES {
            let log = self.log(case, phase);
            File::create(&log).map_err(Error::file("create", &log))?;
        }
        let disk = self.work.join(DISK);
        File::create(&disk)
            .and_then(|file| file.set_len(DISK_BYTES))
            .map_err(Error::file("create", &disk))?;
        let mut records = Records::default();
        self.write_until_killed(case, &mut records)?;
        self.verify(case, &mut records)?;
        let promise = case.device.promise();
        let summary = format!(
            "killed after {} acknowledgements; {}",
            records.acknowledgements(),
            records.summary(promise)
        );
        let fault = records.fault(promise).or_else(|| {
            (case.device.has_to_lose() && records.lost() == 0)
                .then(|| "nothing was lost, so nothing was proved".to_string())
        });
        match fault {
            None => Ok(summary),
            Some(fault) => Err(self.failure(case, "verify", format!("{fault} ({summary})"))),
        }
    }

    /// Has the guest inside write until enough was acknowledged, and cuts the power.
    fn write_until_killed(&self, case: Case, records: &mut Records) -> Result<()> {
        let goal = random(ACKNOWLEDGEMENTS);
        let mut report = Report::default();
        let ended = self.start(case, "write", |machine| {
            machine.run_until(|line| {
                report.take(line);
                records.take(line, case.device.promise(), Instant::now());
                if records.acknowledgements() < goal {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            })
        });
        let fault = match ended {
            Ok(End::Killed) => return Ok(()),
            Ok(End::PoweredOff) => "it ended before its power was lost".to_string(),
            Err(error) => error.to_string(),
        };
        Err(self.failure(case, "write", fault))
    }

    /// Boots again, and takes in what is there.
    fn verify(&self, case: Case, records: &mut Records) -> Result<()> {
        let mut report = Report::default();
        let ended = self.start(case, "verify", |machine| {
            machine.run(|line| {
                report.take(line);
                records.take(line, case.device.promise(), Instant::now());
            })
        });
        let Some(fault) = fault(&report, ended) else {
            return Ok(());
        };
        Err(failure(
            self.release,
            &self.log(case, "verify"),
            &report,
            format!("{}: {fault}", case.name()),
        ))
    }

    fn start<T>(&self, case: Case, phase: &str, run: impl FnOnce(&Machine<'_>) -> T) -> T {
        let environment = format!(
            "LAB_FORM=power-{phase} LAB_FILESYSTEM={} LAB_DEVICE={}",
            case.filesystem,
            case.device.name()
        );
        run(&Machine {
            qemu: self.qemu,
            boot: &self.boot,
            log: self.log(case, phase),
            work: self.work,
            environment,
            disk: Some(DISK),
        })
    }

    fn failure(&self, case: Case, phase: &str, fault: String) -> Error {
        failure(
            self.release,
            &self.log(case, phase),
            &Report::default(),
            format!("{}: {fault}", case.name()),
        )
    }

    fn log(&self, case: Case, phase: &str) -> PathBuf {
        let name = case.name().replace('/', "-");
        self.folder.join(format!("{name}-{phase}.log"))
    }
}

/// A number of the range, another one each time.
fn random(range: std::ops::Range<u64>) -> u64 {
    let seed = RandomState::new().build_hasher().finish();
    range.start + seed % (range.end - range.start)
}

#[cfg(test)]
mod tests {
    use super::Case;

    fn chosen(names: &[&str]) -> Vec<String> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_string()).collect();
        Case::chosen(&names).into_iter().map(Case::name).collect()
    }

    #[test]
    fn a_device_alone_chooses_it_on_each_filesystem() {
        assert_eq!(chosen(&[]).len(), 6);
        let both = ["ext4/virtio-pmem", "xfs/virtio-pmem"];
        assert_eq!(chosen(&["virtio-pmem"]), both);
        assert_eq!(chosen(&["xfs/nvdimm-flush"]), ["xfs/nvdimm-flush"]);
        assert!(chosen(&["btrfs/nvdimm-flush"]).is_empty());
    }
}
