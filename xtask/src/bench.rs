// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask bench`: builds the backend, pcow-img and the bench program, optimised, and runs it.
//!
//! What is measured and how is the bench program's own affair (`tests/src/bin/pcow-bench`).

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::Command;

use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::lab::{self, Value};
use crate::packages::{self, Step};
use crate::run::{self, Log};

/// What is built: the program that measures, and those that are measured.
const PROGRAMS: [&str; 12] = [
    "--package",
    "pcow-backend",
    "--bin",
    "pcow-backend",
    "--package",
    "pcow-img",
    "--bin",
    "pcow-img",
    "--package",
    "pcow-tests",
    "--bin",
    "pcow-bench",
];

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Fewer rounds: a minute or two in all
    #[arg(long)]
    quick: bool,
    /// Only how long live snapshots hold a guest
    #[arg(long, conflicts_with = "lab")]
    snapshots: bool,
    /// The speed of pcow-img instead, against qemu-img and others, with 5 GiB in DIR
    #[arg(long, conflicts_with_all = ["lab", "snapshots"])]
    img: bool,
    /// A folder on the filesystem to measure besides tmpfs, instead of that for temporary files
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Ratios only, of very few rounds: here, and on a DAX filesystem in the lab host
    #[arg(long, conflicts_with = "quick")]
    lab: bool,
}

/// Prints the tables to standard output.
///
/// # Errors
/// Something cannot be built or measured; the reason was printed.
pub fn command(cache: &Cache, arguments: &Arguments) -> Result<()> {
    let mut build = run::cargo(&["build", "--release"]);
    finish(build.args(PROGRAMS))?;
    let mut bench = run::cargo(&["run", "--quiet", "--release", "--package", "pcow-tests"]);
    bench.args(["--bin", "pcow-bench", "--"]);
    if arguments.quick {
        bench.arg("--quick");
    }
    if arguments.snapshots {
        bench.arg("--snapshots");
    }
    if arguments.img {
        let log = Log::create(&cache.folder("bench")?.join("log"))?;
        packages::ensure(&[Step::Bench], &log)?;
        bench.arg("--img");
    }
    if let Some(dir) = &arguments.dir {
        // The program runs in the repository's folder.
        let dir = std::path::absolute(dir).map_err(Error::file("find", dir))?;
        bench.arg("--dir").arg(dir);
    }
    if arguments.lab {
        return compare(cache, bench.arg("--ratios"));
    }
    finish(&mut bench)
}

/// Prints what `bench` says here beside what it says in the lab host.
fn compare(cache: &Cache, bench: &mut Command) -> Result<()> {
    let here = run::capture(bench)?;
    let there = lab::bench(cache)?;
    println!("| to the least that is possible | here | lab host, ext4 with DAX, emulated |");
    println!("|---|---|---|");
    let here: Vec<_> = here.lines().filter_map(Value::parse).collect();
    let number_of = |name: &str, values: &[Value]| {
        let found = values.iter().find(|value| value.name == name);
        found.map_or("not measured".to_string(), |value| value.number.clone())
    };
    let mut names: Vec<_> = here.iter().chain(&there).map(|value| &value.name).collect();
    let mut seen = HashSet::new();
    names.retain(|name| seen.insert(*name));
    for name in names {
        let (here, there) = (number_of(name, &here), number_of(name, &there));
        println!("| {name} | {here} | {there} |");
    }
    Ok(())
}

fn finish(command: &mut Command) -> Result<()> {
    if run::shown(command)? {
        return Ok(());
    }
    Err(Error::Failed("see above".into()))
}
