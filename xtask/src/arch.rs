// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything that depends on the processor architecture, for the one supported so far: amd64.

/// Debian's name of the architecture.
pub const DEBIAN: &str = "amd64";

/// Debian's package that depends on the current kernel image.
pub const KERNEL_PACKAGE: &str = "linux-image-amd64";

/// QEMU's build target.
pub const QEMU_TARGET: &str = "x86_64-softmmu";

/// The emulator that this target builds.
pub const QEMU_BINARY: &str = "qemu-system-x86_64";

/// The dynamic loader as programs name it, relative to a root folder.
pub const LOADER: &str = "lib64/ld-linux-x86-64.so.2";

/// The file that Debian's C library package makes this name a link to.
pub const LOADER_FILE: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

/// Folders with shared libraries, relative to a root folder.
pub const LIBRARY_FOLDERS: &[&str] = &[
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "lib64",
    "usr/lib64",
];

/// Folders with the firmware that QEMU loads (`-L`), in search order.
pub const FIRMWARE_FOLDERS: &[&str] = &["/usr/share/seabios", "/usr/share/qemu"];

/// The files of [`FIRMWARE_FOLDERS`] that a machine needs to boot a kernel under KVM.
pub const BOOT_FIRMWARE: &[&str] = &[
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
];
