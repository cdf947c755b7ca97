// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An emulated TPM 2.0 (swtpm) for a machine.

use std::path::PathBuf;
use std::process::{Child, Command};

use crate::qemu::{PATIENCE, Qemu, with_path};
use crate::waiting::wait_until;

/// A running swtpm; killed when dropped.
#[derive(Debug)]
pub struct Tpm {
    child: Child,
    socket: PathBuf,
}

impl Tpm {
    /// Starts a new TPM, with its state in the new folder `folder`.
    pub fn start(folder: PathBuf) -> Self {
        std::fs::create_dir(&folder).unwrap();
        let socket = folder.join("control");
        let mut child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--tpmstate"])
            .arg(with_path("dir=", &folder))
            .arg("--ctrl")
            .arg(with_path("type=unixio,path=", &socket))
            .spawn()
            .unwrap_or_else(|e| panic!("swtpm (the package swtpm) cannot be started: {e}"));
        wait_until("the TPM listens", PATIENCE, || {
            assert!(child.try_wait().unwrap().is_none(), "swtpm ended instead");
            socket.exists()
        });
        Self { child, socket }
    }

    /// Adds it to a machine that says which memory it clears.
    pub fn add_to(&self, machine: Qemu) -> Qemu {
        machine
            .args(&[
                "-chardev".into(),
                with_path("socket,id=tpm,path=", &self.socket),
            ])
            .args(&["-tpmdev", "emulator,id=tpm0,chardev=tpm"])
            .args(&["-device", "tpm-tis,tpmdev=tpm0"])
            .args(&["-trace", "tpm_ppi_memset"])
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        // It ends by itself when its machine does.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
