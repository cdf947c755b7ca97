// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The programs of this workspace that run in the lab host: built by cargo, found in its messages.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::run;

/// Tests that run in the lab host, as package and target of cargo.
const TESTS: &[(&str, &str)] = &[
    ("pcow-format", "pcow_format"),
    ("pcow-format", "check"),
    ("pcow-format", "deletion"),
    ("pcow-format", "image"),
    ("pcow-format", "lock"),
    ("pcow-format", "stream"),
    ("pcow-protocol", "environment"),
    ("pcow-protocol", "frontend"),
    ("pcow-protocol", "uffd"),
    ("pcow-tests", "dax"),
    ("pcow-tests", "mapping_budget"),
    ("pcow-tests", "random_touch"),
];

/// The other programs: what is tested, what tests start, and what measures.
const BINARIES: &[(&str, &str)] = &[
    ("pcow-backend", "pcow-backend"),
    ("pcow-img", "pcow-img"),
    ("pcow-tests", "pcow-bench"),
    ("pcow-tests", "pcow-guest-io"),
];

/// What runs in the guest inside of the lab host.
const GUEST: (&str, &str) = ("pcow-tests", "pcow-guest-io");

/// Tests that are programs, because only the lab host may run them.
const TEST_PROGRAMS: &[(&str, &str)] = &[("pcow-tests", "pcow-kvm-faults")];

/// Something that cargo built and that can be run.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Artifact {
    package: String,
    target: String,
    is_test: bool,
    path: PathBuf,
}

/// A program and its name in the lab host, relative to where all are.
#[derive(Debug)]
pub struct Program {
    /// Where it was built.
    pub path: PathBuf,
    /// `pcow-backend` or `deps/pcow-format.image`: tests lie below the programs that they start,
    /// as cargo puts them.
    pub name: String,
}

/// All that was built.
#[derive(Debug)]
pub struct Programs {
    /// What runs in the lab host.
    pub host: Vec<Program>,
    /// What runs in the guest inside.
    pub guest: PathBuf,
}

/// Builds everything and says where it is.
///
/// # Errors
/// cargo fails or does not make one of the programs.
pub fn build() -> Result<Programs> {
    let mut arguments = vec!["build", "--release", "--bins"];
    let mut artifacts = cargo(&arguments)?;
    // The same features for all packages as in other runs, so that nothing is built twice.
    arguments = vec!["test", "--release", "--no-run", "--lib"];
    for (_, target) in TESTS
        .iter()
        .filter(|(package, target)| !is_library(package, target))
    {
        arguments.extend(["--test", target]);
    }
    artifacts.extend(cargo(&arguments)?);
    let binaries = BINARIES.iter().chain(TEST_PROGRAMS);
    let binaries = binaries.map(|wanted| (wanted, false));
    let tests = TESTS.iter().map(|wanted| (wanted, true));
    let host = binaries
        .chain(tests)
        .map(|((package, target), is_test)| find(&artifacts, package, target, is_test))
        .collect::<Result<_>>()?;
    let guest = find(&artifacts, GUEST.0, GUEST.1, false)?.path;
    Ok(Programs { host, guest })
}

fn is_library(package: &str, target: &str) -> bool {
    package.replace('-', "_") == target
}

fn find(artifacts: &[Artifact], package: &str, target: &str, is_test: bool) -> Result<Program> {
    let found = artifacts.iter().find(|artifact| {
        artifact.package == package && artifact.target == target && artifact.is_test == is_test
    });
    let name = if is_test || TEST_PROGRAMS.contains(&(package, target)) {
        format!("deps/{package}.{target}")
    } else {
        target.to_string()
    };
    match found {
        Some(artifact) => Ok(Program {
            path: artifact.path.clone(),
            name,
        }),
        None => Err(Error::Unusable(format!("cargo built no {name}"))),
    }
}

fn cargo(arguments: &[&str]) -> Result<Vec<Artifact>> {
    let mut command: Command = run::cargo(arguments);
    command
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit());
    Ok(parse(&run::capture(&mut command)?))
}

/// Reads cargo's messages, one JSON object a line.
fn parse(messages: &str) -> Vec<Artifact> {
    messages
        .lines()
        .filter_map(|line| artifact(&serde_json::from_str(line).ok()?))
        .collect()
}

fn artifact(message: &Value) -> Option<Artifact> {
    Some(Artifact {
        package: package(message["package_id"].as_str()?)?.to_string(),
        target: message["target"]["name"].as_str()?.to_string(),
        is_test: message["profile"]["test"].as_bool()?,
        path: message["executable"].as_str()?.into(),
    })
}

/// The name in a package ID: `<URL>#<name>@<version>`, or `<URL>#<version>` if the URL ends with
/// the name (cargo-pkgid(1)).
fn package(id: &str) -> Option<&str> {
    let (url, fragment) = id.rsplit_once('#')?;
    match fragment.split_once('@') {
        Some((name, _)) => Some(name),
        None => url.rsplit('/').next(),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn only_what_can_be_run_is_taken_from_cargos_messages() {
        let messages = r#"not of cargo
{"reason":"compiler-artifact","package_id":"path+file:///w/pcow-img#0.1.0","target":{"name":"pcow_img"},"profile":{"test":false},"executable":null}
{"reason":"compiler-artifact","package_id":"path+file:///w/img#pcow-img@0.1.0","target":{"name":"cli"},"profile":{"test":true},"executable":"/t/deps/cli-1"}
{"reason":"build-finished","success":true}"#;
        let artifacts = parse(messages);
        assert_eq!(artifacts.len(), 1);
        assert_eq!(artifacts[0].package, "pcow-img");
        assert_eq!(artifacts[0].target, "cli");
        assert!(artifacts[0].is_test);
        assert_eq!(artifacts[0].path.to_str(), Some("/t/deps/cli-1"));
    }
}
