// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What fuzzers have found: every input in the corpus goes through its target.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::panic::catch_unwind;
use std::path::PathBuf;

use pcow_fuzz_targets as targets;

fn fuzz() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}

/// Every input of `target` goes through `run`, which takes most of them.
fn try_corpus(target: &str, run: fn(&[u8]) -> bool) {
    let folder = fuzz().join("corpus").join(target);
    let (mut tried, mut taken) = (0, 0);
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let input = fs::read(&path).unwrap();
        match catch_unwind(|| run(&input)) {
            Ok(took) => taken += usize::from(took),
            Err(_) => panic!(
                "see above: fuzz/corpus/{target}/{}",
                path.file_name().unwrap().display()
            ),
        }
        tried += 1;
    }
    println!("{tried} inputs, {taken} of which it takes");
    assert!(
        taken > 0 && taken * 2 >= tried,
        "{taken} of {tried} inputs are taken"
    );
}

macro_rules! tests {
    ($($target:ident)*) => {
        $(#[test]
        fn $target() {
            try_corpus(stringify!($target), targets::$target::run);
        })*

        const TARGETS: &[&str] = &[$(stringify!($target)),*];
    };
}

tests! { control frames image_directory map_file operations stream }

/// A target that is new has a corpus, and a test here.
#[test]
fn every_target_of_the_fuzzer_is_tried() {
    for folder in ["fuzz_targets", "corpus"] {
        let entries = fs::read_dir(fuzz().join(folder)).unwrap();
        let name = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        let mut names: Vec<_> = entries.map(|e| name(e.unwrap().path())).collect();
        names.sort();
        assert_eq!(names, TARGETS, "{folder}");
    }
}
