// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Makes what a machine boots, a kernel and an initramfs, from Debian's packages.
//!
//! The packages are downloaded and unpacked, not installed. Does not know what the machine is for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::PrivateApt;
use crate::arch;
use crate::cache::{self, Cache};
use crate::error::{Error, Result};
use crate::initramfs::Initramfs;
use crate::modules::Module;
use crate::packages::{self, Step};
use crate::run::Log;
use crate::sources::{self, Archive};

/// What QEMU is given to boot.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs, to which further cpio archives can be appended as they are.
    pub initramfs: PathBuf,
}

/// What one kind of machine consists of.
#[derive(Debug)]
pub struct Recipe {
    /// The part of the cache in which the machine is kept.
    pub name: &'static str,
    /// Debian's packages that have the programs.
    pub packages: &'static [&'static str],
    /// The programs that the initramfs gets, with their libraries.
    pub programs: &'static [&'static str],
    /// The modules that init loads.
    pub modules: &'static [Module],
    /// The text of the init script.
    pub init: &'static str,
}

impl Recipe {
    /// Makes the machine, unless that was done, with the kernel of the Debian release `kernel`,
    /// else with the one of this machine's release, and returns the paths of its parts. Programs
    /// and libraries are always those of this machine's release.
    ///
    /// # Errors
    /// Packages are missing, nothing can be fetched, or a program that packs fails.
    pub fn build(&self, cache: &Cache, kernel: Option<&str>) -> Result<Boot> {
        let _lock = cache.lock(self.name)?;
        let folder = cache.folder(self.name)?;
        let codename = sources::host_codename()?;
        let kernel = kernel.unwrap_or(&codename);
        let finished = folder.join(self.key(&codename, kernel)?);
        if !finished.exists() {
            let log = Log::create(&folder.join("log"))?;
            packages::ensure(&[Step::Guest], &log)?;
            let work = folder.join("work");
            let system = System::fetch(&work, [&codename, kernel], self.packages, &log)?;
            let part = folder.join("part");
            cache::remove_folder(&part)?;
            cache::create_folder(&part)?;
            self.make(&system, &part, &log)?;
            fs::rename(&part, &finished).map_err(Error::file("rename", &part))?;
            cache::remove_folder(&work)?;
        }
        Ok(Boot {
            kernel: finished.join("vmlinuz"),
            initramfs: finished.join("initramfs.gz"),
        })
    }

    /// The packages' versions are no part of it: what was made once stays.
    fn key(&self, codename: &str, kernel: &str) -> Result<String> {
        let mut parts = vec![codename, kernel, arch::KERNEL_PACKAGE, self.init];
        parts.extend(self.packages);
        parts.extend(self.programs);
        parts.extend(self.modules.iter().map(|module| module.name));
        cache::key(&parts)
    }

    /// Makes kernel and initramfs in `folder` from the packages in `system`.
    fn make(&self, system: &System, folder: &Path, log: &Log) -> Result<()> {
        let initramfs = Initramfs::create(&system.work.join("initramfs"), self.init)?;
        // The kernel calls modprobe by this name when it wants a module itself.
        initramfs.link("/bin/busybox", "sbin/modprobe")?;
        initramfs.copy_programs(&system.root, self.programs)?;
        initramfs.copy_modules(&system.root, &system.kernel_release, self.modules)?;
        initramfs.pack(&folder.join("initramfs.gz"), log)?;
        let kernel = system
            .root
            .join(format!("boot/vmlinuz-{}", system.kernel_release));
        fs::copy(&kernel, folder.join("vmlinuz")).map_err(Error::file("copy", &kernel))?;
        Ok(())
    }
}

/// Debian's packages, unpacked but not installed, and a kernel.
#[derive(Debug)]
struct System {
    work: PathBuf,
    root: PathBuf,
    kernel_release: String,
}

impl System {
    /// Downloads `packages` and what they depend on from the first release, the current kernel
    /// from the second, and unpacks them all. `work` is emptied.
    fn fetch(
        work: &Path,
        [programs, kernel]: [&str; 2],
        packages: &[&str],
        log: &Log,
    ) -> Result<Self> {
        cache::remove_folder(work)?;
        let mut files =
            apt_of(&work.join("apt"), programs, log)?.download_with_dependencies(packages, log)?;
        // The kernel's dependencies would bring what makes initramfs images.
        let apt = apt_of(&work.join("apt-kernel"), kernel, log)?;
        let kernel = kernel_package(&apt)?;
        files.push(apt.download(&kernel, &work.join("kernel"), log)?);
        let root = work.join("root");
        unpack(&files, &root, log)?;
        Ok(Self {
            work: work.to_path_buf(),
            root,
            kernel_release: kernel.trim_start_matches("linux-image-").to_string(),
        })
    }
}

/// Makes an apt in `folder` that knows the packages of the Debian release `codename`.
fn apt_of(folder: &Path, codename: &str, log: &Log) -> Result<PrivateApt> {
    let archive = Archive::of_host(&sources::host_codename()?)?;
    let apt = PrivateApt::create(folder, &archive.stanza("deb", codename))?;
    apt.update(log)?;
    Ok(apt)
}

/// Finds the package of the current kernel, which is named after the kernel's release.
fn kernel_package(apt: &PrivateApt) -> Result<String> {
    apt.dependencies(arch::KERNEL_PACKAGE)?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| Error::Unusable(format!("{} names no kernel", arch::KERNEL_PACKAGE)))
}

fn unpack(files: &[PathBuf], root: &Path, log: &Log) -> Result<()> {
    // In Debian 13 these are links that only an installation makes.
    for name in ["bin", "lib", "lib64", "sbin"] {
        cache::create_folder(&root.join("usr").join(name))?;
        let link = root.join(name);
        std::os::unix::fs::symlink(format!("usr/{name}"), &link)
            .map_err(Error::file("link", &link))?;
    }
    let script = "for file; do dpkg-deb --fsys-tarfile \"$file\" | \
                  tar -x --keep-directory-symlink --no-same-owner -C \"$0\" || exit; done";
    log.stage(
        &format!("unpacking {} packages", files.len()),
        Command::new("bash")
            .args(["-o", "pipefail", "-c", script])
            .arg(root)
            .args(files),
    )
}
