// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What files take on disk, and whether they changed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes that `path`, a file or a folder of files, takes on disk once everything is written.
pub fn allocated_bytes(path: &Path) -> u64 {
    let mut files = files(path);
    // A socket has nothing that could be written.
    files.retain(|file| fs::symlink_metadata(file).unwrap().is_file());
    for file in &files {
        File::open(file).unwrap().sync_all().unwrap();
    }
    let blocks = |file: &PathBuf| fs::metadata(file).unwrap().blocks();
    files.iter().map(blocks).sum::<u64>() * 512
}

/// One line with a checksum for each file of the folder `path` whose name ends with one of `endings`.
pub fn checksums(path: &Path, endings: &[&str]) -> String {
    let mut files = files(path);
    files.retain(|file| {
        endings
            .iter()
            .any(|end| file.to_str().unwrap().ends_with(end))
    });
    assert!(!files.is_empty(), "{} has no files", path.display());
    let output = Command::new("sha256sum").args(&files).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Creates the file `path` of `size` bytes, all of it a hole.
pub fn create_sparse(path: &Path, size: u64) {
    File::create_new(path).unwrap().set_len(size).unwrap();
}

/// Makes holes of all blocks of the file `path` that hold only zeros.
pub fn dig_holes(path: &Path) {
    let mut dig = Command::new("fallocate");
    let status = dig.arg("--dig-holes").arg(path).status().unwrap();
    assert!(status.success(), "fallocate ended with {status}");
}

fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries: io::Result<Vec<_>> = fs::read_dir(path).unwrap().collect();
    let mut files: Vec<_> = entries.unwrap().iter().map(fs::DirEntry::path).collect();
    files.sort();
    files
}
