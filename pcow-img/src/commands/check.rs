// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `check`: looks an image through and says what is wrong with it.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::Args;
use pcow_format::check::{self, Report};
use pcow_format::{ErrorKind, Stored};
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure, Status, one_line};
use crate::open;
use crate::size::Bytes;

/// Look for faults in an image that is not in use; changes nothing
#[derive(Debug, Args)]
pub struct Check {
    /// The image
    image: PathBuf,
}

/// What `check` found.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Findings {
    /// The image's directory.
    filename: PathBuf,
    /// Always `pcow`.
    format: &'static str,
    /// Parts that could not be looked at.
    check_errors: usize,
    /// Faults that make reading fail or show wrong bytes.
    corruptions: usize,
    /// Pieces of space that are taken for nothing.
    leaks: usize,
    /// Bytes of that space.
    leaked_size: u64,
    /// Clusters that are data, in all layers in the image's directory.
    allocated_clusters: u64,
    /// Of these, clusters that were not flushed yet: they outlive every process, but not a power loss.
    unflushed_clusters: u64,
    /// All findings as text, the most serious ones first.
    findings: Vec<Finding>,
}

/// One finding.
#[derive(Debug, Serialize)]
struct Finding {
    kind: FindingKind,
    text: String,
}

#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
enum FindingKind {
    Corruption,
    CheckError,
    Leak,
}

const PURPOSE: &str = "cannot check";

impl Check {
    /// Checks the image; the exit code is the verdict.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<Status, Failure> {
        let report = self.look(&global.base_dirs)?;
        let findings = Findings::new(&self.image, report);
        console.confirm(&findings)?;
        Ok(findings.status())
    }

    /// A root that cannot be trusted is a finding; one that is not understood is not.
    fn look(&self, base_dirs: &[PathBuf]) -> Result<Report, Failure> {
        match Stored::open(&self.image, base_dirs) {
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                return Ok(Report {
                    corruptions: vec![one_line(&e)],
                    ..Report::default()
                });
            }
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                return Err(Failure::Refused {
                    message: format!("{PURPOSE} {}: {}", self.image.display(), one_line(&e)),
                    advice: e.advice().map(str::to_owned),
                    status: Status::Unsupported,
                });
            }
            _ => {}
        }
        let (stored, _lock) = open::for_reading_alone(&self.image, base_dirs, PURPOSE)?;
        check::check(&stored).doing(|| format!("{PURPOSE} {}", self.image.display()))
    }
}

impl Findings {
    fn new(path: &Path, report: Report) -> Self {
        let counts = (
            report.unchecked.len(),
            report.corruptions.len(),
            report.leaks.len(),
        );
        let findings = [
            (FindingKind::Corruption, report.corruptions),
            (FindingKind::CheckError, report.unchecked),
            (FindingKind::Leak, report.leaks),
        ];
        let with_kind = |(kind, texts): (FindingKind, Vec<String>)| {
            texts.into_iter().map(move |text| Finding { kind, text })
        };
        Self {
            filename: path.to_owned(),
            format: "pcow",
            check_errors: counts.0,
            corruptions: counts.1,
            leaks: counts.2,
            leaked_size: report.leaked_bytes,
            allocated_clusters: report.data_clusters,
            unflushed_clusters: report.live_clusters,
            findings: findings.into_iter().flat_map(with_kind).collect(),
        }
    }

    fn status(&self) -> Status {
        match (self.corruptions, self.check_errors, self.leaks) {
            (0, 0, 0) => Status::Ok,
            (0, 0, _) => Status::Leaks,
            (0, _, _) => Status::Failed,
            _ => Status::Corrupt,
        }
    }

    fn verdict(&self) -> &'static str {
        match self.status() {
            Status::Corrupt => "corrupt: restore it from a backup",
            Status::Failed => "no fault found, but not everything could be looked at",
            Status::Leaks => "no fault found, except for space that is taken for nothing",
            _ => "no fault found",
        }
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let kind = match finding.kind {
                FindingKind::Corruption => "corrupt",
                FindingKind::CheckError => "not looked at",
                FindingKind::Leak => "leak",
            };
            writeln!(f, "{kind}: {}", finding.text)?;
        }
        writeln!(f, "{}: {}", self.filename.display(), self.verdict())?;
        if self.leaks > 0 {
            writeln!(f, "{} are taken for nothing", Bytes(self.leaked_size))?;
        }
        let clusters = self.allocated_clusters;
        writeln!(
            f,
            "{clusters} clusters hold data, {} of them not flushed yet",
            self.unflushed_clusters
        )
    }
}
