// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask guest`: makes the kernel and the initramfs that test guests boot.
//!
//! The initramfs is generic: it runs the `/script` of a second archive, which a test appends to
//! it, and reports that script's status on the console as `PCOW-GUEST-EXIT <status>`.

use crate::boot::{Boot, Recipe};
use crate::cache::Cache;
use crate::error::Result;
use crate::modules::{module, optional};

/// Arguments of `cargo xtask guest`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print nothing but the two paths on standard output, the kernel's first
    #[arg(long)]
    print_paths: bool,
}

/// Loads the modules and runs `/script`.
pub const INIT: &str = include_str!("guest-init.sh");

const GUEST: Recipe = Recipe {
    name: "guest",
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
        module("virtio_balloon"),
        module("virtio_blk"),
        module("virtio_net"),
        module("virtio_pmem"),
        module("ext4"),
        module("xfs"),
    ],
    init: INIT,
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
/// As [`Recipe::build`].
pub fn build(cache: &Cache) -> Result<Boot> {
    GUEST.build(cache, None)
}
