// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask fuzz`: builds the fuzz targets with coverage by the stable compiler, and runs them one after the other.
//!
//! What they do is their own affair (`tests/fuzz`). What they find new stays under `target/`, beside what is checked in; an input that
//! ends a target is kept in `fuzz/artifacts/`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::error::{Error, Result};
use crate::run;

/// What libFuzzer asks of the compiler: counters for edges and comparisons. As cargo-fuzz does it, without a sanitizer, which the
/// stable compiler has none of.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";
const MANIFEST: &str = "fuzz/Cargo.toml";

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How long each target runs
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Targets [default: all]
    targets: Vec<String>,
}

/// Runs them; the last line of each says how much it has done.
///
/// # Errors
/// A target cannot be built, or found something: what it printed says what, and where the input is.
pub fn command(arguments: &Arguments) -> Result<()> {
    let all = targets()?;
    if let Some(unknown) = arguments.targets.iter().find(|t| !all.contains(t)) {
        let what = format!("there is no target {unknown}, but {}", all.join(", "));
        return Err(Error::Failed(what));
    }
    let chosen = if arguments.targets.is_empty() {
        all
    } else {
        arguments.targets.clone()
    };
    let host = host()?;
    // With a target, the flags are not for build scripts and procedural macros.
    let mut build = run::cargo(&["build", "--release", "--bins", "--manifest-path", MANIFEST]);
    build
        .args(["--target", &host, "--target-dir"])
        .arg(build_folder());
    succeed(build.env("RUSTFLAGS", COVERAGE))?;
    for target in &chosen {
        println!("{target}:");
        let program = build_folder().join(&host).join("release").join(target);
        succeed(&mut run_of(target, program, arguments.seconds)?)?;
    }
    Ok(())
}

fn run_of(target: &str, program: PathBuf, seconds: u64) -> Result<Command> {
    let fuzz = run::repository().join("fuzz");
    let found = build_folder().join("corpus").join(target);
    let artifacts = fuzz.join("artifacts").join(target);
    for folder in [&found, &artifacts] {
        fs::create_dir_all(folder).map_err(|e| Error::Failed(e.to_string()))?;
    }
    let mut command = Command::new(program);
    command.arg(format!("-max_total_time={seconds}"));
    command.args(["-timeout=60", "-rss_limit_mb=4096", "-max_len=65536"]);
    command.args([
        "-len_control=20",
        "-print_funcs=0",
        "-verbosity=0",
        "-print_final_stats=1",
    ]);
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    // New inputs go into the first folder.
    command.arg(found).arg(fuzz.join("corpus").join(target));
    Ok(command)
}

/// The targets, by their files.
fn targets() -> Result<Vec<String>> {
    let fail = |e: std::io::Error| Error::Failed(format!("fuzz/fuzz_targets: {e}"));
    let folder = run::repository().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        names.extend(path.file_stem().map(|n| n.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

fn build_folder() -> PathBuf {
    run::repository().join("target/fuzz")
}

/// The compiler's name for this machine.
fn host() -> Result<String> {
    let text = run::capture(Command::new("rustc").arg("-vV"))?;
    let host = text.lines().find_map(|l| l.strip_prefix("host: "));
    host.map(str::to_owned)
        .ok_or_else(|| Error::Failed("rustc does not say what machine this is".into()))
}

fn succeed(command: &mut Command) -> Result<()> {
    if run::shown(command)? {
        return Ok(());
    }
    Err(Error::Failed("see above".into()))
}
