// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `pcow-img` beside a backend: it does the same as without one, or says what keeps it from that.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Command, Output};

use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::program;
use pcow_tests::scratch::Scratch;
use serde_json::Value;

const MIB: u64 = 1 << 20;

struct Place {
    scratch: Scratch,
    image: PathBuf,
}

impl Place {
    fn new() -> Self {
        let scratch = Scratch::new();
        let image = scratch.image("vm.pcow", 128 * MIB, 65536);
        Self { scratch, image }
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(program("pcow-img"));
        let command = command.args(args).current_dir(self.scratch.path(""));
        command.output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(&[args, &["--output", "json"]].concat());
        assert!(output.status.success(), "{args:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn refusal(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

/// The members of objects, in depth, without the values. Of a list the first element counts.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(o) => o.iter().map(|(k, v)| (k.clone(), shape(v))).collect(),
        Value::Array(a) => a.first().map(shape).into_iter().collect(),
        _ => Value::Null,
    }
}

#[test]
fn snapshot_list_and_rename_are_the_same_with_and_without_a_backend() {
    let place = Place::new();
    let commands: [&[&str]; 6] = [
        &["snapshot", "vm.pcow", "first"],
        &["snapshot", "vm.pcow"],
        &["rename", "vm.pcow", "2", "second"],
        &["list", "vm.pcow"],
        &["snapshot", "vm.pcow", "third"],
        &["delete", "vm.pcow", "second"],
    ];
    let offline = commands.map(|c| place.json(c));
    let place = Place::new();
    let backend = Backend::start(&place.image, &[]);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    Memory::new(frontend.region()).store(0, 5);
    let live = commands.map(|c| place.json(c));
    for (offline, live) in offline.iter().zip(&live) {
        assert_eq!(shape(offline), shape(live));
    }
    let name = |listing: &Value, i: usize| listing["snapshots"][i]["name"].clone();
    for listing in [&offline[3], &live[3]] {
        assert_eq!(
            (name(listing, 0), name(listing, 1)),
            ("first".into(), "second".into())
        );
        assert_eq!(listing["active-parent"], "2");
    }
}

#[test]
fn what_is_wrong_with_a_name_is_said_before_the_guest_is_disturbed() {
    let place = Place::new();
    let backend = Backend::start(&place.image, &[]);
    place.json(&["snapshot", "vm.pcow", "first"]);
    place.json(&["snapshot", "vm.pcow", "second"]);
    for (name, reason) in [("first", "already has"), ("7", "digits only")] {
        let line = place.refusal(&["snapshot", "vm.pcow", name]);
        assert!(line.contains(reason), "{line}");
        let line = place.refusal(&["rename", "vm.pcow", "2", name]);
        assert!(line.contains(reason), "{line}");
    }
    assert!(!backend.log().iter().any(|l| l.contains("no snapshot")));
}

#[test]
fn info_shows_the_backend_and_how_layers_were_sealed() {
    let place = Place::new();
    let offline = place.json(&["info", "vm.pcow"]);
    assert_eq!(offline["backend"], Value::Null);
    let backend = Backend::start(&place.image, &[]);
    let info = place.json(&["info", "vm.pcow"]);
    assert_eq!(info["backend"]["process"], backend.pid());
    assert_eq!(info["backend"]["attached"], false);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    Memory::new(frontend.region()).store(0, 5);
    place.json(&["snapshot", "vm.pcow", "s"]);
    let info = place.json(&["info", "vm.pcow"]);
    assert_eq!(info["backend"]["session"]["stores"], 1);
    let layers = info["layers"].as_array().unwrap();
    let sealed = layers.iter().find(|l| l["active"] == false).unwrap();
    assert_eq!(sealed["proof"], "lease");
    let text = String::from_utf8(place.run(&["info", "vm.pcow"]).stdout).unwrap();
    assert!(
        text.contains(&format!("process {}", backend.pid())),
        "{text}"
    );
    assert!(text.contains("frontend attached"), "{text}");
}

#[test]
fn a_rollback_is_refused_while_the_image_is_served_and_says_the_way_out() {
    let place = Place::new();
    place.json(&["snapshot", "vm.pcow", "s"]);
    let mut backend = Backend::start(&place.image, &[]);
    let line = place.refusal(&["rollback", "vm.pcow", "s"]);
    let process = format!("process {}", backend.pid());
    for part in [process.as_str(), "create --base vm.pcow@s"] {
        assert!(line.contains(part), "{line}");
    }
    assert!(backend.terminate().success());
    place.json(&["rollback", "vm.pcow", "s"]);
}

#[test]
fn a_backend_whose_socket_is_elsewhere_is_named() {
    let place = Place::new();
    let socket = place.scratch.path("ctl");
    let backend = Backend::start(&place.image, &["--control", socket.to_str().unwrap()]);
    let line = place.refusal(&["snapshot", "vm.pcow"]);
    assert!(
        line.contains(&format!("process {}", backend.pid())),
        "{line}"
    );
    assert!(line.contains("--control"), "{line}");
    place.json(&["snapshot", "vm.pcow", "--control", "ctl"]);
    let line = place.refusal(&["snapshot", "vm.pcow", "--control", "nothing"]);
    assert!(line.contains("nobody listens"), "{line}");
}
