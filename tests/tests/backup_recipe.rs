// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The recipe of `docs/backup.md`, run as it stands there on an image that is served and written to.
#![allow(missing_docs, clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::program;
use pcow_tests::scratch::Scratch;

const DOCUMENT: &str = include_str!("../../docs/backup.md");
const MIB: u64 = 1 << 20;

/// Stands for libvirt: notes what the guest's agent is asked for, and what snapshots there are then.
const VIRSH: &str = "#!/bin/sh
echo \"$3 $(pcow-img list vm.pcow | grep -c '^○')\" >> agent
";

/// Each backup is made on another day.
const DATE: &str = "#!/bin/sh
echo day >> days
echo 2026-01-$(wc -l < days)
";

/// The shell blocks under the recipe's heading.
fn blocks() -> Vec<&'static str> {
    let (_, recipe) = DOCUMENT
        .split_once("\n## Incremental backup of a running guest\n")
        .unwrap();
    let starts = recipe.split("```sh\n").skip(1);
    starts
        .map(|block| block.split_once("```").unwrap().0)
        .collect()
}

struct Place {
    scratch: Scratch,
    path: String,
}

impl Place {
    fn new() -> Self {
        let scratch = Scratch::new();
        scratch.image("vm.pcow", 64 * MIB, 65536);
        let tools = scratch.path("tools");
        std::fs::create_dir(&tools).unwrap();
        for (name, script) in [("virsh", VIRSH), ("date", DATE)] {
            let tool = tools.join(name);
            std::fs::write(&tool, script).unwrap();
            std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let others = std::env::var("PATH").unwrap_or_default();
        let own = program("pcow-img");
        let own = own.parent().unwrap().display().to_string();
        Self {
            path: format!("{}:{own}:{others}", tools.display()),
            scratch,
        }
    }

    fn image(&self) -> PathBuf {
        self.scratch.path("vm.pcow")
    }

    fn run(&self, script: &str) -> Output {
        let mut shell = Command::new("sh");
        shell.args(["-ec", script]).env("PATH", &self.path);
        shell.current_dir(self.scratch.path("")).output().unwrap()
    }

    #[track_caller]
    fn ok(&self, script: &str) -> String {
        let output = self.run(script);
        assert!(output.status.success(), "{script}\n{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The byte that a snapshot of the copy has at an offset.
    fn byte(&self, snapshot: &str, offset: u64) -> u8 {
        let read = format!("pcow-img read copy.pcow@{snapshot} {offset} 1");
        self.run(&read).stdout[0]
    }
}

#[test]
fn the_recipe_backs_up_a_guest_that_goes_on_writing() {
    let place = Place::new();
    let [once, each_time, rest] = blocks()[..] else {
        panic!("three blocks of the recipe");
    };
    let backend = Backend::start(&place.image(), &[]);
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let memory = Memory::new(frontend.region());
    memory.store(0, 1);
    place.ok(once);
    memory.store(0, 2);
    memory.store(40 * MIB, 2);
    place.ok(each_time);
    memory.store(40 * MIB, 3);
    assert_eq!((place.byte("first", 0), place.byte("2", 0)), (1, 2));
    assert_eq!(
        (place.byte("first", 40 * MIB), place.byte("2", 40 * MIB)),
        (0, 2)
    );

    // This time the receiver loses what comes behind the first kilobytes.
    let cut = each_time.replace(" | pcow-img receive", " | head -c 5000 | pcow-img receive");
    let output = place.run(&cut);
    assert!(!output.status.success(), "{output:?}");
    memory.store(40 * MIB, 4);
    place.ok(rest);
    let last: Vec<_> = each_time.lines().skip(4).collect();
    place.ok(&last.join("\n"));
    assert_eq!(place.byte("3", 40 * MIB), 3);

    // And once more, as if nothing had been.
    place.ok(each_time);
    assert_eq!((place.byte("4", 40 * MIB), place.byte("4", 0)), (4, 2));
    place.ok("pcow-img compare vm.pcow@backup copy.pcow && pcow-img check copy.pcow");
    let names = place.ok("pcow-img list vm.pcow");
    assert!(
        names.contains(" backup ") && !names.contains("backup-new"),
        "{names}"
    );
    check_agent(&place.scratch.path("agent"));
}

/// Frozen before each snapshot, and thawed at once when there was one more.
fn check_agent(log: &Path) {
    let log = std::fs::read_to_string(log).unwrap();
    let lines: Vec<_> = log.lines().collect();
    assert_eq!(lines.len(), 6, "{log}");
    for pair in lines.chunks(2) {
        assert_eq!(
            pair[0], "{\"execute\": \"guest-fsfreeze-freeze\"} 1",
            "{log}"
        );
        assert_eq!(pair[1], "{\"execute\": \"guest-fsfreeze-thaw\"} 2", "{log}");
    }
}
