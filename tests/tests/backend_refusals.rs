// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the backend refuses: one clear line that says what to do, a documented exit code, nothing changed, nothing served.
//! And how it begins and ends when all is well.
#![allow(missing_docs, clippy::unwrap_used)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use pcow_format::check::check;
use pcow_format::ops::Base;
use pcow_format::{Image, Stored, data_name};
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::memory::Memory;
use pcow_tests::old_kernel;
use pcow_tests::program;
use pcow_tests::scratch::{Scratch, store};

const MIB: u64 = 1 << 20;
const FAILURE: i32 = 1;
const USAGE: i32 = 64;

fn backend(arguments: &[&str]) -> Output {
    Command::new(program("pcow-backend"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Everything about the files below `path` that a change would show.
fn state_of(path: &Path) -> Vec<(PathBuf, u64, i64, i64, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(path).into_iter().flatten() {
        let path = entry.unwrap().path();
        let meta = path.symlink_metadata().unwrap();
        let content = if meta.is_file() {
            std::fs::read(&path).unwrap()
        } else {
            Vec::new()
        };
        all.push((path, meta.ino(), meta.mtime(), meta.mtime_nsec(), content));
    }
    all.sort();
    all
}

/// Starts a backend that must refuse `image` with a line that contains all of `wanted`.
fn assert_refused(image: &Path, more: &[&str], code: i32, wanted: &[&str]) {
    let scratch = Scratch::new();
    let socket = scratch.path("s");
    let before = state_of(image);
    let arguments = ["--socket", text(&socket), "--image", text(image)];
    let output = backend(&[&arguments[..], more].concat());
    let errors = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<_> = errors
        .lines()
        .filter(|l| l.starts_with("pcow-backend: "))
        .collect();
    assert_eq!(lines.len(), 1, "one line: {errors}");
    for part in wanted {
        assert!(lines[0].contains(part), "'{part}' is not in: {}", lines[0]);
    }
    assert_eq!(output.status.code(), Some(code), "{errors}");
    assert!(!socket.exists(), "nothing was served");
    assert_eq!(state_of(image), before, "nothing was changed");
}

#[test]
fn what_is_no_image_is_refused() {
    let s = Scratch::new();
    assert_refused(
        &s.path("missing"),
        &[],
        FAILURE,
        &["cannot open the image", "No such file"],
    );
    std::fs::write(s.path("file"), "x").unwrap();
    assert_refused(
        &s.path("file"),
        &[],
        FAILURE,
        &["is a file, not a pcow image", "--base-format raw"],
    );
    std::fs::create_dir(s.path("empty")).unwrap();
    assert_refused(&s.path("empty"), &[], FAILURE, &["it has no image.json"]);
}

/// Replaces a piece of `image.json` and signs it again: CRC-32C of the text with the digits of the checksum set to 0.
fn edit_root(image: &Path, from: &str, to: &str) {
    let path = image.join("image.json");
    let old = std::fs::read_to_string(&path).unwrap();
    let start = old.find("\"checksum\": \"").unwrap() + "\"checksum\": \"".len();
    let mut new = old.replace(from, to);
    assert_ne!(old, new);
    new.replace_range(start..start + 8, "00000000");
    let sum = format!("{:08x}", crc32c::crc32c(new.as_bytes()));
    new.replace_range(start..start + 8, &sum);
    std::fs::write(&path, new).unwrap();
}

#[test]
fn an_image_of_the_future_or_with_a_flipped_bit_is_refused() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    edit_root(
        &image,
        "\"incompatible-features\": []",
        "\"incompatible-features\": [\"encrypted\"]",
    );
    assert_refused(
        &image,
        &[],
        FAILURE,
        &["needs the feature 'encrypted'", "use a newer pcow"],
    );
    let image = s.image("b", 4 * MIB, 64 << 10);
    edit_root(&image, "\"version\": 1", "\"version\": 2");
    assert_refused(
        &image,
        &[],
        FAILURE,
        &["format version 2", "use a newer pcow"],
    );
    let image = s.image("c", 4 * MIB, 64 << 10);
    let mut root = std::fs::read(image.join("image.json")).unwrap();
    let last = root.len() - 10;
    root[last] ^= 4;
    std::fs::write(image.join("image.json"), root).unwrap();
    assert_refused(&image, &[], FAILURE, &["wrong checksum", "pcow-img check"]);
}

#[test]
fn an_image_whose_base_is_gone_changed_or_out_of_bounds_is_refused() {
    let s = Scratch::new();
    let raw = s.path("disk.raw");
    std::fs::write(&raw, vec![1; 8192]).unwrap();
    let on_raw = Base::Raw { path: raw.clone() };
    let image = s.image_on("a", None, 64 << 10, Some(on_raw.clone()));
    std::fs::write(&raw, vec![2; 8192]).unwrap();
    assert_refused(
        &image,
        &[],
        FAILURE,
        &["was changed or replaced", "restore the base"],
    );
    std::fs::remove_file(&raw).unwrap();
    assert_refused(&image, &[], FAILURE, &["is not there", "put the base back"]);
    let elsewhere = Scratch::new();
    std::fs::write(elsewhere.path("disk.raw"), vec![1; 8192]).unwrap();
    let base = Base::Raw {
        path: elsewhere.path("disk.raw"),
    };
    let image = s.image_on("b", None, 64 << 10, Some(base));
    assert_refused(
        &image,
        &[],
        FAILURE,
        &["outside the directories", "--base-dir"],
    );
    let backend = Backend::start(&image, &["--base-dir", text(&elsewhere.path(""))]);
    drop(backend);
}

#[test]
fn an_image_in_use_is_refused_and_its_holder_named() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let first = Backend::start(&image, &[]);
    let holder = format!("process {}", first.pid());
    assert_refused(
        &image,
        &[],
        FAILURE,
        &["in use by", &holder, "stop that process first"],
    );
    assert_refused(&image, &["--read-only"], FAILURE, &["in use by", &holder]);
}

#[test]
fn an_active_file_with_two_names_is_refused() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let active = Stored::open(&image, &[]).unwrap().root().active;
    std::fs::hard_link(image.join(data_name(active)), s.path("second")).unwrap();
    assert_refused(&image, &[], FAILURE, &["has 2 names", "cp -al"]);
}

#[test]
fn a_socket_path_that_cannot_be_used_is_refused() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let refuse = |socket: &Path, wanted: &str| {
        let before = state_of(&image);
        let output = backend(&["--socket", text(socket), "--image", text(&image)]);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains(wanted), "'{wanted}' is not in: {errors}");
        assert_eq!(output.status.code(), Some(USAGE), "{errors}");
        assert_eq!(state_of(&image), before);
    };
    refuse(&s.path(&"x".repeat(120)), "choose a shorter one");
    std::fs::write(s.path("file"), "x").unwrap();
    refuse(&s.path("file"), "is no socket; choose another path");
    let _listener = UnixListener::bind(s.path("taken")).unwrap();
    refuse(&s.path("taken"), "a process already listens on");
    assert_eq!(std::fs::read(s.path("file")).unwrap(), b"x");
    UnixStream::connect(s.path("taken")).unwrap();
}

#[test]
fn arguments_that_cannot_be_used_are_no_failure_of_the_image() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let image = text(&image);
    for (arguments, wanted) in [
        (&["--image", image][..], "--socket"),
        (&["--socket", "x"], "--image"),
        (&["--socket", "x", "--image", image, "--bogus"], "--bogus"),
        (
            &["--socket", "x", "--image", image, "--cache-size", "1"],
            "at least 1M",
        ),
        (&["--fd", "999", "--image", image], "--fd 999 is no socket"),
        (&["--fd", "1", "--image", image], "--fd 1 is no socket"),
        (
            &["--fd", "1", "--socket", "x", "--image", image],
            "cannot be used with",
        ),
    ] {
        let output = backend(arguments);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(
            errors.contains(wanted),
            "{arguments:?}: '{wanted}' is not in: {errors}"
        );
        assert_eq!(output.status.code(), Some(USAGE), "{arguments:?}: {errors}");
    }
}

#[test]
fn capabilities_are_json() {
    let output = backend(&["--print-capabilities"]);
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["type"], "pcow");
    assert!(json["features"].is_array());
}

fn connect(socket: &Path) -> Frontend {
    Frontend::connect(socket, &FrontendOptions::default()).unwrap()
}

#[test]
fn a_stale_socket_is_replaced_and_a_clean_end_leaves_none() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let mut first = Backend::start(&image, &[]);
    first.kill();
    assert!(first.socket().exists());
    let mut second = Backend::start(&image, &[]);
    drop(connect(second.socket()));
    assert!(second.terminate().success());
    assert!(!second.socket().exists());
}

#[test]
fn a_clean_end_makes_everything_durable_and_a_kill_loses_nothing() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let mut backend = Backend::start(&image, &["--flush-interval", "0"]);
    let frontend = connect(backend.socket());
    Memory::new(frontend.region()).store(8, 7);
    assert!(backend.terminate().success());
    drop(frontend);
    let live = |image: &Path| {
        check(&Stored::open(image, &[]).unwrap())
            .unwrap()
            .live_clusters
    };
    assert_eq!(live(&image), 0);
    let mut backend = Backend::start(&image, &["--flush-interval", "0"]);
    let frontend = connect(backend.socket());
    Memory::new(frontend.region()).store(MIB, 9);
    backend.kill();
    drop(frontend);
    assert_eq!(live(&image), 1);
    let image = Image::open(&image, &[]).unwrap();
    assert_eq!(image.recovery().discarded_clusters, 0);
    let word = |offset| {
        let mut raw = [0; 8];
        image.read(offset, &mut raw).unwrap();
        u64::from_le_bytes(raw)
    };
    assert_eq!((word(8), word(MIB)), (7, 9));
}

/// Starts a backend with `socket` as its descriptor 3.
fn with_descriptor(image: &Path, socket: OwnedFd) -> std::process::Child {
    // The shell leaves the descriptor open for the program; Rust closes everything that it opened itself.
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty()).unwrap();
    let number = socket.as_raw_fd().to_string();
    Command::new(program("pcow-backend"))
        .args(["--fd", &number, "--image", text(image)])
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_connected_and_a_listening_descriptor_are_served() {
    let s = Scratch::new();
    let image = s.image("a", 4 * MIB, 64 << 10);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child = with_descriptor(&image, theirs.into());
    let frontend = Frontend::from_stream(ours, &FrontendOptions::default()).unwrap();
    Memory::new(frontend.region()).store(8, 7);
    drop(frontend);
    assert!(
        child.wait().unwrap().success(),
        "it ends with its only connection"
    );
    let listener = UnixListener::bind(s.path("l")).unwrap();
    let mut child = with_descriptor(&image, listener.into());
    for _ in 0..2 {
        let frontend = connect(&s.path("l"));
        assert_eq!(Memory::new(frontend.region()).load(8), 7);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Three layers over a raw file whose end is within a page.
fn read_only_chain(s: &Scratch) -> (PathBuf, Vec<u8>) {
    let raw: Vec<u8> = (0..3 * MIB + 5000)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect();
    std::fs::write(s.path("disk.raw"), &raw).unwrap();
    let base = Base::Raw {
        path: s.path("disk.raw"),
    };
    let first = s.image_on("first", Some(8 * MIB), 4096, Some(base));
    store(&Image::open(&first, &[]).unwrap(), 2 * MIB, &[200; 10_000]);
    let second = s.clone_of("second", &first, 64 << 10);
    store(&Image::open(&second, &[]).unwrap(), 5 * MIB, &[201; 100]);
    let third = s.clone_of("third", &second, 4096);
    store(
        &Image::open(&third, &[]).unwrap(),
        2 * MIB + 4096,
        &[202; 50],
    );
    let mut expected = raw;
    expected.resize(usize::try_from(8 * MIB).unwrap(), 0);
    for (offset, bytes) in [
        (2 * MIB, vec![200; 10_000]),
        (5 * MIB, vec![201; 100]),
        (2 * MIB + 4096, vec![202; 50]),
    ] {
        let offset = usize::try_from(offset).unwrap();
        expected[offset..offset + bytes.len()].copy_from_slice(&bytes);
    }
    (third, expected)
}

#[test]
fn a_read_only_image_is_mapped_directly_and_shared_by_several_backends() {
    let s = Scratch::new();
    let (image, expected) = read_only_chain(&s);
    let other = s.path("other.sock");
    let first = Backend::start(&image, &["--read-only"]);
    let listener = UnixListener::bind(&other).unwrap();
    let mut second = Command::new(program("pcow-backend"));
    let descriptor: OwnedFd = listener.into();
    rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::empty()).unwrap();
    let number = descriptor.as_raw_fd().to_string();
    let mut second = second
        .args(["--fd", &number, "--read-only", "--image", text(&image)])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    for socket in [first.socket(), &other] {
        let frontend = connect(socket);
        assert!(frontend.is_read_only());
        let shown = Memory::new(frontend.region()).read(0, 8 * MIB);
        assert!(shown == expected, "through {}", socket.display());
        let mappings = pcow_tests::proc::mappings(frontend.region());
        assert!(
            mappings.iter().any(|m| m.file.ends_with(".data")),
            "{mappings:?}"
        );
        assert!(
            mappings.iter().any(|m| m.file.ends_with("disk.raw")),
            "{mappings:?}"
        );
        assert!(
            mappings
                .iter()
                .all(|m| m.file.is_empty() || !m.access.contains('w')),
            "no file is mapped for stores: {mappings:?}"
        );
    }
    assert_refused(&image, &[], FAILURE, &["in use by"]);
    second.kill().unwrap();
    second.wait().unwrap();
}

#[test]
fn a_frontend_on_a_kernel_without_write_protection_is_told_so_and_the_next_one_is_served() {
    let scratch = Scratch::new();
    let backend = Backend::start(&scratch.image("image", 4 * MIB, 64 << 10), &[]);
    let options = FrontendOptions::default();
    let refused = std::thread::scope(|threads| {
        let on_old_kernel = || {
            old_kernel::enter();
            Frontend::connect(backend.socket(), &options).unwrap_err()
        };
        threads.spawn(on_old_kernel).join().unwrap()
    });
    let reason = "the kernel's userfaultfd lacks write protection or remap events";
    assert!(refused.to_string().contains(reason), "{refused}");
    Frontend::connect(backend.socket(), &options).unwrap();
}
