// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk of which a quarter is data: converted, against `qemu-img`, and compared, against `cmp` of nothing but the data.
//!
//! Both converters end when what they wrote is synced.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use pcow_tests::random::Random;
use pcow_tests::scratch::Scratch;

use super::{Turn, pcow_img, row, seconds, settle};
use crate::Effort;
use crate::place::Place;

/// What is data of each [`STRIDE`] bytes.
const EXTENT: usize = 1 << 20;
const STRIDE: u64 = 4 << 20;

/// Prints the rows of both.
pub fn report(place: &Place, effort: &Effort) {
    let disk = Disk::new(place, effort.disk);
    let mut conversions = Vec::new();
    let mut comparisons = Vec::new();
    for _ in 0..effort.conversions {
        conversions.push(disk.convert(place));
        comparisons.push(disk.compare());
    }
    let size = effort.disk >> 20;
    let what = format!("convert a raw file of {size} MiB, 25 % data, s");
    row(&what, "qemu-img convert to qcow2", &conversions);
    let what = "compare the image with the raw file, s";
    row(what, "cmp of two files with the data", &comparisons);
}

struct Disk {
    scratch: Scratch,
    raw: PathBuf,
    /// Two files of the data without the holes.
    dense: [PathBuf; 2],
}

impl Disk {
    fn new(place: &Place, bytes: u64) -> Self {
        let scratch = Scratch::below(&place.dir);
        let disk = Self {
            raw: scratch.path("raw"),
            dense: ["first", "second"].map(|name| scratch.path(name)),
            scratch,
        };
        let raw = File::create(&disk.raw).unwrap();
        raw.set_len(bytes).unwrap();
        let mut dense = disk
            .dense
            .each_ref()
            .map(|path| File::create(path).unwrap());
        let mut random = Random::new(3);
        for at in (0..bytes).step_by(usize::try_from(STRIDE).unwrap()) {
            let words = (0..EXTENT / 8).map(|_| random.next_word().to_ne_bytes());
            let extent: Vec<u8> = words.flatten().collect();
            raw.write_all_at(&extent, at).unwrap();
            dense.iter_mut().for_each(|f| f.write_all(&extent).unwrap());
        }
        disk
    }

    fn image(&self) -> PathBuf {
        self.scratch.path("image")
    }

    fn convert(&self, place: &Place) -> Turn {
        let qcow2 = self.scratch.path("qcow2");
        let image = self.image();
        if image.exists() {
            std::fs::remove_dir_all(&image).unwrap();
            std::fs::remove_file(&qcow2).unwrap();
        }
        settle(place);
        let mut ours = pcow_img();
        ours.args(["convert", "-f", "raw"])
            .args([&self.raw, &image]);
        let ours = seconds(&mut ours);
        settle(place);
        let mut other = Command::new("qemu-img");
        other.args(["convert", "-t", "writeback", "-f", "raw", "-O", "qcow2"]);
        let other = seconds(other.args([&self.raw, &qcow2]));
        Turn { ours, other }
    }

    fn compare(&self) -> Turn {
        let mut ours = pcow_img();
        ours.args(["compare", "-F", "raw"]);
        Turn {
            ours: seconds(ours.args([&self.image(), &self.raw])),
            other: seconds(Command::new("cmp").args(&self.dense)),
        }
    }
}
