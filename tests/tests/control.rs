// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control socket of a running backend: what `docs/control.md` shows is what happens; rude clients cost only
//! themselves.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pcow_protocol::control::{Client, ControlError, SOCKET_FILE};
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::qmp::Qmp;
use pcow_tests::scratch::Scratch;
use pcow_tests::strace::Strace;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 128 * MIB;
/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);
const DOCUMENT: &str = include_str!("../../docs/control.md");

struct Served {
    _scratch: Scratch,
    image: PathBuf,
    backend: Backend,
}

fn serve(arguments: &[&str]) -> Served {
    let scratch = Scratch::new();
    let image = scratch.image("vm.pcow", SIZE, 65536);
    let backend = Backend::start(&image, arguments);
    Served {
        _scratch: scratch,
        image,
        backend,
    }
}

impl Served {
    fn client(&self) -> Client {
        Client::connect(&self.image, None).unwrap().unwrap()
    }

    fn attach(&self) -> Frontend {
        Frontend::connect(self.backend.socket(), &FrontendOptions::default()).unwrap()
    }
}

fn ask(client: &mut Client, command: &str) -> Value {
    client.execute(command, json!({}), PATIENCE).unwrap()
}

fn wait_for_event(client: &mut Client, name: &str) -> Value {
    loop {
        let event = client.next_event(PATIENCE).unwrap().expect(name);
        if event.name == name {
            return event.data;
        }
    }
}

/// The messages of the document's examples, each with whether the client sends it.
fn examples() -> Vec<(bool, Value)> {
    let mut messages: Vec<(bool, String)> = Vec::new();
    let mut inside = false;
    for line in DOCUMENT.lines() {
        if line.starts_with("```") {
            inside = !inside;
            continue;
        }
        match (inside, line.split_at_checked(3)) {
            (true, Some(("-> ", text))) => messages.push((true, text.to_owned())),
            (true, Some(("<- ", text))) => messages.push((false, text.to_owned())),
            (true, _) => messages.last_mut().unwrap().1.push_str(line),
            _ => {}
        }
    }
    let parse = |(sent, text): (bool, String)| (sent, serde_json::from_str(&text).expect(&text));
    messages.into_iter().map(parse).collect()
}

/// The same members everywhere, and values of the same type. Of a list the first element counts.
fn same_shape(found: &Value, shown: &Value) -> bool {
    match (found, shown) {
        (Value::Object(a), Value::Object(b)) => {
            a.keys().eq(b.keys()) && a.iter().all(|(key, value)| same_shape(value, &b[key]))
        }
        (Value::Array(a), Value::Array(b)) => match (a.first(), b.first()) {
            (Some(a), Some(b)) => same_shape(a, b),
            (a, b) => a.is_none() == b.is_none(),
        },
        _ => std::mem::discriminant(found) == std::mem::discriminant(shown),
    }
}

/// Reads lines until one is the answer, or the event of this name.
fn next_message(
    lines: &mut impl Iterator<Item = std::io::Result<String>>,
    event: Option<&str>,
) -> Value {
    loop {
        let value: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        if value.get("event").and_then(Value::as_str) == event {
            return value;
        }
    }
}

#[test]
fn every_example_of_the_document_is_answered_as_it_says() {
    let served = serve(&[]);
    let mut stream = UnixStream::connect(served.image.join(SOCKET_FILE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut frontend = None;
    let examples = examples();
    for (sent, shown) in &examples {
        if *sent {
            // Without a newline, as some clients send.
            stream.write_all(shown.to_string().as_bytes()).unwrap();
            continue;
        }
        let event = shown.get("event").and_then(Value::as_str);
        let found = next_message(&mut lines, event);
        assert!(
            same_shape(&found, shown),
            "found\n{found:#}\nshown\n{shown:#}"
        );
        if frontend.is_none() {
            // After the greeting, for the rest.
            let attached = served.attach();
            Memory::new(attached.region()).store(0, 1);
            frontend = Some(attached);
        }
    }
    let executed = |name: &str| examples.iter().any(|(s, m)| *s && m["execute"] == name);
    let headings: Vec<_> = DOCUMENT
        .lines()
        .filter_map(|l| l.strip_prefix("### "))
        .collect();
    assert!(headings.iter().all(|name| executed(name)), "{headings:?}");
}

#[test]
fn the_document_describes_every_command() {
    let served = serve(&[]);
    let commands = ask(&mut served.client(), "query-commands");
    let names = commands.as_array().unwrap().iter().map(|c| &c["name"]);
    let names: Vec<_> = names.map(|n| n.as_str().unwrap().to_owned()).collect();
    let headings = DOCUMENT.lines().filter_map(|l| l.strip_prefix("### "));
    assert_eq!(names, headings.collect::<Vec<_>>());
}

#[test]
fn a_client_of_qemus_monitor_can_use_it() {
    let served = serve(&[]);
    let mut qmp = Qmp::connect(&served.image.join(SOCKET_FILE), PATIENCE);
    let status = qmp.command("query-status");
    assert_eq!(status["virtual-size"], SIZE);
    assert_eq!(status["process"], served.backend.pid());
    let refused = qmp.execute("flush", &json!({ "now": 1 })).unwrap_err();
    assert!(refused.contains("'now'"), "{refused}");
}

#[test]
fn clients_hear_of_frontends_and_see_what_they_do() {
    let served = serve(&[]);
    let mut client = served.client();
    assert_eq!(ask(&mut client, "query-stats")["session"], Value::Null);
    let frontend = served.attach();
    let me = json!(std::process::id());
    assert_eq!(
        wait_for_event(&mut client, "FRONTEND_ATTACHED")["process"],
        me
    );
    let memory = Memory::new(frontend.region());
    memory.store(0, 7);
    memory.load(MIB);
    let stats = ask(&mut client, "query-stats");
    assert_eq!(
        (&stats["session"]["stores"], &stats["session"]["loads"]),
        (&json!(1), &json!(1))
    );
    ask(&mut client, "flush");
    drop((memory, frontend));
    wait_for_event(&mut client, "FRONTEND_DETACHED");
    assert_eq!(ask(&mut client, "query-status")["frontend"], Value::Null);
}

/// More than socket and queue hold together is asked for and never read; meanwhile the guest and another client go on.
#[test]
fn a_client_that_never_reads_is_dropped_and_delays_nobody() {
    let served = serve(&[]);
    let frontend = served.attach();
    let memory = Memory::new(frontend.region());
    let mut deaf = UnixStream::connect(served.image.join(SOCKET_FILE)).unwrap();
    deaf.write_all(b"{\"execute\":\"qmp_capabilities\"}")
        .unwrap();
    let mut other = served.client();
    let mut asked = 0_u64;
    while deaf.write_all(b"{\"execute\":\"query-commands\"}").is_ok() {
        memory.store(asked * 65536 % SIZE, asked);
        if asked.is_multiple_of(256) {
            ask(&mut other, "query-status");
        }
        asked += 1;
        assert!(asked < 1_000_000, "it is never dropped");
    }
    assert!(asked > 1024, "some may be left unread");
    ask(&mut other, "query-status");
}

#[test]
fn what_is_no_message_ends_the_connection_with_the_reason() {
    let served = serve(&[]);
    let too_deep = "{\"a\":".repeat(17);
    let too_long = format!("{{\"{}", "x".repeat(70_000));
    for (bad, reason) in [
        ("hello\n", "must be a JSON object"),
        (too_deep.as_str(), "deep"),
        (too_long.as_str(), "bytes"),
    ] {
        let mut stream = UnixStream::connect(served.image.join(SOCKET_FILE)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The backend may have had enough before all of it is sent.
        let _ = stream.write_all(bad.as_bytes());
        let mut text = Vec::new();
        // A connection that is ended with something unread is reset, after what was sent has arrived.
        let _ = stream.read_to_end(&mut text);
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(reason), "{bad:.20}: {text}");
    }
    ask(&mut served.client(), "query-status");
}

#[test]
fn nothing_but_the_negotiation_is_carried_out_before_it() {
    let served = serve(&[]);
    let mut stream = UnixStream::connect(served.image.join(SOCKET_FILE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    next_message(&mut lines, None);
    for (request, class) in [
        ("quit", Some("CommandNotFound")),
        ("qmp_capabilities", None),
        ("qmp_capabilities", Some("CommandNotFound")),
    ] {
        writeln!(stream, "{}", json!({ "execute": request })).unwrap();
        let answer = next_message(&mut lines, None);
        assert_eq!(answer["error"]["class"].as_str(), class);
    }
}

#[test]
fn quit_ends_the_backend_and_takes_the_socket_with_it() {
    let mut served = serve(&[]);
    ask(&mut served.client(), "quit");
    assert!(served.backend.wait().success());
    assert!(!served.image.join(SOCKET_FILE).exists());
}

#[test]
fn the_socket_is_its_owners_alone_and_a_stale_one_is_replaced() {
    let mut served = serve(&[]);
    let socket = served.image.join(SOCKET_FILE);
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o600);
    served.backend.kill();
    assert!(socket.exists());
    assert!(Client::connect(&served.image, None).unwrap().is_none());
    served.backend = Backend::start(&served.image, &["--control-for-group"]);
    assert_eq!(mode(&socket), 0o660);
    ask(&mut served.client(), "query-status");
}

#[test]
fn a_copied_socket_reaches_nobody() {
    let served = serve(&[]);
    let copy = served.image.with_extension("copy");
    std::fs::create_dir(&copy).unwrap();
    std::fs::hard_link(served.image.join(SOCKET_FILE), copy.join(SOCKET_FILE)).unwrap();
    let refused = Client::connect(&copy, None).unwrap_err();
    assert!(
        matches!(refused, ControlError::Elsewhere { .. }),
        "{refused}"
    );
}

#[test]
fn a_read_only_image_has_no_socket_and_another_place_can_be_chosen() {
    let served = serve(&["--read-only"]);
    assert!(!served.image.join(SOCKET_FILE).exists());
    drop(served);
    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("x".repeat(100)).join("socket");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    let served = serve(&["--control", path.to_str().unwrap()]);
    assert!(Client::connect(&served.image, None).unwrap().is_none());
    let mut client = Client::connect(&served.image, Some(&path))
        .unwrap()
        .unwrap();
    ask(&mut client, "query-status");
}

#[test]
fn a_kernel_that_has_no_memory_for_a_while_ends_no_control_socket() {
    let served = serve(&[]);
    let kernel = Strace::fail_in_thread(served.backend.pid(), "control", "ppoll", "ENOMEM");
    // Whoever waited already may have to be woken to wait again.
    let wakes = UnixStream::connect(served.image.join(SOCKET_FILE)).unwrap();
    served
        .backend
        .wait_for_log("control: cannot wait for connections");
    let came_meanwhile = UnixStream::connect(served.image.join(SOCKET_FILE)).unwrap();
    drop((kernel, wakes));
    came_meanwhile.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut greeting = String::new();
    BufReader::new(came_meanwhile)
        .read_line(&mut greeting)
        .unwrap();
    assert!(greeting.contains("QMP"), "{greeting}");
}
