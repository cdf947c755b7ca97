// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Small filesystems on loop devices, to be filled up. Needs root.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::scratch::Scratch;
use crate::waiting::wait_until;

/// A filesystem that is unmounted when dropped.
#[derive(Debug)]
pub struct LoopMount {
    folder: Scratch,
    is_on_tmpfs: bool,
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("{program} is needed and cannot be run: {e}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?} failed (this test mounts a filesystem and needs root): {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl LoopMount {
    /// An ext4 filesystem of `mib` MiB, without blocks reserved for root.
    pub fn ext4(mib: u64) -> Self {
        Self::new(mib, &["mkfs.ext4", "-q", "-m", "0"])
    }

    /// An XFS filesystem of `mib` MiB (at least 300) that can share blocks.
    pub fn xfs(mib: u64) -> Self {
        Self::new(mib, &["mkfs.xfs", "-q", "-m", "reflink=1"])
    }

    /// An ext4 filesystem of `mib` MiB on a disk that stores no more than `stored_mib` MiB.
    pub fn ext4_on_tmpfs(mib: u64, stored_mib: u64) -> Self {
        let folder = Scratch::new();
        let size = format!("size={stored_mib}m");
        let at = folder.path("").to_str().unwrap().to_owned();
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", &at]);
        let mut mount = Self::within(folder, mib, &["mkfs.ext4", "-q", "-m", "0"]);
        mount.is_on_tmpfs = true;
        mount
    }

    fn new(mib: u64, mkfs: &[&str]) -> Self {
        Self::within(Scratch::new(), mib, mkfs)
    }

    fn within(folder: Scratch, mib: u64, mkfs: &[&str]) -> Self {
        let device = folder.path("device");
        let file = std::fs::File::create(&device).unwrap();
        file.set_len(mib << 20).unwrap();
        let device = device.to_str().unwrap().to_owned();
        let arguments: Vec<_> = mkfs[1..].iter().copied().chain([device.as_str()]).collect();
        run(mkfs[0], &arguments);
        let at = folder.path("mnt");
        std::fs::create_dir(&at).unwrap();
        run("mount", &["-o", "loop", &device, at.to_str().unwrap()]);
        Self {
            folder,
            is_on_tmpfs: false,
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.folder.path("mnt")
    }

    /// Has the disk of [`LoopMount::ext4_on_tmpfs`] fail each write to a place that it does not store yet.
    pub fn take_space_of_device(&self) {
        let file = std::fs::File::create(self.folder.path("ballast")).unwrap();
        for piece in [1 << 20, 4096] {
            while grow(&file, file.metadata().unwrap().len(), piece) {}
        }
    }

    /// Fills it with the file `name` until `left` bytes are free, and stay so: XFS gives the blocks of removed files back
    /// some time later.
    pub fn fill_up_to(&self, name: &str, left: u64) -> PathBuf {
        let path = self.path().join(name);
        let file = std::fs::File::create(&path).unwrap();
        let mut full_since = Instant::now();
        wait_until("the filesystem is full", Duration::from_secs(60), || {
            if self.fill_once(&file, left) {
                full_since = Instant::now();
            }
            full_since.elapsed() > Duration::from_secs(1)
        });
        path
    }

    /// Whether anything was added.
    fn fill_once(&self, file: &std::fs::File, left: u64) -> bool {
        let before = file.metadata().unwrap().len();
        // In pieces: what is free in one piece is not known.
        for piece in [16 << 20, 1 << 20, 64 << 10, 4096] {
            loop {
                let end = file.metadata().unwrap().len();
                if free(&self.path()) < left + piece || !grow(file, end, piece) {
                    break;
                }
            }
        }
        file.metadata().unwrap().len() > before
    }
}

fn grow(file: &std::fs::File, end: u64, piece: u64) -> bool {
    rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), end, piece).is_ok()
}

fn free(path: &Path) -> u64 {
    let stats = rustix::fs::statvfs(path).unwrap();
    stats.f_bavail * stats.f_frsize
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        // Lazily: a failing test may still have a backend in it.
        let umount = |path| Command::new("umount").arg("-l").arg(path).status();
        let _ = umount(self.path());
        if self.is_on_tmpfs {
            let _ = umount(self.folder.path(""));
        }
    }
}
