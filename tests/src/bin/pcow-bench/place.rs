// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where is measured: a folder and the filesystem that it is really on.

use std::path::{Path, PathBuf};

/// A folder to measure in.
#[derive(Debug, Clone)]
pub struct Place {
    /// The folder.
    pub dir: PathBuf,
    /// Type of its filesystem, as the kernel calls it.
    pub filesystem: String,
}

impl Place {
    /// The folder `dir`.
    pub fn new(dir: &Path) -> Self {
        let dir = dir.canonicalize().unwrap();
        let filesystem = filesystem(&dir);
        Self { dir, filesystem }
    }
}

/// The type of the mount with the longest path above `dir` (proc_pid_mounts(5)).
fn filesystem(dir: &Path) -> String {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let entry = |line: &str| -> Option<(usize, String)> {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        let kind = fields.next()?.to_owned();
        dir.starts_with(path).then_some((path.len(), kind))
    };
    // Of mounts on one path the last one shows.
    let found = mounts.lines().filter_map(entry).max_by_key(|(len, _)| *len);
    found.map_or_else(|| "unknown".to_owned(), |(_, kind)| kind)
}
