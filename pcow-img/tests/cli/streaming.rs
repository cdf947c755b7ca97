// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `send` and `receive`: through pipes and files, cut off, killed, and refused.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::harness::{Finished, MIB, Sandbox, output};

/// An image with snapshots `one` and `two`.
fn two_snapshots(s: &Sandbox) {
    let fill = |at: &str, byte: u8| {
        let cluster = vec![byte; 65536];
        well(&s.run_with_input(&["write", "vm", at], &cluster));
    };
    s.ok(&["create", "vm", "64M"]);
    fill("0", 1);
    fill("40M", 2);
    s.ok(&["snapshot", "vm", "one"]);
    fill("40M", 3);
    s.ok(&["resize", "vm", "128M"]);
    fill("100M", 4);
    s.ok(&["snapshot", "vm", "two"]);
}

#[track_caller]
fn well(finished: &Finished) {
    finished.expect(finished.code() == 0, "success");
    finished.expect(finished.stderr().is_empty(), "nothing on standard error");
}

#[test]
fn snapshots_go_through_a_pipe_one_after_the_other() {
    let s = Sandbox::new();
    two_snapshots(&s);
    well(&s.shell("pcow-img send vm@one | pcow-img receive copy"));
    well(&s.shell("pcow-img send vm@two --from one | pcow-img receive copy"));
    s.ok(&["compare", "vm@one", "copy@one"]);
    s.ok(&["compare", "vm@two", "copy@two"]);
    s.ok(&["compare", "vm@two", "copy"]);
    assert_eq!(s.load("copy", 100 * MIB), 4);
    s.ok(&["check", "copy"]);
    let uuid = |image: &str| s.json(&["list", image])["snapshots"][1]["uuid"].clone();
    assert_eq!(uuid("vm"), uuid("copy"));
    assert!(s.allocated("copy") < MIB);
}

#[test]
fn a_file_takes_a_stream_and_json_tells_of_it() {
    let s = Sandbox::new();
    two_snapshots(&s);
    let sent = s.json(&["send", "vm@1", "-o", "full"]);
    let fields = json!({"filename": "vm", "from": null, "stream": "full", "data-size": 2 * 65536});
    for (name, value) in fields.as_object().unwrap() {
        assert_eq!(&sent[name], value, "{name}");
    }
    assert_eq!(sent["snapshot"]["name"], "one");
    assert_eq!(
        sent["stream-size"],
        s.path("full").metadata().unwrap().size()
    );
    let received = s.json(&["receive", "copy", "full", "--name", "uno"]);
    assert_eq!(received["snapshot"]["name"], "uno");
    assert_eq!(received["snapshot"]["uuid"], sent["snapshot"]["uuid"]);
    assert_eq!(
        (&received["from"], &received["received-size"]),
        (&Value::Null, &json!(131_072))
    );
    s.ok(&["send", "-q", "vm@two", "--from", "one", "-o", "more"]);
    let received = s.json(&["receive", "copy", "more"]);
    assert_eq!(received["from"], "one");
    s.ok(&["compare", "vm@two", "copy@two"]);
}

/// A clone holds little itself. What is sent is all that it shows.
#[test]
fn a_base_is_sent_with_what_lies_on_it() {
    let s = Sandbox::new();
    two_snapshots(&s);
    std::fs::write(s.path("disk"), [7; 5000]).unwrap();
    s.ok(&["create", "raw", "--base", "disk", "--base-format", "raw"]);
    for (image, base) in [("clone", "vm@one"), ("other", "raw")] {
        s.ok(&["create", image, "--base", base, "--cluster-size", "4K"]);
        s.store(image, MIB, 9);
        s.ok(&["snapshot", image, "s"]);
        well(&s.shell(&format!(
            "pcow-img send {image}@s | pcow-img receive {image}-copy"
        )));
        s.ok(&["compare", image, &format!("{image}-copy")]);
        assert_eq!(
            s.json(&["info", &format!("{image}-copy")])["bases"],
            json!([])
        );
    }
}

#[test]
fn what_cannot_be_sent_or_received_is_refused_in_one_line() {
    let s = Sandbox::new();
    two_snapshots(&s);
    s.ok(&["send", "-q", "vm@one", "-o", "full"]);
    s.ok(&["send", "-q", "vm@two", "--from", "1", "-o", "more"]);
    s.refused(&["send", "vm"], 64, &["IMAGE@SNAPSHOT", "snapshot first"]);
    s.refused(
        &["send", "vm@three"],
        1,
        &["no snapshot 'three'", "one, two"],
    );
    s.refused(
        &["send", "vm@one", "--from", "two"],
        1,
        &["'two' is not older"],
    );
    s.refused(&["send", "vm@one", "--from", "one"], 1, &["is not older"]);
    s.refused(&["send", "vm@one", "-o", "full"], 1, &["exists already"]);
    s.refused(&["send", "vm@one", "--output", "json"], 64, &["-o FILE"]);
    s.refused(&["send", "vm", "--resume", "x"], 64, &["receive --token"]);
    s.refused(
        &["receive", "copy", "more"],
        1,
        &["'one'", "full stream first"],
    );
    s.refused(
        &["receive", "vm", "full"],
        1,
        &["has this snapshot already, as 'one'"],
    );
    s.refused(
        &["receive", "copy", "vm/image.json"],
        1,
        &["not a pcow stream"],
    );
    s.refused(&["receive", "copy", "nothing"], 1, &["cannot read nothing"]);
    s.refused(&["receive", "--token", "copy"], 1, &["nothing is there"]);
    s.refused(&["receive", "--abort", "copy"], 1, &["nothing is there"]);
    s.ok(&["receive", "copy", "full"]);
    s.store("copy", 0, 5);
    let parts = ["changed since snapshot 'one'", "roll it back"];
    s.refused(&["receive", "copy", "more"], 1, &parts);
    s.ok(&["rollback", "-q", "--discard", "copy", "one"]);
    let held = s.image("copy");
    s.refused(
        &["receive", "copy", "more"],
        1,
        &[&std::process::id().to_string()],
    );
    drop(held);
    s.ok(&["receive", "copy", "more"]);
}

/// As a person would do it by mistake: script(1) gives the tool a terminal.
#[test]
fn a_terminal_gets_no_stream_and_gives_none() {
    let s = Sandbox::new();
    two_snapshots(&s);
    for (command, part) in [
        ("pcow-img send vm@one", "a stream to a terminal"),
        ("pcow-img receive copy", "a stream from a terminal"),
    ] {
        let finished = s.shell(&format!("script -qec '{command}' /dev/null < /dev/null"));
        finished.expect(finished.stdout().contains(part), part);
        finished.expect(finished.code() == 1, "exit code 1");
    }
}

#[test]
fn a_receiver_that_goes_away_is_a_failure_of_send() {
    let s = Sandbox::new();
    s.ok(&["create", "vm", "8M"]);
    let written = s.run_with_input(&["write", "vm", "0"], &[7; 4 << 20]);
    well(&written);
    s.ok(&["snapshot", "vm", "one"]);
    let finished =
        s.shell("{ pcow-img send vm@one; echo ended with $? >&2; } | head -c 1000 | wc -c");
    finished.expect(
        finished.stderr().contains("Broken pipe"),
        "a word about the pipe",
    );
    finished.expect(finished.stderr().contains("ended with 1"), "exit code 1");
}

#[test]
fn what_is_there_of_a_stream_can_be_looked_at_continued_and_given_up() {
    let s = Sandbox::new();
    two_snapshots(&s);
    s.ok(&["send", "-q", "vm@two", "-o", "full"]);
    s.ok(&["send", "-q", "vm@one", "-o", "other"]);
    let cut = s.shell("head -c 100000 full | pcow-img receive copy");
    cut.expect(cut.code() == 1, "exit code 1");
    cut.expect(cut.stderr().contains("send --resume"), "what to do");
    assert!(!s.path("copy").exists());
    let rest = s.json(&["receive", "--token", "copy"]);
    assert_eq!(
        (&rest["snapshot"], &rest["position"]),
        (&json!("two"), &json!(65536))
    );
    assert_eq!(rest["virtual-size"], 128 * MIB);
    assert_eq!(
        s.ok(&["receive", "--token", "copy"]).trim_end(),
        rest["token"]
    );
    s.refused(
        &["receive", "copy", "other"],
        1,
        &["'two' is being received", "--abort"],
    );
    s.ok(&["rename", "vm", "two", "deux"]);
    well(&s.shell(
        "pcow-img send vm --resume $(pcow-img receive --token copy) | pcow-img receive copy",
    ));
    s.ok(&["compare", "vm@deux", "copy@deux"]);
    let cut = s.shell("head -c 100000 full | pcow-img receive again");
    cut.expect(cut.code() == 1, "exit code 1");
    let said = s.ok(&["receive", "--abort", "again"]);
    assert_eq!(said, "again: gave up what was received of snapshot 'two'\n");
    s.ok(&["receive", "again", "other"]);
}

/// A stream that comes as slowly as a test likes.
struct Receiving {
    child: Child,
}

impl Receiving {
    fn start(s: &Sandbox) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pcow-img"));
        command.args(["receive", "copy"]).current_dir(s.path(""));
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        Self {
            child: command.stderr(Stdio::null()).spawn().unwrap(),
        }
    }

    /// False if nobody reads any more.
    fn feed(&mut self, bytes: &[u8]) -> bool {
        self.child.stdin.as_mut().unwrap().write_all(bytes).is_ok()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// xorshift64*.
fn random(state: &mut u64) -> usize {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    usize::try_from(state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap()
}

/// 80 MiB that differ everywhere, so that there are checkpoints, and 70 MiB of changes.
fn large_snapshots(s: &Sandbox) {
    let mut state = 7;
    let file = File::create(s.path("bytes")).unwrap();
    for at in 0..80 {
        let block = vec![u8::try_from(1 + random(&mut state) % 255).unwrap(); 1 << 20];
        file.write_all_at(&block, at * MIB).unwrap();
    }
    s.ok(&["create", "vm", "128M"]);
    s.ok(&["write", "vm", "0", "bytes"]);
    s.ok(&["snapshot", "vm", "one"]);
    s.ok(&["write", "vm", "10M", "bytes"]);
    s.ok(&["snapshot", "vm", "two"]);
}

/// Whoever looks at the image while it is received, and after each kill, sees all of a snapshot or nothing.
fn receive_under_kills(s: &Sandbox, snapshot: &str, from: &[&str], seed: u64) {
    let mut state = seed;
    let token = |s: &Sandbox| {
        let finished = s.run(&["receive", "--token", "copy"]);
        (finished.code() == 0).then(|| finished.stdout().trim_end().to_owned())
    };
    let source = format!("vm@{snapshot}");
    let whole = [&["send", &source], from].concat();
    for round in 0..8 {
        let mut send = Command::new(env!("CARGO_BIN_EXE_pcow-img"));
        match token(s) {
            Some(token) => send.args(["send", "vm", "--resume", &token]),
            None => send.args(&whole),
        };
        let stream = output(send.current_dir(s.path("")).stdout(Stdio::piped())).stdout;
        let mut receiving = Receiving::start(s);
        let cut = if round == 7 {
            stream.len()
        } else {
            random(&mut state) % stream.len()
        };
        let fed = receiving.feed(&stream[..cut]);
        if round == 7 {
            drop(receiving.child.stdin.take());
            assert!(fed && receiving.child.wait().unwrap().success());
            break;
        }
        receiving.kill();
        let listed = s.run(&["list", "copy", "--output", "json"]);
        let names = if listed.code() == 0 {
            listed.json()["snapshots"].clone()
        } else {
            json!([])
        };
        assert_eq!(
            names.as_array().unwrap().len(),
            from.len() / 2,
            "round {round}"
        );
    }
    s.ok(&[
        "compare",
        &format!("vm@{snapshot}"),
        &format!("copy@{snapshot}"),
    ]);
    s.ok(&["check", "copy"]);
    assert!(!s.path("copy.receive.part").exists());
}

#[test]
fn a_receive_that_is_killed_at_any_moment_goes_on() {
    let s = Sandbox::without_disk();
    large_snapshots(&s);
    receive_under_kills(&s, "one", &[], 11);
    receive_under_kills(&s, "two", &["--from", "one"], 12);
}
