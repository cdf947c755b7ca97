// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A folder of images: what they show, and what stands beside them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use pcow_format::check::{Report, check};
use pcow_format::{FLUSH_FAILED_FILE, Stored};
use pcow_tests::scratch::Scratch;
use pcow_tests::tracer::{self, Fault, Traced};
use pcow_tests::waiting::wait_until;
use pcow_tests::{pattern, program};

use crate::operations::Operation;

const DISK_BYTES: usize = 2 << 20;
/// Longer than anything here takes on a slow machine; only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The bytes of a disk of which some clusters are zeros.
pub fn disk(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; DISK_BYTES];
    for (place, piece) in (0..).step_by(128 << 10).zip(bytes.chunks_mut(128 << 10)) {
        if place % (384 << 10) == 0 {
            pattern::fill(seed, place, piece);
        }
    }
    bytes
}

fn command(folder: &Path, line: &str) -> Command {
    let mut command = Command::new(program("pcow-img"));
    command.args(line.split_whitespace()).current_dir(folder);
    command
}

fn output(folder: &Path, line: &str) -> Output {
    let mut command = command(folder, line);
    command.stdin(Stdio::null()).output().unwrap()
}

/// Runs `pcow-img`, which must succeed.
pub fn call(folder: &Path, line: &str) {
    let output = output(folder, line);
    assert!(output.status.success(), "{line}: {output:?}");
}

/// Runs `pcow-img`, which must succeed once nobody uses the image: a process that another thread is starting has all that was
/// open here, a lock too, until it executes its program.
pub fn call_once_free(folder: &Path, line: &str) {
    let mut last = None;
    wait_until("nobody uses the image", PATIENCE, || {
        let output = last.insert(output(folder, line));
        !String::from_utf8_lossy(&output.stderr).contains("in use")
    });
    let output = last.unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
}

/// Runs `pcow-img`, which must not succeed.
pub fn refused(folder: &Path, line: &str) {
    let output = output(folder, line);
    assert!(!output.status.success(), "{line}: {output:?}");
}

/// What is shown under a name, by a disk, at a snapshot or now, or by a file: a checksum for each block.
pub type Shown = BTreeMap<String, Vec<u32>>;
/// Operations that are cut off have written whole ones.
pub const BLOCK_BYTES: usize = 4096;

/// Copies a folder, with its links and holes.
pub fn copy_to(start: &Path, folder: &Path) {
    let mut copy = Command::new("cp");
    let copied = copy.arg("-a").arg(start).arg(folder).status();
    assert!(copied.unwrap().success());
}

/// A copy of the images in which one operation is done.
pub struct World {
    scratch: Scratch,
}

/// A run of the operation.
pub struct Run {
    pub traced: Traced,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl World {
    /// Copies `start`, with its links and holes, and does what comes before `operation`.
    pub fn new(start: &Path, operation: &Operation) -> Self {
        let world = Self {
            scratch: Scratch::new(),
        };
        copy_to(start, &world.folder());
        if !operation.before.is_empty() {
            call(&world.folder(), operation.before);
        }
        world
    }

    /// Where the images are.
    pub fn folder(&self) -> PathBuf {
        let folder = self.scratch.path("images");
        folder.canonicalize().unwrap_or(folder)
    }

    /// Does the operation. What it prints is a file in the folder, so that it is written to as it reads; what it complains
    /// of is beside it.
    pub fn run(&self, operation: &Operation, fault: Option<Fault>) -> Run {
        let (folder, said) = (self.folder(), self.scratch.path("stderr"));
        let printed = folder.join("stdout");
        let mut command = command(&folder, operation.line);
        let input = if operation.input.is_empty() {
            Stdio::null()
        } else {
            File::open(folder.join(operation.input)).unwrap().into()
        };
        command.stdin(input);
        command.stdout(File::create(&printed).unwrap());
        command.stderr(File::create(&said).unwrap());
        let traced = tracer::run(&mut command, &folder, fault);
        let stdout = without(&fs::read(&printed).unwrap(), folder.to_str().unwrap());
        fs::remove_file(printed).unwrap();
        Run {
            traced,
            stdout,
            stderr: fs::read_to_string(said).unwrap(),
        }
    }

    fn entries(&self) -> Vec<(String, PathBuf)> {
        let entries = fs::read_dir(self.folder()).unwrap();
        let named = entries.map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), entry.path())
        });
        named.collect()
    }

    /// Everything that is not complete.
    pub fn leftovers(&self) -> Vec<String> {
        let entries = self.entries().into_iter().map(|(name, _)| name);
        entries.filter(|name| name.ends_with(".part")).collect()
    }

    fn images(&self) -> Vec<(String, PathBuf)> {
        let mut entries = self.entries();
        entries.retain(|(name, path)| path.is_dir() && !name.ends_with(".part"));
        entries
    }

    /// Everything that is shown.
    pub fn shown(&self) -> Result<Shown, String> {
        let mut shown = Shown::new();
        for (name, path) in self.entries() {
            if name.ends_with(".part") {
            } else if path.is_dir() {
                add_image(&mut shown, &name, &path)
                    .map_err(|e| format!("{name}: {}", chain(&e)))?;
            } else {
                shown.insert(name, sums(&fs::read(path).unwrap()).collect());
            }
        }
        Ok(shown)
    }

    /// The images of which a flush has failed, half received ones too.
    pub fn marked(&self) -> Vec<String> {
        let mut images = self.entries();
        images.retain(|(_, path)| path.join(FLUSH_FAILED_FILE).exists());
        images.into_iter().map(|(name, _)| name).collect()
    }

    /// Has an image mended, which must succeed.
    pub fn mend(&self, image: &str) -> Result<(), String> {
        let line = format!("check --repair {image}");
        let output = output(&self.folder(), &line);
        if output.status.success() {
            return Ok(());
        }
        Err(format!("{line}: {output:?}"))
    }

    /// What a check finds.
    pub fn check(&self) -> Result<Vec<(String, Report)>, String> {
        let check = |(name, path): (String, PathBuf)| {
            let report = Stored::open(&path, &[]).and_then(|stored| check(&stored));
            let report = report.map_err(|e| format!("{name}: {}", chain(&e)))?;
            Ok((name, report))
        };
        self.images().into_iter().map(check).collect()
    }
}

/// `output` without the name of the folder, which is another one each time.
fn without(output: &[u8], folder: &str) -> Vec<u8> {
    match str::from_utf8(output) {
        Ok(text) => text.replace(folder, "").into(),
        Err(_) => output.to_owned(),
    }
}

fn add_image(shown: &mut Shown, name: &str, path: &Path) -> pcow_format::Result<()> {
    let stored = Stored::open(path, &[])?;
    let root = stored.root();
    shown.insert(name.to_owned(), blocks_of(&stored, root.active)?);
    for snapshot in &root.snapshots {
        // A name that is made up has the time in it.
        let label = snapshot.name.replace(|c: char| c.is_ascii_digit(), "#");
        let label = format!("{name}@{} {label}", snapshot.number);
        shown.insert(label, blocks_of(&stored, snapshot.layer)?);
    }
    Ok(())
}

fn blocks_of(stored: &Stored, layer: uuid::Uuid) -> pcow_format::Result<Vec<u32>> {
    let view = stored.view(layer)?;
    let mut bytes = vec![0; 64 << 10];
    let mut blocks = Vec::new();
    for offset in (0..view.size()).step_by(bytes.len()) {
        view.read(offset, &mut bytes)?;
        blocks.extend(sums(&bytes));
    }
    Ok(blocks)
}

fn sums(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks(BLOCK_BYTES).map(crc32c::crc32c)
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |e| e.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
