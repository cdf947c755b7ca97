// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A Linux guest that runs one script and powers off.
//!
//! The script is put into the initramfs of `cargo xtask guest`, which reports its exit status on the console. With it
//! goes `pcow-guest-io`, with the libraries of this machine, as the shell function `guest_io`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::backend::Backend;
use crate::program;
use crate::qemu::{PATIENCE, Qemu, Running, provided};
use crate::waiting::wait_until;

/// In front of every script. A script that fails anywhere fails as a whole.
const PRELUDE: &str = "\
set -eu
guest_io() { /guest/loader --library-path /guest /guest/pcow-guest-io \"$@\"; }
";

/// A guest that runs.
#[derive(Debug)]
pub struct Guest {
    qemu: Running,
}

/// What a guest that has ended well has left.
#[derive(Debug)]
pub struct Report {
    console: String,
}

impl Guest {
    /// Boots a guest on `machine`.
    pub fn boot(machine: Qemu, script: &str) -> Self {
        let initramfs = machine.file("initramfs");
        write_initramfs(&initramfs, script).unwrap();
        let machine = machine
            .args(&["-kernel".into(), provided("PCOW_GUEST_KERNEL")])
            .args(&["-initrd".into(), initramfs.into_os_string()])
            .args(&["-append", "console=ttyS0 quiet panic=-1"]);
        Self {
            qemu: machine.start(),
        }
    }

    /// Boots a guest on `machine` and waits for its good end.
    pub fn run(machine: Qemu, script: &str) -> Report {
        Self::boot(machine, script).finish()
    }

    /// Boots a guest on an image, with a backend of its own, and waits for the good end of both.
    pub fn run_on(image: &Path, machine: Qemu, script: &str) -> Report {
        let mut backend = Backend::start(image, &[]);
        let report = Self::run(machine.pcow(&backend), script);
        backend.wait_for_log("frontend detached");
        assert!(backend.terminate().success(), "{:#?}", backend.log());
        report
    }

    /// The machine it runs on.
    pub fn qemu(&mut self) -> &mut Running {
        &mut self.qemu
    }

    /// Waits until the console shows `text`.
    pub fn wait_for(&mut self, text: &str) {
        wait_until(&format!("the guest says '{text}'"), PATIENCE, || {
            let said = self.qemu.serial().contains(text);
            assert!(said || !self.qemu.has_ended(), "the guest ended before");
            said
        });
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If the script or QEMU failed.
    pub fn finish(mut self) -> Report {
        let status = self.qemu.wait();
        let console = self.qemu.serial();
        assert!(console.contains("PCOW-GUEST-EXIT 0\n"), "the script failed");
        assert!(status.success(), "QEMU ended with {status}");
        Report { console }
    }
}

impl Report {
    /// What follows `key: ` on the one line of the console that begins so.
    pub fn value(&self, key: &str) -> &str {
        let after = |line| str::strip_prefix(line, key)?.strip_prefix(": ");
        let mut values = self.console.lines().filter_map(after);
        let value = values.next();
        assert!(values.next().is_none(), "{key} twice:\n{}", self.console);
        value.unwrap_or_else(|| panic!("no {key}:\n{}", self.console))
    }
}

/// Writes the initramfs, with an archive of the script's files appended, to `path`.
fn write_initramfs(path: &Path, script: &str) -> io::Result<()> {
    let root = tempfile::tempdir()?;
    fs::write(root.path().join("script"), format!("{PRELUDE}{script}"))?;
    add_program(&root.path().join("guest"), &program("pcow-guest-io"))?;
    let mut initramfs = File::create(path)?;
    io::copy(
        &mut File::open(provided("PCOW_GUEST_INITRD"))?,
        &mut initramfs,
    )?;
    initramfs.write_all(&archive(root.path())?)
}

/// Copies `program`, its libraries and its loader into the new folder `to`.
fn add_program(to: &Path, program: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    fs::copy(program, to.join(program.file_name().unwrap()))?;
    for library in libraries(program)? {
        let name = library.file_name().unwrap().to_str().unwrap();
        let name = if name.starts_with("ld-") {
            "loader"
        } else {
            name
        };
        fs::copy(&library, to.join(name))?;
    }
    Ok(())
}

/// The libraries and the loader of `program`, as ldd(1) lists them: `name => path (address)` or `path (address)`.
fn libraries(program: &Path) -> io::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output()?;
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let path = |line: &str| {
        line.split_whitespace()
            .find(|word| word.starts_with('/'))
            .map(PathBuf::from)
    };
    Ok(text.lines().filter_map(path).collect())
}

fn archive(root: &Path) -> io::Result<Vec<u8>> {
    let output = Command::new("sh")
        .args(["-c", "find . | cpio -o -H newc -R 0:0 --quiet"])
        .current_dir(root)
        .output()?;
    assert!(output.status.success(), "{output:?}");
    Ok(output.stdout)
}
