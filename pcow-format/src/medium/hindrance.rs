// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why a file on a device for DAX is in the page cache all the same. For people: nothing is decided by it.

use std::fs::{self, File};
use std::path::PathBuf;

use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};

use super::dax;

/// What keeps a file from DAX.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hindrance {
    /// The filesystem does not serve it with DAX: by its mount option, or by the file's own flag.
    NotEnabled,
    /// It is served with DAX, but the device grants no synchronous mappings.
    NotSynchronous,
    /// The processor has no instruction that a program may write a line back with.
    NoWriteBack,
}

impl Hindrance {
    /// The hindrance of `file`, which is not DAX; `None` if its device knows no DAX either.
    pub fn of(file: &File) -> Option<Self> {
        let status = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::empty()).ok()?;
        if status.stx_attributes.contains(StatxAttributes::DAX) {
            return Some(if dax::can_write_back() {
                Self::NotSynchronous
            } else {
                Self::NoWriteBack
            });
        }
        device_knows_dax(status.stx_dev_major, status.stx_dev_minor).then_some(Self::NotEnabled)
    }

    /// What it is, to follow the name of the file.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotEnabled => "is not served with DAX, although its device can do that",
            Self::NotSynchronous => {
                "is served with DAX, but its device grants no synchronous mappings"
            }
            Self::NoWriteBack => {
                "is served with DAX, but this processor lets no program write its cache back"
            }
        }
    }

    /// What the user can do, if anything.
    pub fn advice(self) -> Option<&'static str> {
        match self {
            Self::NotEnabled => Some(
                "mount the filesystem with -o dax=always; or, with dax=inode, give the image's directory the flag \
                 ('chattr +x') and copy the file within it",
            ),
            Self::NotSynchronous | Self::NoWriteBack => None,
        }
    }
}

/// `queue/dax` of the block device, or of the disk that it is a partition of (sysfs, ABI/stable/sysfs-block).
fn device_knows_dax(major: u32, minor: u32) -> bool {
    let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let says_one = |path: PathBuf| fs::read_to_string(path).is_ok_and(|text| text.trim() == "1");
    says_one(device.join("queue/dax")) || says_one(device.join("../queue/dax"))
}
