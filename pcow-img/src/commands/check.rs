// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `check`: looks an image through and says what is wrong with it.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::Args;
use pcow_format::check::{self, Report};
use pcow_format::repair::{self, Unflushed};
use pcow_format::{ErrorKind, Stored};
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure, Status, one_line};
use crate::open;
use crate::progress::Progress;
use crate::size::Bytes;

/// Look for faults in an image that is not in use; changes nothing unless asked to
///
/// The exit code is the verdict, after the repair if there is one.
#[derive(Debug, Args)]
pub struct Check {
    /// The image
    image: PathBuf,

    /// Mend what can be without making anything worse: space that is taken for nothing, files that are not part of the
    /// image, a mark of a failed flush, states past the end of the disk
    #[arg(long)]
    repair: bool,

    /// Take what was not flushed before the machine's last end for data: it was shut down in order. Before the image is
    /// opened for writing again
    #[arg(long)]
    trust_live: bool,

    /// Give up what was not flushed in this boot: the filesystem was shut down by force
    #[arg(long, conflicts_with = "trust_live")]
    discard_live: bool,

    /// Read all data, too, to find what the medium cannot read
    #[arg(long)]
    data: bool,
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
    /// What was mended, as text.
    repaired: Vec<String>,
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
        let mut repaired = Vec::new();
        repaired.extend(self.settle(&global.base_dirs)?);
        if self.repair {
            repaired.extend(self.mend(&global.base_dirs)?);
        }
        let mut report = self.look(&global.base_dirs)?;
        if self.data {
            report.corruptions.extend(self.read_all(global)?);
        }
        let findings = Findings::new(&self.image, report, repaired);
        console.confirm(&findings)?;
        Ok(findings.status())
    }

    /// Decides about what was not flushed, if that was asked for.
    fn settle(&self, base_dirs: &[PathBuf]) -> Result<Option<String>, Failure> {
        let (what, text) = match (self.trust_live, self.discard_live) {
            (true, _) => (Unflushed::Trust, "taken for data"),
            (_, true) => (Unflushed::Discard, "given up"),
            _ => return Ok(None),
        };
        let stored = open::for_reading(&self.image, base_dirs, PURPOSE)?;
        let count = repair::settle_unflushed(&stored, what).doing(|| self.context())?;
        Ok(Some(format!(
            "{count} clusters that were not flushed are {text}"
        )))
    }

    /// An image that cannot be opened has nothing that can be mended.
    fn mend(&self, base_dirs: &[PathBuf]) -> Result<Vec<String>, Failure> {
        match self.open_sound(base_dirs)? {
            Some(stored) => repair::repair(&stored).doing(|| self.context()),
            None => Ok(Vec::new()),
        }
    }

    /// `None` if the image is not what it should be, which [`Self::look`] says.
    fn open_sound(&self, base_dirs: &[PathBuf]) -> Result<Option<Stored>, Failure> {
        match Stored::open(&self.image, base_dirs) {
            Err(e) if !matches!(e.kind(), ErrorKind::Io | ErrorKind::NoSpace) => Ok(None),
            opened => opened.doing(|| self.context()).map(Some),
        }
    }

    fn read_all(&self, global: &Global) -> Result<Vec<String>, Failure> {
        let Some(stored) = self.open_sound(&global.base_dirs)? else {
            return Ok(Vec::new());
        };
        let used = stored.total_usage().doing(|| self.context())?.total();
        let mut progress = Progress::new(used, global.quiet);
        repair::read_all(&stored, &mut |done| progress.reach(done)).doing(|| self.context())
    }

    fn context(&self) -> String {
        format!("{PURPOSE} {}", self.image.display())
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
    fn new(path: &Path, report: Report, repaired: Vec<String>) -> Self {
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
            repaired,
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
        for text in &self.repaired {
            writeln!(f, "repaired: {text}")?;
        }
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
