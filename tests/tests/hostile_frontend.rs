// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frontends that send garbage, break off, or die: each costs its own connection and nothing else.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use pcow_protocol::ErrorKind;
use pcow_protocol::codec::Connection;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_protocol::message::{
    BackendReply, BackendRequest, FrontendReply, FrontendRequest, Status,
};
use pcow_protocol::uffd::{CopyMode, Event, EventBuffer, Uffd};
use pcow_protocol::wire::{FEATURE_PROTOCOL_FEATURES, FaultFd};
use pcow_tests::backend::Backend;
use pcow_tests::handshake::Steps;
use pcow_tests::memory::Memory;
use pcow_tests::proc::descriptor_count;
use pcow_tests::random::Random;
use pcow_tests::scratch::Scratch;
use pcow_tests::waiting::wait_until;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);

struct Host {
    _scratch: Scratch,
    backend: Backend,
    descriptors: usize,
}

impl Host {
    fn new() -> Self {
        let scratch = Scratch::new();
        let image = scratch.image("image", SIZE, 64 << 10);
        let backend = Backend::start(&image, &[]);
        serve_somebody(backend.socket(), 1);
        backend.wait_for_log("frontend detached");
        let mut host = Self {
            _scratch: scratch,
            backend,
            descriptors: 0,
        };
        // The probes of the start and the first session are over when the number stays.
        let mut last = usize::MAX;
        wait_until("the backend is quiet", PATIENCE, || {
            let now = descriptor_count(host.backend.pid());
            std::mem::replace(&mut last, now) == now
        });
        host.descriptors = last;
        host
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.backend.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn steps(&self) -> Steps {
        Steps::new(self.backend.socket())
    }

    /// The backend lives, has lost no descriptor, and serves the next frontend.
    fn assert_unharmed(&self, after: &str) {
        wait_until(
            &format!("descriptors come back after: {after}"),
            PATIENCE,
            || descriptor_count(self.backend.pid()) <= self.descriptors,
        );
        serve_somebody(self.backend.socket(), 2);
    }
}

/// Attaches as a proper frontend does, and sees its stores.
fn serve_somebody(socket: &Path, value: u64) {
    let frontend = Frontend::connect(socket, &FrontendOptions::default()).unwrap();
    let memory = Memory::new(frontend.region());
    memory.store(4096, value);
    assert_eq!((memory.load(4096), memory.load(SIZE - 8)), (value, 0));
    frontend.flush().unwrap();
}

fn assert_closed(mut stream: &UnixStream, what: &str) {
    let mut rest = Vec::new();
    // A reset says the same as an end: there were bytes that nobody read.
    let end = stream.read_to_end(&mut rest);
    let closed = end.as_ref().map_or_else(
        |e| e.kind() == std::io::ErrorKind::ConnectionReset,
        |_| true,
    );
    assert!(closed, "{what}: {end:?}");
}

fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size]
        .iter()
        .flat_map(|v| v.to_ne_bytes())
        .collect()
}

#[test]
fn garbage_ends_the_connection_that_it_came_over() {
    let host = Host::new();
    let mut random = Random::new(3);
    let noise: Vec<u8> = (0..512)
        .flat_map(|_| random.next_word().to_ne_bytes())
        .collect();
    let cases = [
        ("noise", noise),
        ("zeros", vec![0; 64]),
        ("another version", header(1, 2, 0)),
        ("an unknown flag", header(1, 1 | 1 << 7, 0)),
        ("a reply nobody asked for", header(1, 1 | 4, 8)),
        ("an unknown request", header(999, 1, 0)),
        ("an unknown request beside known ones", header(1005, 1, 0)),
        ("a size that is not the request's", header(1, 1, 8)),
        ("a size beyond every limit", header(2, 1, u32::MAX)),
        ("a request out of order", header(1003, 1 | 8, 0)),
        (
            "a request of a later state",
            [header(1001, 1 | 8, 24), vec![0; 24]].concat(),
        ),
        (
            "unknown features",
            [header(2, 1, 8), u64::MAX.to_ne_bytes().to_vec()].concat(),
        ),
        ("no features", [header(2, 1, 8), vec![0; 8]].concat()),
    ];
    for (what, bytes) in cases {
        let stream = host.connect();
        // The backend may close before everything was written.
        let _ = (&stream).write_all(&bytes);
        assert_closed(&stream, what);
        host.assert_unharmed(what);
    }
}

#[test]
fn half_a_message_waits_and_harms_nobody_when_its_sender_goes() {
    let host = Host::new();
    let message = [
        header(2, 1, 8),
        FEATURE_PROTOCOL_FEATURES.to_ne_bytes().to_vec(),
    ]
    .concat();
    for cut in 1..message.len() {
        let mut stream = host.connect();
        stream.write_all(&message[..cut]).unwrap();
        drop(stream);
        // One after the other: there are places for a few connections only.
        wait_until("the backend notices", PATIENCE, || {
            let log = host.backend.log();
            let ended = log.iter().filter(|l| l.contains("ended inside a message"));
            ended.count() == cut
        });
    }
    host.assert_unharmed("half messages");
}

#[test]
fn a_frontend_may_die_after_any_message_of_the_handshake() {
    let host = Host::new();
    for steps in 0..=6 {
        host.steps().take(steps);
        host.assert_unharmed(&format!("the end after {steps} steps"));
    }
    let mut steps = host.steps();
    steps.take(6);
    let uffd = Uffd::create(None).unwrap();
    let attach = Steps::fault_fd(1 << 40, SIZE).encode(true);
    steps.main.send(&attach, &[uffd.as_fd()]).unwrap();
    drop(steps);
    host.assert_unharmed("the end while SET_FAULT_FD is unanswered");
}

#[test]
fn descriptors_that_do_not_belong_are_closed_and_end_the_connection() {
    let host = Host::new();
    let pipes: Vec<OwnedFd> = (0..5)
        .flat_map(|_| {
            let (a, b) = rustix::pipe::pipe().unwrap();
            [a, b]
        })
        .collect();
    let fds: Vec<_> = pipes.iter().map(AsFd::as_fd).collect();
    for count in [1, 8, 9, 10] {
        let steps = host.steps();
        let sent = steps
            .main
            .send(&FrontendRequest::GetFeatures.encode(true), &fds[..count]);
        assert!(sent.is_ok(), "{sent:?}");
        assert_closed(steps.main.stream(), &format!("{count} descriptors"));
        host.assert_unharmed(&format!("{count} descriptors"));
    }
    let mut steps = host.steps();
    steps.take(5);
    steps
        .main
        .send(&FrontendRequest::SetBackendReqFd.encode(true), &[])
        .unwrap();
    assert_closed(steps.main.stream(), "a channel without descriptor");
    host.assert_unharmed("a channel without descriptor");
}

#[test]
fn a_descriptor_of_the_wrong_kind_is_refused() {
    let host = Host::new();
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let mut steps = host.steps();
    steps.take(6);
    let reply = steps.ask(&Steps::fault_fd(1 << 40, SIZE), &[pipe.as_fd()]);
    assert!(
        matches!(reply, FrontendReply::Status(_, s) if s != Status::OK),
        "{reply:?}"
    );
    drop(steps);
    host.assert_unharmed("a pipe in place of a userfaultfd");
    let mut steps = host.steps();
    steps.take(5);
    steps
        .main
        .send(
            &FrontendRequest::SetBackendReqFd.encode(true),
            &[pipe.as_fd()],
        )
        .unwrap();
    let _ = steps.main.recv();
    let uffd = Uffd::create(None).unwrap();
    let _ = steps.main.send(
        &Steps::fault_fd(1 << 40, SIZE).encode(true),
        &[uffd.as_fd()],
    );
    let answer = steps.main.recv();
    let refused = |a: &FrontendReply| matches!(a, FrontendReply::Status(_, s) if *s != Status::OK);
    assert!(
        answer.as_ref().map_or(true, |r| refused(&r.message)),
        "{answer:?}"
    );
    drop(steps);
    host.assert_unharmed("a pipe in place of the backend channel");
}

#[test]
fn fields_out_of_their_range_end_the_connection() {
    let host = Host::new();
    let good = FaultFd {
        base: 1 << 40,
        size: SIZE,
        mapping_limit: 1000,
        reserved: 0,
    };
    let cases = [
        FaultFd {
            base: (1 << 40) + 4096,
            ..good
        },
        FaultFd { base: 0, ..good },
        FaultFd {
            size: SIZE / 2,
            ..good
        },
        FaultFd {
            mapping_limit: 15,
            ..good
        },
        FaultFd {
            reserved: 1,
            ..good
        },
    ];
    for case in cases {
        let mut steps = host.steps();
        steps.take(6);
        let uffd = Uffd::create(None).unwrap();
        let request = FrontendRequest::SetFaultFd(case).encode(true);
        steps.main.send(&request, &[uffd.as_fd()]).unwrap();
        assert_closed(steps.main.stream(), &format!("{case:?}"));
        host.assert_unharmed(&format!("{case:?}"));
    }
}

#[test]
fn a_frontend_that_does_not_serve_its_channel_is_given_up() {
    let host = Host::new();
    let mut steps = host.steps();
    steps.take(6);
    let uffd = Uffd::create(None).unwrap();
    let reply = steps.ask(&Steps::fault_fd(1 << 40, SIZE), &[uffd.as_fd()]);
    assert!(
        matches!(reply, FrontendReply::Status(_, s) if s != Status::OK),
        "{reply:?}"
    );
    drop(steps);
    host.assert_unharmed("a channel that nobody serves");
}

/// Makes the bytes that a frontend answers a request with.
type Answer<'a> = &'a dyn Fn(&BackendRequest) -> Vec<u8>;

#[test]
fn wrong_answers_on_the_backend_channel_end_the_session() {
    let host = Host::new();
    let answers: [Answer<'_>; 3] = [
        &|_| vec![0xff; 20],
        &|_| [header(1004, 1 | 4, 8), vec![0; 8]].concat(),
        &|request| {
            let reply = BackendReply {
                code: request.code(),
                status: Status::from_errno(libc_eio()),
            };
            reply.encode().as_bytes().to_vec()
        },
    ];
    for (i, answer) in answers.iter().enumerate() {
        let mut steps = host.steps();
        steps.take(6);
        let uffd = Uffd::create(None).unwrap();
        let attach = Steps::fault_fd(1 << 40, SIZE).encode(true);
        steps.main.send(&attach, &[uffd.as_fd()]).unwrap();
        let mut channel: Connection<BackendRequest> =
            Connection::new(steps.channel.take().unwrap());
        let request = channel.recv().unwrap().message;
        channel.stream().write_all(&answer(&request)).unwrap();
        let reply = steps.main.recv().unwrap().message;
        assert!(
            matches!(reply, FrontendReply::Status(_, s) if s != Status::OK),
            "{i}: {reply:?}"
        );
        drop((steps, channel));
        host.assert_unharmed(&format!("wrong answer {i}"));
    }
}

fn libc_eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}

/// A page of trap at a multiple of 2 MiB, in memory that is given back when this is dropped.
struct Trap {
    base: u64,
    uffd: Uffd,
    _memory: memmap2::MmapMut,
}

impl Trap {
    fn new() -> Self {
        let alignment = 2 * MIB;
        let len = usize::try_from(SIZE + alignment).unwrap();
        let memory = memmap2::MmapOptions::new().len(len).map_anon().unwrap();
        let base = u64::try_from(memory.as_ptr().addr()).unwrap();
        let base = base.next_multiple_of(alignment);
        let uffd = Uffd::create(None).unwrap();
        uffd.register(base, SIZE).unwrap();
        Self {
            base,
            uffd,
            _memory: memory,
        }
    }

    /// Stores to its first byte in a thread of its own, which waits.
    fn spawn_store(&self) -> std::thread::JoinHandle<()> {
        let base = usize::try_from(self.base).unwrap();
        std::thread::spawn(move || {
            let place = std::ptr::with_exposed_provenance_mut::<u8>(base);
            // SAFETY: the memory outlives the thread, which the test joins, and nobody else touches it meanwhile.
            unsafe { place.write_volatile(1) };
        })
    }

    fn has_fault(&self) -> bool {
        let mut buffer = EventBuffer::default();
        let mut events = self.uffd.read_events(&mut buffer).unwrap();
        events.any(|event| matches!(event, Event::Fault { address, .. } if address == self.base))
    }
}

#[test]
fn a_fault_that_a_session_has_read_and_not_answered_is_raised_again_when_it_ends() {
    let host = Host::new();
    let trap = Trap::new();
    let mut steps = host.steps();
    steps.take(6);
    let attach = Steps::fault_fd(trap.base, SIZE).encode(true);
    steps.main.send(&attach, &[trap.uffd.as_fd()]).unwrap();
    let mut channel: Connection<BackendRequest> = Connection::new(steps.channel.take().unwrap());
    let code = channel.recv().unwrap().message.code();
    let status = Status::OK;
    let registered = BackendReply { code, status }.encode();
    channel.send(&registered, &[]).unwrap();
    steps.main.recv().unwrap();
    let storing = trap.spawn_store();
    // The backend has read the fault, and this frontend never does what it answers.
    let request = channel.recv().unwrap().message;
    assert!(matches!(request, BackendRequest::Map(_)), "{request:?}");
    drop((steps, channel));
    wait_until("the fault is raised again", PATIENCE, || trap.has_fault());
    trap.uffd
        .copy(trap.base, &[0; 4096], CopyMode::default())
        .unwrap();
    storing.join().unwrap();
    host.assert_unharmed("a fault that was not answered");
}

#[test]
fn a_second_frontend_is_refused_while_the_first_is_attached() {
    let host = Host::new();
    let first = Frontend::connect(host.backend.socket(), &FrontendOptions::default()).unwrap();
    let memory = Memory::new(first.region());
    memory.store(0, 5);
    let error = Frontend::connect(host.backend.socket(), &FrontendOptions::default()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Refused(_)), "{error}");
    memory.store(MIB, 6);
    assert_eq!((memory.load(0), memory.load(MIB)), (5, 6));
}

#[test]
fn a_flood_of_connections_is_bounded_and_passes() {
    let host = Host::new();
    let flood: Vec<_> = (0..200).map(|_| host.connect()).collect();
    wait_until("the flood is noticed", PATIENCE, || {
        host.backend
            .log()
            .iter()
            .any(|l| l.contains("connection was refused"))
    });
    assert!(descriptor_count(host.backend.pid()) < host.descriptors + 100);
    drop(flood);
    host.assert_unharmed("a flood of connections");
}

const VICTIM: &str = "PCOW_TEST_VICTIM_OF";

/// Not a test of its own: the process that [`a_frontend_may_be_killed_while_faults_are_in_service`] kills.
#[test]
fn victim() {
    let Some(socket) = std::env::var_os(VICTIM) else {
        return;
    };
    let frontend = Frontend::connect(Path::new(&socket), &FrontendOptions::default()).unwrap();
    println!("attached");
    let threads: Vec<_> = (0..4)
        .map(|seed| {
            let memory = Memory::new(frontend.region());
            std::thread::spawn(move || {
                let mut random = Random::new(seed);
                loop {
                    let place = random.below(SIZE / 8) * 8;
                    if random.below(2) == 0 {
                        memory.store(place, 1);
                    } else {
                        memory.load(place);
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn a_frontend_may_be_killed_while_faults_are_in_service() {
    let host = Host::new();
    for _ in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["victim", "--exact", "--nocapture"])
            .env(VICTIM, host.backend.socket())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("attached") {
            line.clear();
            assert!(
                std::io::BufRead::read_line(&mut out, &mut line).unwrap() > 0,
                "the victim ended"
            );
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let frontend =
            Frontend::connect(host.backend.socket(), &FrontendOptions::default()).unwrap();
        drop(frontend);
    }
    host.assert_unharmed("killed frontends");
}
