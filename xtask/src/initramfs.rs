// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds an initramfs from programs, kernel modules and an init script.
//!
//! Does not know what the machine that boots it is for.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::arch;
use crate::cache;
use crate::error::{Error, Result};
use crate::modules::{KernelModules, Module};
use crate::run::{self, Log};

/// A packed initramfs is padded to a multiple of this many bytes: the kernel finds an archive
/// that is appended to it only at a multiple of four.
const ALIGNMENT: usize = 512;

/// The contents of an initramfs, collected in a folder.
#[derive(Debug)]
pub struct Initramfs {
    root: PathBuf,
}

impl Initramfs {
    /// Starts the contents of an archive that is appended to an initramfs, in the folder `root`,
    /// which is emptied.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn addition(root: &Path) -> Result<Self> {
        cache::remove_folder(root)?;
        cache::create_folder(root)?;
        Ok(Self {
            root: root.to_path_buf(),
        })
    }

    /// Starts an initramfs in the folder `root`, which is emptied, with the script `init`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn create(root: &Path, init: &str) -> Result<Self> {
        cache::remove_folder(root)?;
        for name in [
            "bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr/bin",
            "usr/sbin", "var",
        ] {
            cache::create_folder(&root.join(name))?;
        }
        let initramfs = Self {
            root: root.to_path_buf(),
        };
        initramfs.write("init", init)?;
        initramfs.make_executable("init")?;
        // Programs such as mkfs look here for what is mounted.
        initramfs.link("/proc/self/mounts", "etc/mtab")?;
        Ok(initramfs)
    }

    /// Writes the file `name` with content `text`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.root.join(name);
        if let Some(folder) = path.parent() {
            cache::create_folder(folder)?;
        }
        fs::write(&path, text).map_err(Error::file("write", &path))
    }

    /// Copies the file `from` as `name`.
    ///
    /// # Errors
    /// It cannot be copied.
    pub fn copy(&self, from: &Path, name: &str) -> Result<()> {
        let to = self.root.join(name);
        if let Some(folder) = to.parent() {
            cache::create_folder(folder)?;
        }
        fs::copy(from, &to).map_err(Error::file("copy", from))?;
        Ok(())
    }

    /// Copies the `programs` of the system unpacked in `system`, and every library they need,
    /// to the same places.
    ///
    /// # Errors
    /// A program or a library is not there.
    pub fn copy_programs(&self, system: &Path, programs: &[&str]) -> Result<()> {
        let mut libraries = BTreeSet::new();
        for program in programs {
            let found = find_program(system, program)?;
            libraries.extend(libraries_of(system, &found)?);
            self.copy(&found, &inside(system, &found))?;
        }
        self.copy_libraries(system, &libraries)
    }

    /// Copies programs that were built on this machine, each under the name that comes with it
    /// and without debugging information, and every library of this machine that they need.
    ///
    /// # Errors
    /// A program or a library is not there, or `strip` fails.
    pub fn copy_built(&self, programs: &[(&Path, String)]) -> Result<()> {
        let system = Path::new("/");
        let mut libraries = BTreeSet::new();
        for (program, name) in programs {
            libraries.extend(libraries_of(system, program)?);
            self.strip(program, name)?;
        }
        self.copy_libraries(system, &libraries)
    }

    fn strip(&self, program: &Path, name: &str) -> Result<()> {
        let to = self.root.join(name);
        if let Some(folder) = to.parent() {
            cache::create_folder(folder)?;
        }
        let mut strip = Command::new("strip");
        run::capture(strip.arg("--strip-debug").arg("-o").arg(to).arg(program)).map(drop)
    }

    fn copy_libraries(&self, system: &Path, libraries: &BTreeSet<PathBuf>) -> Result<()> {
        self.copy(&system.join(arch::LOADER_FILE), arch::LOADER)?;
        for library in libraries {
            self.copy(library, &inside(system, library))?;
        }
        Ok(())
    }

    /// Copies `modules` of the kernel `release`, with all they depend on, from the system
    /// unpacked in `system`, and lists them in `/etc/modules` for init to load.
    ///
    /// # Errors
    /// A module is not there, or `xz` or `depmod` fails.
    pub fn copy_modules(&self, system: &Path, release: &str, modules: &[Module]) -> Result<()> {
        let folder = format!("lib/modules/{release}");
        let from = system.join(&folder);
        depmod(system, release)?;
        let selection = KernelModules::read(&from)?.select(modules)?;
        for file in &selection.files {
            let name = format!("{folder}/{}", file.display());
            self.copy(&from.join(file), &name)?;
            self.decompress_module(&name)?;
        }
        for name in [
            "modules.order",
            "modules.builtin",
            "modules.builtin.modinfo",
        ] {
            self.copy(&from.join(name), &format!("{folder}/{name}"))?;
        }
        depmod(&self.root, release)?;
        self.write("etc/modules", &format!("{}\n", selection.names.join("\n")))
    }

    /// busybox's modprobe reads no compressed modules.
    fn decompress_module(&self, name: &str) -> Result<()> {
        if name.ends_with(".xz") {
            run::capture(Command::new("xz").arg("-d").arg(self.root.join(name)))?;
        }
        Ok(())
    }

    /// Makes `name` a symbolic link to `target`.
    ///
    /// # Errors
    /// The link cannot be made.
    pub fn link(&self, target: &str, name: &str) -> Result<()> {
        let path = self.root.join(name);
        std::os::unix::fs::symlink(target, &path).map_err(Error::file("link", &path))
    }

    /// Packs everything, owned by root, as a gzip-compressed cpio archive into `file`, to which
    /// further archives can be appended as they are.
    ///
    /// # Errors
    /// `cpio` or `gzip` fails.
    pub fn pack(&self, file: &Path, log: &Log) -> Result<()> {
        let archive = file.with_extension("cpio");
        self.archive(&archive)?;
        log.stage(
            "compressing the initramfs",
            Command::new("gzip").args(["-9", "-n", "-f"]).arg(&archive),
        )?;
        let compressed = file.with_extension("cpio.gz");
        pad(&compressed)?;
        fs::rename(&compressed, file).map_err(Error::file("rename", &compressed))
    }

    /// Writes everything, owned by root, as a cpio archive into `archive`.
    ///
    /// # Errors
    /// `cpio` fails.
    pub fn archive(&self, archive: &Path) -> Result<()> {
        let output = File::create(archive).map_err(Error::file("create", archive))?;
        let mut child = Command::new("cpio")
            .args(["-o", "-H", "newc", "-R", "0:0", "--quiet", "--reproducible"])
            .current_dir(&self.root)
            .stdin(Stdio::piped())
            .stdout(output)
            .spawn()
            .map_err(run::start_error("cpio"))?;
        if let Some(mut input) = child.stdin.take() {
            for name in entries(&self.root)? {
                writeln!(input, "{}", name.display()).map_err(run::start_error("cpio"))?;
            }
        }
        let status = child.wait().map_err(run::start_error("cpio"))?;
        if status.success() {
            return Ok(());
        }
        Err(Error::Program {
            program: "cpio".into(),
            status,
            output: String::new(),
        })
    }

    fn make_executable(&self, name: &str) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let path = self.root.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .map_err(Error::file("make executable", &path))
    }
}

/// Finds `program` in the usual folders of the system unpacked in `system`.
fn find_program(system: &Path, program: &str) -> Result<PathBuf> {
    ["bin", "sbin", "usr/bin", "usr/sbin"]
        .iter()
        .map(|folder| system.join(folder).join(program))
        .find(|path| path.exists())
        .ok_or_else(|| Error::Unusable(format!("none of the packages has {program}")))
}

/// Asks the dynamic loader of the unpacked system, not the host's, which libraries it would load.
fn libraries_of(system: &Path, program: &Path) -> Result<Vec<PathBuf>> {
    let folders: Vec<String> = arch::LIBRARY_FOLDERS
        .iter()
        .map(|folder| system.join(folder).display().to_string())
        .collect();
    let loader = system.join(arch::LOADER_FILE);
    if !run::succeeds(Command::new(&loader).arg("--verify").arg(program)) {
        return Ok(Vec::new()); // statically linked
    }
    let text = run::capture(
        Command::new(&loader)
            .args(["--library-path", &folders.join(":"), "--list"])
            .arg(program),
    )?;
    text.lines()
        .filter_map(|line| line.split_once(" => "))
        .map(|(name, found)| library(system, name, found))
        .collect()
}

/// Takes the library's path from what the loader lists, `/path/to/name (address)`.
fn library(system: &Path, name: &str, found: &str) -> Result<PathBuf> {
    let path = PathBuf::from(found.split(" (").next().unwrap_or(found));
    if path.starts_with(system) {
        return Ok(path);
    }
    Err(Error::Unusable(format!(
        "the library {} is not in {}",
        name.trim(),
        system.display()
    )))
}

/// The path of `file` inside `system`.
fn inside(system: &Path, file: &Path) -> String {
    let path = file.strip_prefix(system).unwrap_or(file);
    path.display().to_string()
}

fn depmod(root: &Path, release: &str) -> Result<()> {
    run::capture(
        Command::new("/sbin/depmod")
            .arg("-b")
            .arg(root)
            .arg(release),
    )
    .map(drop)
}

/// Lists everything below `root`, relative to it, folders before what is in them.
///
/// # Errors
/// A folder cannot be read.
pub fn entries(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![PathBuf::new()];
    let mut next = 0;
    while let Some(folder) = found.get(next).map(|name| root.join(name)) {
        if folder.is_dir() && !folder.is_symlink() {
            found.extend(children(root, &folder)?);
        }
        next += 1;
    }
    found.remove(0);
    Ok(found)
}

fn children(root: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::file("read", folder))? {
        let path = entry.map_err(Error::file("read", folder))?.path();
        names.push(path.strip_prefix(root).unwrap_or(&path).to_path_buf());
    }
    names.sort();
    Ok(names)
}

fn pad(path: &Path) -> Result<()> {
    let mut bytes = fs::read(path).map_err(Error::file("read", path))?;
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    fs::write(path, bytes).map_err(Error::file("write", path))
}
