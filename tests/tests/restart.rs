// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The backend is killed, stopped, replaced or asked to end, under load and beside other backends: the frontend's memory
//! only waits, and an image never has two.
#![allow(missing_docs, clippy::unwrap_used)]

use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pcow_format::{LOCK_FILE, Process, Purpose, Stored, holder};
use pcow_protocol::frontend::{Frontend, FrontendOptions, LinkStatus};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::program;
use pcow_tests::scratch::Scratch;
use pcow_tests::soak::{Difference, Load, build, come_and_go, kill_again_and_again};
use pcow_tests::strace::{Strace, has_ended};
use pcow_tests::waiting::wait_until;
use rustix::net::{Shutdown, SocketAddrAny, SocketAddrUnix, getpeername, shutdown};
use rustix::process::Signal;
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn connect(socket: &Path) -> Frontend {
    Frontend::connect(socket, &FrontendOptions::default()).unwrap()
}

/// What a backend that must not be started says.
fn refusal(image: &Path, arguments: &[&str]) -> String {
    let scratch = Scratch::new();
    let mut backend = Backend::spawn(image, &scratch.path("s"), arguments);
    let status = backend.wait();
    assert_eq!(status.code(), Some(1), "{:#?}", backend.log());
    backend.log().last().unwrap().clone()
}

fn reason(frontend: &Frontend) -> String {
    match frontend.status() {
        LinkStatus::Waiting { reason, .. } => reason,
        _ => String::new(),
    }
}

#[test]
fn two_hundred_kills_under_load_lose_nothing_and_all_that_waits_goes_on() {
    let report = kill_again_and_again(200, 1, |_| {});
    println!("{report}");
    assert!(report.is_good(), "{report}");
}

#[test]
fn a_backend_takes_no_more_after_many_frontends_have_come_and_gone() {
    let coming = come_and_go(Duration::from_secs(10));
    println!("{coming}");
    assert!(coming.frontends > 1, "{coming}");
    assert!(coming.is_flat(), "{coming}");
}

/// Ends this process's connections to the backend that listens at `socket`, as a network would that breaks.
fn cut_connections(socket: &Path) {
    let address = SocketAddrAny::from(SocketAddrUnix::new(socket).unwrap());
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let name = entry.unwrap().file_name();
        let number: RawFd = name.to_str().unwrap().parse().unwrap();
        // SAFETY: the number is only passed to fcntl(2), which fails if another thread has closed it meanwhile.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        // A descriptor of its own, so that what is looked at is what is shut down.
        let Ok(own) = rustix::io::fcntl_dupfd_cloexec(fd, 0) else {
            continue;
        };
        if getpeername(&own).ok().flatten().as_ref() == Some(&address) {
            // It may have ended by itself.
            let _ = shutdown(&own, Shutdown::Both);
        }
    }
}

#[test]
fn a_connection_that_breaks_under_load_is_followed_by_another_to_the_same_backend() {
    let s = Scratch::new();
    let image = build(&s, 1);
    let mut backend = Backend::start(&image, &[]);
    let frontend = connect(backend.socket());
    let load = Load::start(&frontend, 1);
    let mut waited = 0;
    for _ in 0..50 {
        let before = load.touches();
        wait_until("there is load", PATIENCE, || load.touches() > before + 200);
        let waiting = load.waiting();
        waited += waiting.len();
        cut_connections(backend.socket());
        assert!(frontend.wait_detached(PATIENCE) || frontend.wait_attached(PATIENCE));
        wait_until("they go on", PATIENCE, || {
            load.still_in(&waiting).is_empty()
        });
    }
    assert!(waited > 50, "{waited} threads waited at the cuts");
    let done = load.finish();
    drop(frontend);
    assert!(backend.terminate().success());
    let log = backend.log();
    let back = log.iter().filter(|l| l.contains("has come back")).count();
    assert!(back > 25, "came back {back} times");
    assert_eq!(done.compare_with_disk(&image), Difference::default());
}

#[test]
fn beside_a_stopped_backend_no_other_is_served_until_it_is_killed() {
    let s = Scratch::new();
    let image = build(&s, 1);
    let mut a = Backend::start(&image, &[]);
    let frontend = connect(a.socket());
    let load = Load::start(&frontend, 1);
    wait_until("there is load", PATIENCE, || load.touches() > 1000);
    a.signal(Signal::STOP);
    wait_until("a thread waits", PATIENCE, || !load.waiting().is_empty());
    let said = refusal(&image, &[]);
    let name = format!("in use by process {}", a.pid());
    assert!(said.contains(&name), "{said}");
    let waiting = load.waiting();
    a.kill();
    let waiting = load.still_in(&waiting);
    a.restart(&image, &[]);
    wait_until("they go on", PATIENCE, || {
        load.still_in(&waiting).is_empty()
    });
    let before = load.touches();
    wait_until("there is load", PATIENCE, || load.touches() > before + 1000);
    let done = load.finish();
    drop(frontend);
    assert!(a.terminate().success());
    assert_eq!(done.compare_with_disk(&image), Difference::default());
}

#[test]
fn a_stopped_backend_is_taken_over_from_by_force() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let mut a = Backend::start(&image, &[]);
    let frontend = connect(a.socket());
    Memory::new(frontend.region()).store(8, 7);
    a.signal(Signal::STOP);
    let b = Backend::spawn(&image, a.socket(), &["--takeover"]);
    b.wait_for_log("it has not ended within 10 s");
    assert!(!a.wait().success(), "it was killed");
    wait_until("the other serves", PATIENCE, || {
        b.log().iter().any(|line| line.contains("has come back"))
    });
    assert!(frontend.wait_attached(PATIENCE));
    assert_eq!(Memory::new(frontend.region()).load(8), 7);
}

/// The longest that any thread of the load waits while one backend makes room for another.
fn longest_stall(arguments: &[&str], replace: impl Fn(&mut Backend, &Path)) -> Duration {
    let s = Scratch::new();
    let image = build(&s, 1);
    let mut backend = Backend::start(&image, arguments);
    let frontend = connect(backend.socket());
    let load = Load::start(&frontend, 1);
    let mut longest = Duration::ZERO;
    for _ in 0..3 {
        let before = load.touches();
        wait_until("there is load", PATIENCE, || load.touches() > before + 1000);
        load.take_longest();
        replace(&mut backend, &image);
        let before = load.touches();
        wait_until("there is load", PATIENCE, || load.touches() > before + 1000);
        longest = longest.max(load.take_longest());
    }
    let done = load.finish();
    drop(frontend);
    backend.kill();
    assert_eq!(done.compare_with_disk(&image), Difference::default());
    longest
}

#[test]
fn a_takeover_under_load_is_a_pause() {
    let plain = longest_stall(&[], |backend, image| {
        backend.kill();
        backend.restart(image, &[]);
    });
    let takeover = longest_stall(&[], |backend, image| {
        let mut next = Backend::spawn(image, backend.socket(), &["--takeover"]);
        std::mem::swap(backend, &mut next);
        let mut old = next;
        assert!(old.wait().success(), "it ended cleanly: {:#?}", old.log());
        backend.wait_for_log("has come back");
    });
    let ratio = takeover.as_secs_f64() / plain.as_secs_f64();
    println!(
        "longest stall: {takeover:.1?} with a takeover, {plain:.1?} with a kill and a restart, ratio {ratio:.2}"
    );
}

#[test]
fn a_backend_that_is_asked_to_end_flushes_and_warns_and_the_frontend_goes_on_with_the_next() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let mut backend = Backend::start(&image, &["--flush-interval", "0"]);
    let frontend = connect(backend.socket());
    let memory = Memory::new(frontend.region());
    memory.store(8, 7);
    assert!(backend.terminate().success());
    let log = backend.log().join("\n");
    assert!(log.contains("will wait for the next backend"), "{log}");
    assert!(!backend.socket().exists());
    let stored = Stored::open(&image, &[]).unwrap();
    let report = pcow_format::check::check(&stored).unwrap();
    assert_eq!((report.data_clusters, report.live_clusters), (1, 0));
    memory.store(16, 9);
    let clone = memory.clone();
    let waiting = std::thread::spawn(move || clone.load(MIB));
    wait_until(
        "the status says so",
        PATIENCE,
        || matches!(frontend.status(), LinkStatus::Waiting { since, .. } if since < Instant::now()),
    );
    assert!(!waiting.is_finished());
    backend.restart(&image, &[]);
    assert_eq!(waiting.join().unwrap(), 0);
    assert_eq!((memory.load(8), memory.load(16)), (7, 9));
    frontend.flush().unwrap();
}

/// For a frontend that looks for no other backend.
fn no_return() -> FrontendOptions {
    FrontendOptions {
        reconnect: false,
        ..FrontendOptions::default()
    }
}

/// A frontend that has stored and stays away when its backend is killed.
fn kept_image(s: &Scratch, arguments: &[&str]) -> (PathBuf, Backend, Frontend) {
    let image = s.image("a", 4 * MIB, 64 << 10);
    let mut backend = Backend::start(&image, arguments);
    let keeps = Frontend::connect(backend.socket(), &no_return()).unwrap();
    Memory::new(keeps.region()).store(8, 7);
    backend.kill();
    (image, backend, keeps)
}

/// Only an attached frontend counted once, so that what a guest had stored since its backend was killed was not flushed before it
/// was back, and an interval over.
#[test]
fn a_backend_flushes_at_once_what_was_stored_before_it_came() {
    let s = Scratch::new();
    let (image, mut backend, _keeps) = kept_image(&s, &["--flush-interval", "0"]);
    let live_clusters = || {
        let report = pcow_format::check::check(&Stored::open(&image, &[]).unwrap());
        report.unwrap().live_clusters
    };
    assert_eq!(live_clusters(), 1);
    backend.restart(&image, &["--flush-interval", "86400"]);
    wait_until("the flush", PATIENCE, || live_clusters() == 0);
}

#[test]
fn a_backend_flushes_at_intervals_while_a_frontend_that_is_not_back_may_store() {
    let s = Scratch::new();
    let (image, mut backend, _keeps) = kept_image(&s, &["--flush-interval", "0"]);
    backend.restart(&image, &["--flush-interval", "1"]);
    backend.wait_for_log("waiting for it to come back");
    wait_for_flushes(&backend);
}

#[test]
fn a_backend_flushes_at_intervals_what_a_frontend_may_store_that_lost_its_session() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let backend = Backend::start(&image, &["--flush-interval", "1"]);
    let stream = UnixStream::connect(backend.socket()).unwrap();
    let cut = stream.try_clone().unwrap();
    let keeps = Frontend::from_stream(stream, &no_return()).unwrap();
    let memory = Memory::new(keeps.region());
    memory.store(8, 7);
    shutdown(&cut, Shutdown::Both).unwrap();
    backend.wait_for_log("frontend detached");
    memory.store(8, 9);
    wait_for_flushes(&backend);
}

/// Waits until more was flushed than at the beginning or the end of a session; `backend` is killed then.
fn wait_for_flushes(backend: &Backend) {
    let strace = Strace::kill_at(backend.pid(), "fdatasync", 8);
    wait_until("it flushes again and again", PATIENCE, || {
        has_ended(backend.pid())
    });
    strace.end();
}

#[test]
fn a_frontend_that_keeps_an_image_keeps_others_out_until_it_ends() {
    let s = Scratch::new();
    let (image, mut backend, keeps) = kept_image(&s, &[]);
    backend.restart(&image, &[]);
    backend.wait_for_log("waiting for it to come back");
    let mut refused = None;
    wait_until("it listens", PATIENCE, || {
        refused = Frontend::connect(backend.socket(), &no_return()).err();
        refused.as_ref().and_then(pcow_protocol::Error::errno) == Some(libc::EBUSY)
    });
    drop(keeps);
    let next = connect(backend.socket());
    assert_eq!(Memory::new(next.region()).load(8), 7);
}

fn copy(arguments: &str, from: &Path, to: &Path) {
    let done = Command::new("cp").arg(arguments).args([from, to]).status();
    assert!(done.unwrap().success());
}

#[test]
fn a_copy_of_the_image_is_not_taken_for_it() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let mut original = Backend::start(&image, &[]);
    let frontend = connect(original.socket());
    let memory = Memory::new(frontend.region());
    memory.store(8, 7);
    original.kill();
    copy("-a", &image, &s.path("copy"));
    let mut other = Backend::start_at(original.socket(), &s.path("copy"), &[]);
    wait_until("it is refused", PATIENCE, || {
        reason(&frontend).contains("it serves a copy of the image")
    });
    assert_eq!(memory.load(8), 7, "what is mapped is the image's still");
    other.kill();
    // One that has no lock of its own to compare, since another virtual machine keeps that.
    let witness = s.path("witness.sock");
    let mut other = Backend::start_at(&witness, &s.path("copy"), &[]);
    let keeps = Frontend::connect(&witness, &no_return()).unwrap();
    other.kill();
    let mut other = Backend::start_at(original.socket(), &s.path("copy"), &[]);
    wait_until("it is refused", PATIENCE, || {
        reason(&frontend).contains("another image, a copy, or a changed one")
    });
    other.wait_for_log("its memory is of a copy");
    other.kill();
    drop(keeps);
    original.restart(&image, &[]);
    assert!(frontend.wait_attached(PATIENCE));
    assert_eq!(memory.load(8), 7);
}

#[test]
fn a_copy_made_of_links_cannot_be_served_at_all() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let mut backend = Backend::start(&image, &[]);
    let frontend = connect(backend.socket());
    backend.kill();
    copy("-al", &image, &s.path("copy"));
    let said = refusal(&s.path("copy"), &[]);
    assert!(said.contains("more than one name"), "{said}");
    std::fs::remove_dir_all(s.path("copy")).unwrap();
    backend.restart(&image, &[]);
    assert!(frontend.wait_attached(PATIENCE));
}

/// A process of this test's that has nothing to do with the image.
struct Bystander(Child);

impl Bystander {
    /// One that another process can be told from by its start, which the kernel tells in ticks of some milliseconds.
    fn later_than(pid: u32) -> Self {
        let start = |pid| Process::running(pid, Uuid::nil()).unwrap().start;
        loop {
            let mut sleep = Command::new("sleep");
            let one = Self(sleep.arg("600").stdin(Stdio::null()).spawn().unwrap());
            if start(one.0.id()) != start(pid) {
                return one;
            }
        }
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_takeover_signals_nobody_whom_the_lock_does_not_name_exactly() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let mut backend = Backend::start(&image, &[]);
    let lock = image.join(LOCK_FILE);
    let right = std::fs::read_to_string(&lock).unwrap();
    let mut bystander = Bystander::later_than(backend.pid());
    let pid = format!("pid={} ", backend.pid());
    let field = |name: &str| {
        let (_, rest) = right.split_once(name).unwrap();
        let value = rest.split_whitespace().next().unwrap();
        format!("{name}{value}")
    };
    for (text, why) in [
        (
            right.replace(&pid, &format!("pid={} ", bystander.0.id())),
            "another boot, namespace or start time",
        ),
        (
            right.replace(&field("start="), "start=1"),
            "another boot, namespace or start time",
        ),
        (
            right.replace(&field("namespace="), "namespace=1"),
            "another boot, namespace or start time",
        ),
        (
            right.replace(&field("boot="), "boot=00000000-0000-4000-8000-000000000000"),
            "another boot, namespace or start time",
        ),
        (right.replace("serve", "change"), "is a command"),
        (right.replace("boot=", "boot"), "does not say which process"),
        (String::new(), "does not say which process"),
    ] {
        std::fs::write(&lock, &text).unwrap();
        let said = refusal(&image, &["--takeover"]);
        assert!(said.contains(why), "'{why}' is not in: {said}");
        assert!(said.contains("without --takeover"), "{said}");
    }
    assert!(bystander.0.try_wait().unwrap().is_none());
    std::fs::write(&lock, &right).unwrap();
    let next = Backend::spawn(&image, backend.socket(), &["--takeover"]);
    assert!(backend.wait().success(), "the right one is ended");
    next.wait_for_log("serving ");
    let stored = Stored::open(&image, &[]).unwrap();
    let Some(pcow_format::Holder::Writer(record)) = holder(stored.directory()).unwrap() else {
        panic!("nobody serves");
    };
    let (process, purpose) = record.process.unwrap();
    assert_eq!((process.pid, purpose), (next.pid(), Purpose::Serve));
}

/// As where `/proc` shows no processes of other users.
#[test]
fn a_takeover_from_a_process_that_cannot_be_looked_at_is_refused() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let mut backend = Backend::start(&image, &[]);
    let hide = format!(
        "mount -t tmpfs none /proc/{} && exec \"$0\" \"$@\"",
        backend.pid()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &hide]);
    command.arg(program("pcow-backend")).arg("--takeover");
    command.arg("--socket").arg(s.path("s"));
    command.arg("--image").arg(&image).stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("it cannot be looked at"), "{said}");
    assert_eq!(output.status.code(), Some(1));
    let frontend = connect(backend.socket());
    Memory::new(frontend.region()).store(8, 7);
    drop(frontend);
    assert!(backend.terminate().success(), "it was left alone");
}

#[test]
fn a_takeover_from_nobody_is_a_start() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let mut first = Backend::start(&image, &["--takeover"]);
    first.kill();
    let second = Backend::start(&image, &["--takeover"]);
    second.wait_for_log("there is no backend to take over from");
}
