// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The edges between the crates, and what every source file must have or must not have.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Crates of the workspace and which of them each may depend on.
const EDGES: [(&str, &[&str]); 9] = [
    ("pcow-format", &[]),
    ("pcow-protocol", &[]),
    ("pcow-img", &["pcow-format", "pcow-protocol"]),
    ("pcow-backend", &["pcow-format", "pcow-protocol"]),
    (
        "pcow-tests",
        &["pcow-format", "pcow-protocol", "pcow-img", "pcow-backend"],
    ),
    (
        "pcow-examples",
        &["pcow-format", "pcow-protocol", "pcow-img", "pcow-backend"],
    ),
    ("pcow-crash", &["pcow-format"]),
    ("pcow-fuzz-targets", &["pcow-format", "pcow-protocol"]),
    ("xtask", &[]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Every crate of the workspace with those of its dependencies that are in the workspace, too.
fn edges() -> BTreeMap<String, BTreeSet<String>> {
    let text = output(
        "cargo",
        &[
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ],
    );
    let metadata: serde_json::Value = serde_json::from_str(&text).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let name = |value: &serde_json::Value| value["name"].as_str().unwrap().to_owned();
    let ours: BTreeSet<_> = packages.iter().map(name).collect();
    let edges_of = |package: &serde_json::Value| {
        let dependencies = package["dependencies"].as_array().unwrap();
        let own = name(package);
        let inside = dependencies
            .iter()
            .map(name)
            .filter(|d| ours.contains(d) && *d != own);
        (own.clone(), inside.collect())
    };
    packages.iter().map(edges_of).collect()
}

#[test]
fn crates_depend_on_each_other_only_as_allowed() {
    let allowed: BTreeMap<_, _> = EDGES.into_iter().collect();
    let found = edges();
    assert_eq!(
        found.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        allowed.keys().copied().collect(),
        "a crate that is new here must be given its edges"
    );
    for (from, to) in found {
        for dependency in to {
            assert!(
                allowed[from.as_str()].contains(&dependency.as_str()),
                "{from} must not depend on {dependency}"
            );
        }
    }
}

fn tracked_files() -> Vec<String> {
    output("git", &["ls-files"])
        .lines()
        .map(str::to_owned)
        .collect()
}

fn read(name: &str) -> Option<String> {
    std::fs::read_to_string(root().join(name)).ok()
}

#[test]
fn every_source_file_names_its_licence() {
    let endings = [".rs", ".c", ".h", ".sh", ".py", ".toml"];
    let sources: Vec<_> = tracked_files()
        .into_iter()
        .filter(|f| endings.iter().any(|e| f.ends_with(e)))
        .collect();
    assert!(
        sources.len() > 50,
        "the list of files is not empty by mistake"
    );
    for file in sources {
        let Some(text) = read(&file) else { continue };
        let head: String = text.lines().take(4).collect();
        let wanted = if file.starts_with("qemu-patch/") {
            "SPDX-License-Identifier: GPL-2.0-or-later"
        } else {
            "SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause"
        };
        assert!(
            head.contains(wanted),
            "{file}: no '{wanted}' in its first lines"
        );
    }
}

#[test]
fn unsafe_code_stays_in_the_files_that_are_named_for_it() {
    let allowed = [
        "pcow-backend/src/endpoint.rs",
        "pcow-backend/src/signals.rs",
        "pcow-format/src/lock/mod.rs",
        "pcow-format/src/medium/dax.rs",
        "pcow-format/src/medium/extents.rs",
        "pcow-format/src/medium/lease.rs",
        "pcow-protocol/src/frontend/region.rs",
        "pcow-protocol/src/frontend/segv.rs",
        "pcow-protocol/src/uffd.rs",
        "pcow-protocol/src/wire.rs",
    ];
    let has_unsafe = |text: &str| {
        let forms = ["unsafe {", "unsafe impl", "unsafe fn"];
        let stands = |at: usize| !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        forms
            .iter()
            .any(|f| text.match_indices(f).any(|(at, _)| stands(at)))
    };
    for file in tracked_files() {
        let product = [
            "pcow-format/src",
            "pcow-protocol/src",
            "pcow-backend/src",
            "pcow-img/src",
        ];
        if !product.iter().any(|p| file.starts_with(p)) {
            continue;
        }
        if read(&file).is_some_and(|text| has_unsafe(&text)) {
            assert!(allowed.contains(&file.as_str()), "{file} has unsafe code");
        }
    }
}
