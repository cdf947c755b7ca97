// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The Debian packages that each step needs on this machine, and their installation.
//!
//! Installs only from the suites the system already has; never changes its apt sources.

use std::process::Command;

use crate::error::{Error, Result};
use crate::run::{self, Log};

/// A step that needs packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Fetching and building QEMU.
    Qemu,
    /// Making the guest's kernel and initramfs.
    Guest,
    /// Running the tests.
    Test,
    /// Making and running the lab host.
    Lab,
    /// Showing the demo.
    Demo,
    /// Measuring what others do, too.
    Bench,
}

use Step::{Bench, Demo, Guest, Lab, Qemu, Test};

/// Every package, the steps that need it, and what for.
const TABLE: &[(&str, &[Step], &str)] = &[
    ("binutils", &[Lab], "stripping programs"),
    ("bison", &[Qemu], "configure"),
    ("bzip2", &[Qemu], "configure"),
    ("ca-certificates", &[Qemu, Guest], "fetching"),
    ("cpio", &[Demo, Guest, Lab, Test], "writing an initramfs"),
    ("dpkg-dev", &[Qemu], "unpacking a source package"),
    ("e2fsprogs", &[Test], "making ext4 filesystems"),
    ("flex", &[Qemu], "configure"),
    ("gcc", &[Lab, Qemu, Test], "compiling and linking"),
    ("kmod", &[Guest], "depmod"),
    ("libaio-dev", &[Qemu], "asynchronous I/O"),
    ("libc6-dev", &[Lab, Qemu, Test], "compiling and linking"),
    ("libfdt-dev", &[Qemu], "the machine types"),
    ("libglib2.0-dev", &[Qemu], "QEMU's base library"),
    ("libnuma-dev", &[Qemu], "memory policies"),
    ("libpixman-1-dev", &[Qemu], "the display core"),
    ("libslirp-dev", &[Qemu], "user networking"),
    ("liburing-dev", &[Qemu], "asynchronous I/O"),
    ("make", &[Qemu], "configure"),
    ("patch", &[Qemu], "the patch series"),
    ("pkg-config", &[Qemu], "configure"),
    ("python3-venv", &[Qemu], "meson and ninja"),
    ("qemu-system-data", &[Demo, Lab, Test], "firmware"),
    ("qemu-utils", &[Bench, Test], "comparing with qemu-img"),
    ("seabios", &[Demo, Lab, Test], "firmware"),
    ("strace", &[Test], "killing processes at their system calls"),
    ("swtpm", &[Test], "a TPM for guests"),
    ("xfsprogs", &[Test], "making XFS filesystems"),
    ("xz-utils", &[Qemu, Guest], "unpacking"),
    ("zlib1g-dev", &[Qemu], "compression"),
];

/// Makes sure that everything `steps` need is installed; as root, installs what is missing.
///
/// # Errors
/// Not root and something is missing: the error carries the command to run. Or the installation
/// fails.
pub fn ensure(steps: &[Step], log: &Log) -> Result<()> {
    let missing = missing(steps)?;
    if missing.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Packages {
            command: format!(
                "apt-get update && apt-get install -y --no-install-recommends {}",
                missing.join(" ")
            ),
        });
    }
    install(&missing, log)
}

fn install(packages: &[&str], log: &Log) -> Result<()> {
    log.stage(
        "updating package lists",
        Command::new("apt-get").arg("update"),
    )?;
    log.stage(
        &format!("installing {}", packages.join(" ")),
        Command::new("apt-get")
            .args(["install", "-y", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

fn missing(steps: &[Step]) -> Result<Vec<&'static str>> {
    let mut missing = Vec::new();
    for package in needed(steps) {
        if !installed(package)? {
            missing.push(package);
        }
    }
    Ok(missing)
}

fn needed(steps: &[Step]) -> impl Iterator<Item = &'static str> {
    TABLE
        .iter()
        .filter(|(_, users, _)| users.iter().any(|user| steps.contains(user)))
        .map(|(package, _, _)| *package)
}

/// `dpkg-query` fails for a package that the system has never heard of.
fn installed(package: &str) -> Result<bool> {
    let query = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status} ", package])
        .output()
        .map_err(run::start_error("dpkg-query"))?;
    let states = String::from_utf8_lossy(&query.stdout);
    Ok(states.split_whitespace().any(|state| state == "installed"))
}

#[cfg(test)]
mod tests {
    use super::{Step, TABLE, needed};

    #[test]
    fn the_table_is_sorted_and_names_each_package_once() {
        assert!(TABLE.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn a_step_gets_only_its_own_packages() {
        assert!(needed(&[Step::Guest]).any(|name| name == "kmod"));
        assert!(!needed(&[Step::Guest]).any(|name| name == "flex"));
    }
}
