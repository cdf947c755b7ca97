// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mutants by name: faults that somebody might well make.

use std::os::fd::AsRawFd;

use pcow_format::mutant::{self, Mutant as Flaw};
use pcow_format::ops::{NewImage, create};
use pcow_format::{ClusterSize, ErrorKind, Image, VirtualSize};

use super::traces::{Traces, Tried};
use super::{Mutant, first_violation, named_scene};
use crate::setting::Setting;

/// A fault, and how it is found.
pub(super) struct Named {
    pub(super) name: &'static str,
    catch: fn() -> Option<String>,
}

/// All of them.
pub(super) const ALL: &[Named] = &[
    Named {
        name: "a flush settles the words as they are after its sync",
        catch: || flawed(Flaw::LateWords),
    },
    Named {
        name: "the boot tag is written before live words are discarded",
        catch: || in_order(Mutant::Swapped("active.open.discard", "active.open.tag")),
    },
    Named {
        name: "no sync of the old layer when a snapshot on DAX seals it",
        catch: seal_without_sync,
    },
    Named {
        name: "an answer before the sync of the directory",
        catch: || in_order(Mutant::Hasty("root.dir.sync")),
    },
    Named {
        name: "an unnamed layer that holds data is removed",
        catch: || flawed(Flaw::OrphanRemoved),
    },
    Named {
        name: "a failed flush is forgotten",
        catch: || flawed(Flaw::FlushErrorForgotten),
    },
    Named {
        name: "the serving byte of the lock is not taken",
        catch: || two_writers(Some(Flaw::ServingLockDropped)).err(),
    },
];

/// Finds what is wrong with the one called `name`.
pub(super) fn catch(name: &str) -> Option<String> {
    let named = ALL.iter().find(|n| n.name == name)?;
    (named.catch)()
}

fn flawed(flaw: Flaw) -> Option<String> {
    let setting = Setting::new(named_scene("page-cache"), None);
    first_violation(&setting, Some(flaw), |_, _| true)
}

fn in_order(mutant: Mutant) -> Option<String> {
    match Traces::record(named_scene("page-cache")).attempt(&mutant)? {
        Tried::Caught(problem) => Some(problem),
        Tried::Impossible | Tried::Missed => None,
    }
}

/// The live snapshot shows it, where the guest stores after the flush of the preparation. In the one offline nobody does, so
/// that this sync finds nothing dirty.
fn seal_without_sync() -> Option<String> {
    let setting = Setting::new(named_scene("dax"), None);
    first_violation(&setting, Some(Flaw::SealUnflushed), |_, workload| {
        let last = workload.last().map(|o| o.name);
        matches!(last, Some("snapshot" | "live snapshot"))
    })
}

/// Two processes cannot have an image for writing, even if a frontend gave up the byte that it shares.
///
/// # Errors
/// They can.
pub fn two_writers(flaw: Option<Flaw>) -> Result<(), String> {
    let scratch = tempfile::tempdir().map_err(|e| e.to_string())?;
    let path = scratch.path().join("image");
    let new = NewImage {
        size: Some(VirtualSize::new(2 << 20).map_err(|e| e.to_string())?),
        cluster: ClusterSize::new(64 << 10).map_err(|e| e.to_string())?,
        allocation_unit: None,
        base: None,
    };
    create(&path, &new, &[]).map_err(|e| e.to_string())?;
    mutant::set(flaw);
    let first = Image::open(&path, &[]).map_err(|e| e.to_string())?;
    let lock = first.lock().ok_or("an image without lock")?;
    let in_use = lock.in_use().ok_or("an image that nobody has in use")?;
    give_up(in_use, 0).map_err(|e| e.to_string())?;
    let second = Image::open(&path, &[]);
    mutant::set(None);
    match second {
        Err(e) if e.kind() == ErrorKind::Locked => Ok(()),
        Err(e) => Err(e.to_string()),
        Ok(_) => Err("two writers at once".to_owned()),
    }
}

/// Drops the lock of one byte, as a frontend can that was given the description.
#[expect(
    unsafe_code,
    reason = "no safe interface has locks of open file descriptions"
)]
fn give_up(file: &std::fs::File, byte: i64) -> std::io::Result<()> {
    let mut request = libc::flock {
        l_type: i16::try_from(libc::F_UNLCK).map_err(std::io::Error::other)?,
        l_whence: 0,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel reads a `struct flock` that outlives the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut request) };
    if done < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
