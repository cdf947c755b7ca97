// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! New images and clones, against as many bare creations of a durable file as the command leaves new files.
//!
//! The files are counted: those with a birth that was not there before, replaced ones among them and links not. Locks are
//! left out, because nothing depends on their bytes.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime};

use pcow_format::{Image, LOCK_FILE, MAX_VIRTUAL_BYTES};
use pcow_tests::scratch::{Scratch, store};

use super::{pcow_img, seconds, settle};
use crate::place::Place;
use crate::stats::text;
use crate::{CLUSTER, Effort};

const BASE_BYTES: u64 = 100 << 30;
/// Clusters of the base that are data.
const BASE_DATA: u64 = 100;

/// What is made: the first clone seals its base, which leaves nothing to seal for the second.
const NAMES: [&str; 3] = [
    "create, 8 TiB − 2 MiB",
    "clone 100 GiB, whose present state is sealed for it",
    "clone 100 GiB, sealed already",
];

/// What one creation took, in milliseconds.
struct Creation {
    files: usize,
    ours: f64,
    bare: f64,
    process: f64,
}

/// Prints a table.
pub fn report(place: &Place, effort: &Effort) {
    println!(
        "| what, ms | new files | pcow-img | bare creations | ratio | a process that does nothing | ratio with it in the floor |"
    );
    println!("|---|---|---|---|---|---|---|");
    let rounds: Vec<_> = (0..effort.starts).map(|_| round(place)).collect();
    for (number, name) in NAMES.iter().enumerate() {
        let of = |f: &dyn Fn(&Creation) -> f64| rounds.iter().map(|r| f(&r[number])).collect();
        println!(
            "| {name} | {} | {} | {} | {} | {} | {} |",
            rounds[0][number].files,
            text(of(&|c| c.ours), 1),
            text(of(&|c| c.bare), 1),
            text(of(&|c| c.ours / c.bare), 2),
            text(of(&|c| c.process), 1),
            text(of(&|c| c.ours / (c.bare + c.process)), 2),
        );
    }
}

fn round(place: &Place) -> [Creation; 3] {
    let scratch = Scratch::below(&place.dir);
    let base = base(&scratch);
    let bytes = MAX_VIRTUAL_BYTES.to_string();
    let new = |name: &str| -> (PathBuf, Command) {
        let mut command = pcow_img();
        command.arg("create");
        (scratch.path(name), command)
    };
    let clone = |name| {
        let (path, mut command) = new(name);
        command.arg("--base").arg(&base).arg(path);
        measure(place, &scratch, &mut command)
    };
    let (path, mut largest) = new("largest");
    largest.arg(path).arg(&bytes);
    [
        measure(place, &scratch, &mut largest),
        clone("clone"),
        clone("another"),
    ]
}

/// A new image with some data, spread over all of it and synced.
fn base(scratch: &Scratch) -> PathBuf {
    let path = scratch.image("base", BASE_BYTES, CLUSTER);
    let image = Image::open(&path, &[]).unwrap();
    for number in 0..BASE_DATA {
        store(&image, number * (BASE_BYTES / BASE_DATA), b"a base");
    }
    image.flush().unwrap();
    path
}

fn measure(place: &Place, scratch: &Scratch, command: &mut Command) -> Creation {
    let dir = scratch.path("");
    settle(place);
    let process = seconds(&mut Command::new("true"));
    let before = files(&dir);
    let ours = seconds(command);
    let files = files(&dir).difference(&before).count();
    settle(place);
    let bare = bare_creations(&dir, files);
    Creation {
        files,
        ours: ours * 1e3,
        bare: bare * 1e3,
        process: process * 1e3,
    }
}

/// All files in the folders of `dir` but locks. A number is used again, a birth is not.
fn files(dir: &Path) -> BTreeSet<(u64, SystemTime)> {
    let folders = dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let entries = folders
        .filter(|path| path.is_dir())
        .flat_map(|folder| folder.read_dir().unwrap())
        .map(Result::unwrap);
    entries
        .filter(|entry| entry.file_name() != LOCK_FILE)
        .map(|entry| entry.metadata().unwrap())
        .map(|status| (status.ino(), status.created().unwrap()))
        .collect()
}

/// The seconds for `count` files in a folder, each of them and its name durable before the next.
fn bare_creations(dir: &Path, count: usize) -> f64 {
    let folder = tempfile::tempdir_in(dir).unwrap();
    let begin = Instant::now();
    let names = File::open(folder.path()).unwrap();
    for number in 0..count {
        let mut file = File::create_new(folder.path().join(number.to_string())).unwrap();
        file.write_all(b"few bytes").unwrap();
        file.sync_all().unwrap();
        names.sync_all().unwrap();
    }
    begin.elapsed().as_secs_f64()
}
