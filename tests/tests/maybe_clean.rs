// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Touches that may be loads and are served like stores: what was only read is given back, and nothing else.
//!
//! Without KVM such touches come from a frontend whose socket another process has connected: its threads are unknown to
//! the backend.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pcow_format::check::check;
use pcow_format::{ClusterRange, Image, Stored};
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::loop_mount::LoopMount;
use pcow_tests::memory::Memory;
use pcow_tests::scratch::{Scratch, store};
use pcow_tests::strace::Strace;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 64 * MIB;
const CLUSTERS: u64 = SIZE / CLUSTER;
/// The value that the base holds in every second cluster.
const BASE: u64 = 0x0b0b_0b0b;
const CONNECT_TO: &str = "PCOW_TEST_CONNECT_TO";
const BE_A_FRONTEND: &str = "PCOW_TEST_BE_A_FRONTEND";

/// Run by the tests in a process of its own, with a socket as standard input: the socket that it is to connect for somebody
/// else, or one that somebody has connected for it.
#[test]
fn helps_in_a_process_of_its_own() {
    if let Some(path) = std::env::var_os(CONNECT_TO) {
        hand_over(&UnixStream::connect(Path::new(&path)).unwrap());
    }
    if std::env::var_os(BE_A_FRONTEND).is_some() {
        let stream = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        let frontend = Frontend::from_stream(stream.into(), &FrontendOptions::default()).unwrap();
        let memory = Memory::new(frontend.region());
        touch_all(&memory);
        check_all(&memory);
    }
}

fn helper(variable: &str, value: &Path, stdin: UnixStream) {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helps_in_a_process_of_its_own"])
        .env(variable, value)
        .stdin(OwnedFd::from(stdin))
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
}

fn hand_over(stream: &UnixStream) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [stream.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let stdin = std::io::stdin();
    let byte = [IoSlice::new(b"x")];
    sendmsg(stdin.as_fd(), &byte, &mut control, SendFlags::empty()).unwrap();
}

/// A connection to the backend that another process has made.
fn connect_elsewhere(socket: &Path) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    helper(CONNECT_TO, socket, theirs);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut slices = [IoSliceMut::new(&mut byte)];
    recvmsg(&ours, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.unwrap().into()
}

fn attach(backend: &Backend) -> Frontend {
    let stream = connect_elsewhere(backend.socket());
    Frontend::from_stream(stream, &FrontendOptions::default()).unwrap()
}

/// A clone of a base that holds [`BASE`] in every second cluster.
fn clone(scratch: &Scratch) -> PathBuf {
    let base = scratch.image("base", SIZE, CLUSTER);
    let image = Image::open(&base, &[]).unwrap();
    for cluster in (0..CLUSTERS).step_by(2) {
        store(&image, cluster * CLUSTER + 8, &BASE.to_le_bytes());
    }
    drop(image);
    scratch.clone_of("image", &base, CLUSTER)
}

fn base_word(cluster: u64) -> u64 {
    if cluster.is_multiple_of(2) { BASE } else { 0 }
}

/// The clusters that are data in the active layer.
fn data_clusters(image: &Path) -> Vec<u64> {
    let image = Image::open(image, &[]).unwrap();
    let states = image
        .active()
        .states(ClusterRange::new(0, CLUSTERS))
        .unwrap();
    let numbered = (0..CLUSTERS).zip(states);
    numbered
        .filter(|(_, state)| state.is_data())
        .map(|(cluster, _)| cluster)
        .collect()
}

/// Stores into every 50th cluster, and asks for write access to all others without storing, as a kernel worker does.
fn touch_all(memory: &Memory) {
    for cluster in 0..CLUSTERS {
        let offset = cluster * CLUSTER + 8;
        if cluster.is_multiple_of(50) {
            memory.store(offset, cluster + 1);
        } else {
            memory.ask_for_write_access(offset);
        }
    }
}

fn check_all(memory: &Memory) {
    for cluster in 0..CLUSTERS {
        let expected = if cluster.is_multiple_of(50) {
            cluster + 1
        } else {
            base_word(cluster)
        };
        let found = memory.load(cluster * CLUSTER + 8);
        assert_eq!(found, expected, "cluster {cluster}");
    }
}

fn stored() -> Vec<u64> {
    (0..CLUSTERS).step_by(50).collect()
}

#[test]
fn what_was_only_read_is_given_back_at_a_clean_end_with_the_frontend_attached() {
    let scratch = Scratch::new();
    let image = clone(&scratch);
    let mut backend = Backend::start(&image, &[]);
    let frontend = attach(&backend);
    let memory = Memory::new(frontend.region());
    touch_all(&memory);
    check_all(&memory);
    backend.wait_for_log("loads copy and allocate, too");
    assert!(backend.terminate().success());
    backend.wait_for_log("session over");
    drop((memory, frontend));
    assert_eq!(data_clusters(&image), stored());
    let report = check(&Stored::open(&image, &[]).unwrap()).unwrap();
    assert!(report.corruptions.is_empty(), "{report:?}");
}

/// Device I/O that was handed an address may store into pages that are not mapped any more.
#[test]
fn nothing_is_given_back_while_device_io_is_under_way() {
    let scratch = Scratch::new();
    let image = clone(&scratch);
    let mut backend = Backend::start(&image, &[]);
    let frontend = attach(&backend);
    let memory = Memory::new(frontend.region());
    touch_all(&memory);
    let io = frontend.bounces().begin_io();
    assert!(backend.terminate().success());
    drop(io);
    drop((memory, frontend));
    let all: Vec<u64> = (0..CLUSTERS).collect();
    assert_eq!(data_clusters(&image), all);
}

/// It once asked for two seconds whether the frontend is gone whose session it had just ended, and the guest waited.
#[test]
fn a_backend_that_is_asked_to_end_does_not_wait_for_the_frontend_to_die() {
    let scratch = Scratch::new();
    let image = clone(&scratch);
    let mut backend = Backend::start(&image, &[]);
    let frontend = attach(&backend);
    let memory = Memory::new(frontend.region());
    touch_all(&memory);
    // Keeps it from giving back before it ends the session.
    let _io = frontend.bounces().begin_io();
    let strace = Strace::kill_at(backend.pid(), "nanosleep,clock_nanosleep", 1);
    assert!(backend.terminate().success(), "it sleeps");
    strace.end();
    let kept = "the frontend's memory is still there";
    assert!(backend.log().iter().any(|line| line.contains(kept)));
}

#[test]
fn what_was_only_read_is_given_back_when_the_frontends_process_has_ended() {
    let scratch = Scratch::new();
    let image = clone(&scratch);
    let mut backend = Backend::start(&image, &[]);
    let stream = UnixStream::connect(backend.socket()).unwrap();
    helper(BE_A_FRONTEND, &image, stream);
    backend.wait_for_log("frontend detached");
    assert!(backend.terminate().success());
    assert_eq!(data_clusters(&image), stored());
}

/// Mappings outlive a session, and a guest may go on storing through them.
#[test]
fn nothing_is_given_back_while_the_frontends_process_lives() {
    let scratch = Scratch::new();
    let image = clone(&scratch);
    let mut backend = Backend::start(&image, &[]);
    let frontend = attach(&backend);
    let memory = Memory::new(frontend.region());
    touch_all(&memory);
    drop(frontend);
    backend.wait_for_log("frontend detached");
    memory.store(CLUSTER + 8, 77);
    check_after_late_store(&memory);
    assert!(backend.terminate().success());
    drop(memory);
    let image = Image::open(&image, &[]).unwrap();
    let mut word = [0; 8];
    image.read(CLUSTER + 8, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), 77);
}

fn check_after_late_store(memory: &Memory) {
    assert_eq!(memory.load(CLUSTER + 8), 77);
    assert_eq!(memory.load(2 * CLUSTER + 8), BASE);
}
/// Only a quarter of what is read fits on the disk.
#[test]
fn a_guest_that_reads_more_than_there_is_space_for_goes_on_by_itself() {
    let mount = LoopMount::ext4(192);
    let scratch = Scratch::below(&mount.path());
    let image = clone(&scratch);
    let _ballast = mount.fill_up_to("ballast", 16 * MIB);
    let mut backend = Backend::start(&image, &[]);
    let frontend = attach(&backend);
    let memory = Memory::new(frontend.region());
    touch_all(&memory);
    check_all(&memory);
    backend.wait_for_log("given back that were only read");
    assert!(backend.terminate().success());
    drop((memory, frontend));
    assert_eq!(data_clusters(&image), stored());
}
