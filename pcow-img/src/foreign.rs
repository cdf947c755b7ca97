// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Formats of other programs. They are read by a library, or where that cannot by `qemu-img`, which also writes them. Nothing
//! is guessed: the user says the format of a file, and a file that of what it refers to.
//!
//! A file may be hostile. What it refers to is opened only below directories that the user allows: the one that the file is
//! in, and those of `--base-dir`.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use imago::file::File as Storage;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, FormatDriverBuilder, Mapping, Storage as _, StorageOpenOptions};
use pcow_format::medium::File;
use pcow_format::medium::real::RealFile;
use serde_json::Value;

use crate::disk::Format;
use crate::failure::Failure;
use crate::temporary::Temporary;

/// A file of another format, open for reading.
pub type Access = FormatAccess<Storage>;

/// How a file of another format is read.
#[derive(Debug)]
pub enum Opened {
    /// As it is.
    Directly(Access),
    /// As the raw file that `qemu-img` made of it, which has no name.
    AsRaw(Arc<dyn File>),
}

/// Opens a file of another format.
///
/// # Errors
/// If it is something else, refers to what may not be opened, or needs a `qemu-img` that is not there.
pub fn open(
    path: &Path,
    format: Format,
    base_dirs: &[PathBuf],
    purpose: &str,
) -> Result<Opened, Failure> {
    let refused = |why: &str| Failure::refused(format!("{purpose} {}: {why}", path.display()));
    let gate = Gate::new(path, base_dirs);
    match open_directly(path, format, gate.clone()) {
        Ok(access) => Ok(Opened::Directly(access)),
        Err(e) if is_final(&e) => Err(refused(&e.to_string())),
        Err(_) => {
            check_references(path, format, &gate).map_err(|why| refused(&why))?;
            through_raw(path, format, purpose).map(Opened::AsRaw)
        }
    }
}

/// Whether nothing else can open the file, or may. The library knows fewer variants than `qemu-img`.
fn is_final(error: &io::Error) -> bool {
    let kind = error.kind();
    matches!(
        kind,
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
    )
}

fn open_directly(path: &Path, format: Format, gate: Gate) -> io::Result<Access> {
    match format {
        Format::Qcow2 => Qcow2::<Storage>::builder_path(path)
            .open(gate)
            .map(FormatAccess::new),
        _ => Vmdk::<Storage>::builder_path(path)
            .open(gate)
            .map(FormatAccess::new),
    }
}

/// The end of what is alike from `at` on, and whether it is data.
///
/// # Errors
/// If the file cannot be read.
pub fn piece(access: &Access, at: u64, size: u64) -> io::Result<(u64, bool)> {
    let (mapping, length) = access.get_mapping(at, size - at)?;
    if length == 0 {
        return Ok((size, false));
    }
    let is_zero = matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. });
    Ok((at + length, !is_zero))
}

/// Opens what a file refers to, below the directories that are allowed.
#[derive(Debug, Clone)]
struct Gate {
    allowed: Vec<PathBuf>,
}

impl Gate {
    fn new(path: &Path, base_dirs: &[PathBuf]) -> Self {
        let beside = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p.to_owned(),
            _ => PathBuf::from("."),
        };
        let dirs = base_dirs.iter().chain([&beside]);
        let allowed = dirs.filter_map(|d| d.canonicalize().ok()).collect();
        Self { allowed }
    }

    /// Whether `path` may be opened.
    fn check(&self, path: &Path) -> io::Result<()> {
        let real = path.canonicalize()?;
        if self.allowed.iter().any(|dir| real.starts_with(dir)) {
            return Ok(());
        }
        let what = format!(
            "it refers to {}, which is outside the directories that it may use; allow its directory with --base-dir DIR if the file can be trusted",
            real.display()
        );
        Err(io::Error::new(io::ErrorKind::PermissionDenied, what))
    }
}

impl ImplicitOpenGate<Storage> for Gate {
    fn open_format<F: FormatDriverBuilder<Storage>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<Storage>> {
        if let Some(path) = builder.get_image_path() {
            self.check(&path)?;
        }
        builder.open(self.clone()).map(FormatAccess::new)
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        if let Some(path) = options.get_filename() {
            self.check(path)?;
        }
        Storage::open(options)
    }
}

/// Asks `qemu-img` for everything that the file refers to, and whether that may be opened.
fn check_references(path: &Path, format: Format, gate: &Gate) -> Result<(), String> {
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json", "-f", format.name()]);
    let said = run(command.arg(operand(path))).map_err(|e| e.replace("FORMAT", format.name()))?;
    let info: Value = serde_json::from_slice(&said.stdout)
        .map_err(|e| format!("qemu-img says nothing of it: {e}"))?;
    if info.get("backing-filename").is_some() {
        return Err(
            "it is of a kind that only qemu-img can read, and refers to a backing file; \
             convert it with 'qemu-img convert' if it can be trusted"
                .to_owned(),
        );
    }
    let details = &info["format-specific"]["data"];
    let extents = details["extents"].as_array().into_iter().flatten();
    let files = extents
        .map(|e| &e["filename"])
        .chain([&details["data-file"]]);
    for file in files.filter_map(Value::as_str) {
        // qemu-img has them relative to the working directory already.
        let absolute = std::path::absolute(file).map_err(|e| e.to_string())?;
        gate.check(&absolute).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// By way of a sparse raw file in the directory for temporary files (`TMPDIR`).
fn through_raw(path: &Path, format: Format, purpose: &str) -> Result<Arc<dyn File>, Failure> {
    let temporary = Temporary::beside(&std::env::temp_dir().join("pcow-img"));
    convert((path, format), (&temporary.0, Format::Raw), purpose)?;
    // The open file lives on without its name.
    RealFile::open_raw(&temporary.0)
        .map_err(|e| Failure::refused(format!("{purpose} {}: {e}", path.display())))
}

/// Turns one file into another.
///
/// # Errors
/// If `qemu-img` is not there or fails.
pub fn convert(
    (from, from_format): (&Path, Format),
    (to, to_format): (&Path, Format),
    purpose: &str,
) -> Result<(), Failure> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", from_format.name(), "-O", to_format.name()]);
    command.arg(operand(from)).arg(operand(to));
    let other = if from_format == Format::Raw {
        to_format
    } else {
        from_format
    };
    run(&mut command).map(drop).map_err(|why| {
        let why = why.replace("FORMAT", other.name());
        Failure::refused(format!("{purpose} {}: {why}", from.display()))
    })
}

/// Runs `qemu-img`; an error is what it said last.
fn run(command: &mut Command) -> Result<Output, String> {
    match command.stdin(Stdio::null()).output() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(
            "FORMAT needs qemu-img here, which is not there; install it (qemu-utils), or convert to raw elsewhere"
                .to_owned(),
        ),
        Err(e) => Err(format!("cannot start qemu-img: {e}")),
        Ok(done) if done.status.success() => Ok(done),
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stderr);
            Err(said.lines().last().unwrap_or("qemu-img failed").to_owned())
        }
    }
}

/// A path that `qemu-img` does not take for an option or a protocol.
fn operand(path: &Path) -> OsString {
    if path.is_absolute() {
        return path.as_os_str().to_owned();
    }
    Path::new(".").join(path).into_os_string()
}
