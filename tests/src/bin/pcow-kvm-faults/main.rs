// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What KVM's page faults do to an image: tests for a host whose KVM is the processor's own (nested paging), which is why
//! they are a program of their own and no part of `cargo test`. `cargo xtask lab` makes such a host and runs them there.
//!
//! Under KVM a first read looks like a write: a kernel thread asks for the page, always for write access
//! (`micro_vm`). Every test runs a small machine whose processors load and store through a region, and compares what they
//! loaded, what the image holds afterwards and what that took with an oracle.
#![allow(clippy::unwrap_used)]

mod content;
mod counts;
mod given_back;
mod images;
mod read_only;
mod reading;
mod session;
mod stores;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use images::TestImage;

/// The cluster size of all images, in bytes.
const CLUSTER: u64 = 64 << 10;
/// Processors of every machine.
const PROCESSORS: usize = 4;

/// Tests KVM's page faults. Temporary files go where TMPDIR says.
#[derive(Debug, Parser)]
#[command(name = "pcow-kvm-faults")]
struct Arguments {
    /// Smaller images and fewer operations.
    #[arg(long)]
    short: bool,
    /// Run only the tests whose names contain one of these; all if there are none.
    filters: Vec<String>,
}

/// How much is done.
#[derive(Debug, Clone, Copy)]
struct Effort {
    /// Bytes of the images that are read from one end to the other.
    read_bytes: u64,
    /// Bytes of the images that are touched at random.
    mixed_bytes: u64,
    /// Random operations of each processor.
    operations: u64,
}

const SHORT: Effort = Effort {
    read_bytes: 20 << 20,
    mixed_bytes: 16 << 20,
    operations: 100,
};
const FULL: Effort = Effort {
    read_bytes: 512 << 20,
    mixed_bytes: 64 << 20,
    operations: 4000,
};

/// What the tests share.
#[derive(Debug)]
struct Setting {
    effort: Effort,
    /// A base whose every cluster is data.
    base: TestImage,
}

/// A test under its name, which says what holds.
type Test = (&'static str, fn(&Setting));

/// Names each test after its function.
macro_rules! tests {
    ($($module:ident::$name:ident,)*) => {
        &[$((concat!(stringify!($module), "::", stringify!($name)), $module::$name)),*]
    };
}

const TESTS: &[Test] = tests![
    reading::a_base_is_read_and_nothing_allocated,
    reading::an_empty_image_is_read_and_nothing_allocated,
    reading::the_faults_of_a_guest_that_keeps_its_halts_are_exact,
    given_back::what_was_copied_from_a_base_goes_when_the_frontend_has_left,
    given_back::what_was_copied_from_a_base_stays_when_the_backend_ends_first,
    given_back::what_was_allocated_in_an_empty_image_goes_when_the_frontend_has_left,
    stores::stores_of_four_processors_are_exact_with_bounces,
    stores::stores_of_four_processors_are_exact_without_bounces,
    read_only::every_load_from_a_read_only_image_ends_with_its_bytes,
];

impl Arguments {
    fn wants(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter))
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == given_back::READER) {
        given_back::read_as_told(&words[1..]);
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::parse();
    require_nested_paging();
    let effort = if arguments.short { SHORT } else { FULL };
    let base = TestImage::full(effort.read_bytes);
    let setting = Setting { effort, base };
    let wanted = TESTS.iter().filter(|(name, _)| arguments.wants(name));
    let outcomes: Vec<bool> = wanted.map(|test| run(test, &setting)).collect();
    let failed = outcomes.iter().filter(|passed| !**passed).count();
    println!("{} tests were run, {failed} failed", outcomes.len());
    if outcomes.is_empty() || failed > 0 {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// A KVM without the processor's nested paging raises other faults; what passes there proves nothing.
fn require_nested_paging() {
    let parameters = [
        "/sys/module/kvm_amd/parameters/npt",
        "/sys/module/kvm_intel/parameters/ept",
    ];
    let is_on = |path| std::fs::read_to_string(path).is_ok_and(|text| "Y1".contains(text.trim()));
    assert!(
        parameters.into_iter().any(is_on),
        "this needs kvm_amd or kvm_intel with nested paging: 'cargo xtask lab' has it"
    );
}

/// Runs one test; says whether it passed.
fn run((name, test): &Test, setting: &Setting) -> bool {
    println!("test {name}");
    let start = Instant::now();
    let passed = catch_unwind(AssertUnwindSafe(|| test(setting))).is_ok();
    let outcome = if passed { "ok" } else { "FAILED" };
    println!("test {name}: {outcome} in {:.1?}", start.elapsed());
    passed
}
