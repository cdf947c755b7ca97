// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is appended to the lab host's initramfs: the patched QEMU, the programs of this workspace,
//! the guest that runs inside, and the scripts of `tests/lab`.
//!
//! ```text
//! /script                      runs /lab/host.sh
//! /lab/                        tests/lab, pcow-backend, pcow-img, pcow-bench
//! /lab/deps/<package>.<test>   tests; they find programs one folder up
//! /lab/machine/                kernel and initramfs of the guest inside, with pcow-guest-io
//! /usr/bin/qemu-system-x86_64  and firmware where that QEMU looks for it
//! ```

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::arch;
use crate::boot::Boot;
use crate::error::{Error, Result};
use crate::initramfs::Initramfs;
use crate::lab::programs::Programs;
use crate::run;
use crate::vmlinux;

/// What the guest inside loads at its start, instead of all it has: others take seconds there. Its
/// scripts load what else they need.
const GUEST_MODULES: &[&str] = &["libnvdimm", "nfit", "nd_btt", "nd_pmem", "ext4"];

/// What goes in.
#[derive(Debug)]
pub struct Contents {
    /// The patched QEMU.
    pub qemu: PathBuf,
    /// The guest inside.
    pub guest: Boot,
    /// The programs of this workspace.
    pub programs: Programs,
}

impl Contents {
    /// Writes the lab host `base` with these contents into `folder`.
    ///
    /// # Errors
    /// A file is not there or cannot be written, or a program that packs fails.
    pub fn add_to(&self, base: &Boot, folder: &Path) -> Result<Boot> {
        let addition = Initramfs::addition(&folder.join("contents"))?;
        self.copy_to(&addition)?;
        let inner = folder.join("guest-initramfs");
        self.write_guest(&folder.join("guest-contents"), &inner)?;
        addition.copy(&inner, "lab/machine/initramfs")?;
        let kernel = folder.join("vmlinux");
        vmlinux::extract(&self.guest.kernel, &kernel)?;
        addition.copy_built(&[(kernel.as_path(), "lab/machine/vmlinux".to_string())])?;
        let archive = folder.join("contents.cpio");
        addition.archive(&archive)?;
        let initramfs = folder.join("initramfs");
        join(&[&base.initramfs, &archive], &initramfs)?;
        Ok(Boot {
            kernel: base.kernel.clone(),
            initramfs,
        })
    }

    /// Writes the initramfs of the guest inside.
    fn write_guest(&self, folder: &Path, initramfs: &Path) -> Result<()> {
        let addition = Initramfs::addition(folder)?;
        addition.copy_built(&[(
            self.programs.guest.as_path(),
            "usr/bin/guest_io".to_string(),
        )])?;
        addition.write("etc/modules", &format!("{}\n", GUEST_MODULES.join("\n")))?;
        let archive = folder.with_extension("cpio");
        addition.archive(&archive)?;
        join(&[&self.guest.initramfs, &archive], initramfs)
    }

    fn copy_to(&self, addition: &Initramfs) -> Result<()> {
        let mut built = vec![(
            self.qemu.as_path(),
            format!("usr/bin/{}", arch::QEMU_BINARY),
        )];
        for program in &self.programs.host {
            built.push((&program.path, format!("lab/{}", program.name)));
        }
        addition.copy_built(&built)?;
        for file in arch::BOOT_FIRMWARE.iter().chain([&vmlinux::FIRMWARE]) {
            addition.copy(Path::new(file), file.trim_start_matches('/'))?;
        }
        copy_scripts(addition)?;
        addition.write("script", "exec sh /lab/host.sh\n")
    }
}

fn copy_scripts(addition: &Initramfs) -> Result<()> {
    let root = run::repository().join("tests/lab");
    for name in crate::initramfs::entries(&root)? {
        let path = root.join(&name);
        if path.is_file() {
            addition.copy(&path, &format!("lab/{}", name.display()))?;
        }
    }
    Ok(())
}

/// Writes `parts`, one behind the other, to `whole`.
fn join(parts: &[&Path], whole: &Path) -> Result<()> {
    let mut to = File::create(whole).map_err(Error::file("create", whole))?;
    for part in parts {
        let mut from = File::open(part).map_err(Error::file("open", part))?;
        io::copy(&mut from, &mut to).map_err(Error::file("write", whole))?;
    }
    Ok(())
}
