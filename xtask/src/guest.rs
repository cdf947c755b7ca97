// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask guest`: makes the kernel and the initramfs that test guests boot.
//!
//! Everything comes from Debian's packages, which are downloaded and unpacked, not installed.
//! The initramfs is generic: it runs the `/script` of a second archive, which a test appends to
//! it, and reports that script's status on the console as `PCOW-GUEST-EXIT <status>`.

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

/// Arguments of `cargo xtask guest`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print nothing but the two paths on standard output, the kernel's first
    #[arg(long)]
    print_paths: bool,
}

/// What QEMU is given to boot.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs, to which further cpio archives can be appended as they are.
    pub initramfs: PathBuf,
}

/// What one kind of machine consists of.
struct Recipe {
    packages: &'static [&'static str],
    programs: &'static [&'static str],
    modules: &'static [Module],
    init: &'static str,
}

const fn module(name: &'static str) -> Module {
    Module {
        name,
        optional: false,
    }
}

const fn optional(name: &'static str) -> Module {
    Module {
        name,
        optional: true,
    }
}

const GUEST: Recipe = Recipe {
    packages: &["busybox-static", "e2fsprogs", "ndctl", "xfsprogs"],
    programs: &[
        "busybox",
        "dumpe2fs",
        "e2fsck",
        "mke2fs",
        "mkfs.ext4",
        "mkfs.xfs",
        "ndctl",
        "xfs_db",
        "xfs_io",
        "xfs_repair",
    ],
    modules: &[
        // Metadata checksums of both filesystems ask for it by another name.
        optional("crc32c_generic"),
        optional("crc32c_intel"),
        module("libnvdimm"),
        module("nfit"),
        module("nd_btt"),
        module("nd_pmem"),
        module("dax"),
        module("device_dax"),
        module("dax_pmem"),
        module("virtio"),
        module("virtio_pci"),
        module("virtio_blk"),
        module("virtio_net"),
        module("virtio_pmem"),
        module("ext4"),
        module("xfs"),
    ],
    init: include_str!("guest-init.sh"),
};

/// Makes the guest and prints where its parts are.
///
/// # Errors
/// As [`build`].
pub fn command(cache: &Cache, arguments: &Arguments) -> Result<()> {
    let guest = build(cache)?;
    let (kernel, initramfs) = (guest.kernel.display(), guest.initramfs.display());
    if arguments.print_paths {
        println!("{kernel}\n{initramfs}");
    } else {
        println!("kernel: {kernel}\ninitramfs: {initramfs}");
    }
    Ok(())
}

/// Makes the guest, unless that was done, and returns the paths of its parts.
///
/// # Errors
/// Packages are missing, nothing can be fetched, or a program that packs fails.
pub fn build(cache: &Cache) -> Result<Guest> {
    let _lock = cache.lock("guest")?;
    let folder = cache.folder("guest")?;
    let codename = sources::host_codename()?;
    let finished = folder.join(GUEST.key(&codename)?);
    if !finished.exists() {
        let log = Log::create(&folder.join("log"))?;
        packages::ensure(&[Step::Guest], &log)?;
        let system = System::fetch(&folder.join("work"), &codename, GUEST.packages, &log)?;
        let part = folder.join("part");
        cache::remove_folder(&part)?;
        cache::create_folder(&part)?;
        GUEST.make(&system, &part, &log)?;
        fs::rename(&part, &finished).map_err(Error::file("rename", &part))?;
        cache::remove_folder(&folder.join("work"))?;
    }
    Ok(Guest {
        kernel: finished.join("vmlinuz"),
        initramfs: finished.join("initramfs.gz"),
    })
}

impl Recipe {
    /// The packages' versions are no part of it: what was made once stays.
    fn key(&self, codename: &str) -> Result<String> {
        let mut parts = vec![codename, arch::KERNEL_PACKAGE, self.init];
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
    /// Downloads `packages`, what they depend on, and the current kernel, and unpacks them all.
    /// `work` is emptied.
    fn fetch(work: &Path, codename: &str, packages: &[&str], log: &Log) -> Result<Self> {
        cache::remove_folder(work)?;
        let stanza = Archive::of_host(codename)?.stanza("deb", codename);
        let apt = PrivateApt::create(&work.join("apt"), &stanza)?;
        apt.update(log)?;
        let kernel = kernel_package(&apt)?;
        let mut files = apt.download_with_dependencies(packages, log)?;
        // The kernel's dependencies would bring what makes initramfs images.
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
