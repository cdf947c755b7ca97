// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask qemu`: fetches, patches and builds QEMU.
//!
//! ```text
//! apt ──▶ source/ ──▶ pristine/ ──(series)──▶ tree/ ──(ninja)──▶ build/ ──(strip)──▶ bin/<key>/
//! ```
//! The key covers source version, configuration and patches. There is one tree and one build
//! folder: after a change of a patch only the files it touches are compiled again.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::apt::PrivateApt;
use crate::arch;
use crate::cache::{self, Cache};
use crate::error::{Error, Result};
use crate::packages::{self, Step};
use crate::run::{self, Log};
use crate::series::{Files, Series};
use crate::sources::{self, Archive};

/// The Debian release whose source package is built, and the QEMU version it has.
const RELEASE: &str = "trixie";
const VERSION_PREFIX: &str = "10.0.";

/// What configure is told, besides target, folders and Python.
const CONFIGURE: &[&str] = &[
    "--without-default-features",
    "--disable-docs",
    "--disable-install-blobs",
    "--disable-werror",
    "--enable-system",
    "--enable-kvm",
    "--enable-tcg",
    "--enable-fdt=system",
    "--enable-slirp",
    "--enable-tpm",
    "--enable-pixman",
    "--enable-numa",
    "--enable-linux-aio",
    "--enable-linux-io-uring",
    "--enable-vhost-kernel",
    "--enable-vhost-net",
    "--enable-vhost-user",
];

/// What is applied, in this order: what pcow needs, and what the emulator of the lab host needs.
const PATCH_FOLDERS: &[&str] = &["qemu-patch", "qemu-patch/emulator"];

/// QEMU's build tools; Debian 12's are too old.
const PYTHON_PACKAGES: &[&str] = &["meson>=1.5,<2", "ninja>=1.11"];

/// Arguments of `cargo xtask qemu`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print nothing but the binary's path on standard output
    #[arg(long)]
    print_path: bool,
}

/// Builds QEMU and prints where the binary is.
///
/// # Errors
/// As [`build`].
pub fn command(cache: &Cache, arguments: &Arguments) -> Result<()> {
    let binary = build(cache)?;
    if arguments.print_path {
        println!("{}", binary.display());
    } else {
        println!("QEMU: {}", binary.display());
        println!("firmware (-L): {}", arch::FIRMWARE_FOLDERS.join(", "));
    }
    Ok(())
}

/// Builds QEMU, unless that was done, and returns the binary's path.
///
/// # Errors
/// Packages are missing, nothing can be fetched, a patch does not apply, or a build step fails.
pub fn build(cache: &Cache) -> Result<PathBuf> {
    let _lock = cache.lock("qemu")?;
    let builder = Builder::new(cache)?;
    match env::var_os("QEMU_SRC") {
        Some(source) => builder.build_own_tree(Path::new(&source)),
        None => builder.build_debian(),
    }
}

#[derive(Debug)]
struct Builder {
    folder: PathBuf,
    log: Log,
    series: Series,
    codename: String,
}

impl Builder {
    fn new(cache: &Cache) -> Result<Self> {
        let folder = cache.folder("qemu")?;
        let patches: Vec<_> = PATCH_FOLDERS
            .iter()
            .map(|folder| run::repository().join(folder))
            .collect();
        Ok(Self {
            log: Log::create(&folder.join("log"))?,
            series: Series::read(&patches)?,
            codename: sources::host_codename()?,
            folder,
        })
    }

    fn build_debian(&self) -> Result<PathBuf> {
        self.make_pristine()?;
        let bin = self.folder.join("bin").join(self.key()?);
        let binary = bin.join(arch::QEMU_BINARY);
        if !binary.exists() {
            packages::ensure(&[Step::Qemu], &self.log)?;
            let tree = self.make_tree()?;
            let build = self.folder.join("build");
            self.compile(&tree, &build, &["--disable-download"])?;
            cache::create_folder(&bin)?;
            self.strip(&build.join(arch::QEMU_BINARY), &binary)?;
        }
        Ok(binary)
    }

    fn build_own_tree(&self, source: &Path) -> Result<PathBuf> {
        let source = fs::canonicalize(source).map_err(Error::file("find", source))?;
        packages::ensure(&[Step::Qemu], &self.log)?;
        if !self.series.is_applied(&source) {
            let staging = self.folder.join("staging");
            self.series
                .apply(&source, &source, &staging, &Files::new())?;
        }
        let name = cache::key(&[source.as_os_str().as_encoded_bytes()])?;
        let build = self.folder.join(format!("build-own-{name}"));
        self.compile(&source, &build, &[])?;
        Ok(build.join(arch::QEMU_BINARY))
    }

    /// Fetches and unpacks the source package. What was fetched once stays.
    fn make_pristine(&self) -> Result<()> {
        let pristine = self.folder.join("pristine");
        if pristine.exists() {
            return Ok(());
        }
        packages::ensure(&[Step::Qemu], &self.log)?;
        let description = self.fetch()?;
        let part = self.folder.join("pristine.part");
        cache::remove_folder(&part)?;
        // apt has checked the files against the signed lists.
        self.log.stage(
            "unpacking QEMU",
            Command::new("dpkg-source")
                .args(["--no-check", "-x"])
                .arg(description)
                .arg(&part),
        )?;
        fs::rename(&part, &pristine).map_err(Error::file("rename", &part))
    }

    /// Downloads the source package and returns its `.dsc` file.
    fn fetch(&self) -> Result<PathBuf> {
        let stanza = Archive::of_host(&self.codename)?.stanza("deb-src", RELEASE);
        let apt = PrivateApt::create(&self.folder.join("apt"), &stanza)?;
        apt.update(&self.log)?;
        let source = self.folder.join("source");
        cache::remove_folder(&source)?;
        cache::create_folder(&source)?;
        apt.download_source("qemu", &source, &self.log)?;
        fs::read_dir(&source)
            .map_err(Error::file("read", &source))?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "dsc"))
            .ok_or_else(|| Error::Unusable("apt-get brought no source package of QEMU".into()))
    }

    /// The binary's key: a change of anything in it means another binary.
    fn key(&self) -> Result<String> {
        let version = self.version()?;
        let configuration = self.configuration_key()?;
        let mut parts = vec![version.as_bytes(), configuration.as_bytes()];
        parts.extend(self.series.contents());
        cache::key(&parts)
    }

    /// The host's release is part of it, because the libraries that are linked come from there.
    fn configuration_key(&self) -> Result<String> {
        let mut parts = vec![self.codename.as_str(), arch::QEMU_TARGET];
        parts.extend(CONFIGURE);
        parts.extend(arch::FIRMWARE_FOLDERS);
        cache::key(&parts)
    }

    /// Reads the source package's version from the first line of its changelog.
    fn version(&self) -> Result<String> {
        let path = self.folder.join("pristine/debian/changelog");
        let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        let version = text
            .split_once('(')
            .and_then(|(_, rest)| rest.split_once(')'))
            .map(|(version, _)| version.to_string())
            .unwrap_or_default();
        let upstream = version.split_once(':').map_or(&*version, |(_, rest)| rest);
        if !upstream.starts_with(VERSION_PREFIX) {
            return Err(Error::Unusable(format!(
                "Debian {RELEASE} has QEMU {version}, and {VERSION_PREFIX}x is needed"
            )));
        }
        Ok(version)
    }

    /// Makes `tree`, the pristine source with the series applied.
    fn make_tree(&self) -> Result<PathBuf> {
        let pristine = self.folder.join("pristine");
        let tree = self.folder.join("tree");
        if !tree.exists() {
            copy_tree(&pristine, &tree, &self.log)?;
        }
        let before = self.recorded_changes()?;
        let wanted = self.series.files()?;
        // Both old and new files are on record until the tree is complete.
        self.record_changes(&before.union(&wanted).cloned().collect())?;
        let staging = self.folder.join("staging");
        self.series.apply(&pristine, &tree, &staging, &before)?;
        self.record_changes(&wanted)?;
        Ok(tree)
    }

    /// The files in which `tree` may differ from `pristine`.
    fn recorded_changes(&self) -> Result<Files> {
        let path = self.changes_path();
        if !path.exists() {
            return Ok(Files::new());
        }
        let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        Ok(text.lines().map(PathBuf::from).collect())
    }

    fn record_changes(&self, files: &Files) -> Result<()> {
        let path = self.changes_path();
        let text: String = files
            .iter()
            .map(|file| format!("{}\n", file.display()))
            .collect();
        fs::write(&path, text).map_err(Error::file("write", &path))
    }

    fn changes_path(&self) -> PathBuf {
        self.folder.join("tree.changed")
    }

    /// Configures if need be and compiles `source` in `build`.
    fn compile(&self, source: &Path, build: &Path, more: &[&str]) -> Result<()> {
        let venv = self.make_venv()?;
        let wanted = self.configuration_key()?;
        let mark = build.join("configured");
        if !is_marked(&mark, &wanted) {
            self.configure(source, build, &venv, more)?;
            fs::write(&mark, &wanted).map_err(Error::file("write", &mark))?;
        }
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        let ninja = venv.join("bin/ninja");
        // When a patch changes a build description, ninja runs meson, which looks for ninja again.
        self.log.stage(
            "compiling QEMU",
            Command::new(&ninja)
                .env("NINJA", &ninja)
                .arg("-C")
                .arg(build)
                .arg(format!("-j{jobs}"))
                .arg(arch::QEMU_BINARY),
        )
    }

    fn configure(&self, source: &Path, build: &Path, venv: &Path, more: &[&str]) -> Result<()> {
        cache::remove_folder(build)?;
        cache::create_folder(build)?;
        let firmware = arch::FIRMWARE_FOLDERS.join(":");
        self.log.stage(
            "configuring QEMU",
            Command::new(source.join("configure"))
                .current_dir(build)
                .arg(format!("--python={}", venv.join("bin/python3").display()))
                .arg(format!("--ninja={}", venv.join("bin/ninja").display()))
                .arg(format!("--target-list={}", arch::QEMU_TARGET))
                .arg(format!("--firmwarepath={firmware}"))
                .args(CONFIGURE)
                .args(more),
        )
    }

    /// Makes a virtual environment with the build tools.
    fn make_venv(&self) -> Result<PathBuf> {
        let venv = self.folder.join("venv");
        let mark = venv.join("complete");
        let wanted = format!("{} {}", self.codename, PYTHON_PACKAGES.join(" "));
        if is_marked(&mark, &wanted) {
            return Ok(venv);
        }
        cache::remove_folder(&venv)?;
        self.log.stage(
            "making a Python environment",
            Command::new("/usr/bin/python3")
                .args(["-m", "venv"])
                .arg(&venv),
        )?;
        self.log.stage(
            "installing meson and ninja",
            Command::new(venv.join("bin/pip"))
                .arg("install")
                .args(PYTHON_PACKAGES),
        )?;
        fs::write(&mark, &wanted).map_err(Error::file("write", &mark))?;
        Ok(venv)
    }

    /// Drops the debugging information, which is most of the file, and keeps the symbols.
    fn strip(&self, built: &Path, binary: &Path) -> Result<()> {
        let part = binary.with_extension("part");
        self.log.stage(
            "stripping QEMU",
            Command::new("strip")
                .args(["--strip-debug", "-o"])
                .arg(&part)
                .arg(built),
        )?;
        fs::rename(&part, binary).map_err(Error::file("rename", &part))
    }
}

fn copy_tree(from: &Path, to: &Path, log: &Log) -> Result<()> {
    let part = to.with_extension("part");
    cache::remove_folder(&part)?;
    log.stage(
        "copying QEMU's source",
        Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(from)
            .arg(&part),
    )?;
    fs::rename(&part, to).map_err(Error::file("rename", &part))
}

fn is_marked(mark: &Path, wanted: &str) -> bool {
    fs::read_to_string(mark).is_ok_and(|found| found == wanted)
}
