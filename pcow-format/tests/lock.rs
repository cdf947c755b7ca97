// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who may have an image, while backends come and go and frontends keep it.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pcow_format::map::{TAG_OFFSET, Tag};
use pcow_format::medium::Identity;
use pcow_format::ops::{NewImage, create};
use pcow_format::{
    ClusterSize, ErrorKind, HandedBack, Holder, Image, ImageLock, Purpose, Stored, VirtualSize,
    holder, map_name,
};

fn image(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    let new = NewImage {
        size: Some(VirtualSize::new(4 << 20).unwrap()),
        cluster: ClusterSize::new(64 << 10).unwrap(),
        allocation_unit: None,
        base: None,
    };
    create(&path, &new, &[]).unwrap();
    path
}

fn serve(path: &Path) -> Image {
    Image::open_to_serve(path, &[]).unwrap()
}

/// What a frontend keeps.
fn kept(image: &Image) -> OwnedFd {
    let file = image.lock().and_then(ImageLock::in_use).unwrap();
    file.try_clone().unwrap().into()
}

fn in_use(image: &Image) -> Option<&File> {
    image.lock().and_then(ImageLock::in_use)
}

fn hand_back(image: &Image, fd: &OwnedFd) -> HandedBack {
    let fd = fd.try_clone().unwrap();
    image.lock().unwrap().hand_back(fd).unwrap()
}

fn holder_of(path: &Path) -> Option<String> {
    let stored = Stored::open(path, &[]).unwrap();
    holder(stored.directory()).unwrap().map(|h| h.to_string())
}

#[test]
fn a_backend_starts_beside_a_frontend_that_keeps_the_image_and_gets_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let first = serve(&path);
    let frontend = kept(&first);
    drop(first);
    let second = serve(&path);
    assert!(in_use(&second).is_none(), "the frontend has it");
    assert_eq!(hand_back(&second, &frontend), HandedBack::Taken);
    drop(frontend);
    assert!(in_use(&second).is_some());
    drop(second);
    Image::open(&path, &[]).unwrap();
}

#[test]
fn a_session_that_comes_back_to_the_same_backend_hands_the_same_lock_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let backend = serve(&path);
    let frontend = kept(&backend);
    for _ in 0..2 {
        assert_eq!(hand_back(&backend, &frontend), HandedBack::Taken);
    }
}

#[test]
fn the_image_of_a_frontend_that_has_ended_is_free_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let first = serve(&path);
    let frontend = kept(&first);
    drop(first);
    let second = serve(&path);
    assert!(in_use(&second).is_none());
    drop(frontend);
    assert!(in_use(&second).is_some(), "nobody has it any more");
    assert_eq!(
        Image::open(&path, &[]).unwrap_err().kind(),
        ErrorKind::Locked
    );
}

#[test]
fn what_a_frontend_keeps_is_changed_by_nobody_and_the_refusal_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let first = serve(&path);
    let _frontend = kept(&first);
    drop(first);
    let reader = Stored::open(&path, &[]).unwrap().lock_shared();
    for error in [Image::open(&path, &[]).unwrap_err(), reader.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Orphaned);
        let said = format!("{error}; {}", error.advice().unwrap());
        let wanted = "in use by a virtual machine whose backend has ended; start a backend for it";
        assert!(said.contains(wanted), "{said}");
    }
    let wanted = "a virtual machine whose backend has ended";
    assert_eq!(holder_of(&path).as_deref(), Some(wanted));
}

#[test]
fn a_second_backend_is_refused_whether_or_not_the_frontend_has_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let first = serve(&path);
    let frontend = kept(&first);
    drop(first);
    let second = serve(&path);
    let me = format!("process {} on ", std::process::id());
    for handed_back in [false, true] {
        if handed_back {
            hand_back(&second, &frontend);
        }
        let error = Image::open_to_serve(&path, &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains(&me), "{error}");
        assert!(holder_of(&path).unwrap().starts_with(&me));
    }
}

#[test]
fn a_reader_keeps_a_backend_out_and_is_not_taken_for_a_frontend() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let reader = Stored::open(&path, &[]).unwrap().lock_shared().unwrap();
    let error = Image::open_to_serve(&path, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains("only read it"), "{error}");
    assert_eq!(holder_of(&path), None, "nobody writes");
    drop(reader);
    serve(&path);
}

#[test]
fn the_lock_of_a_copy_is_not_taken_for_the_images_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let original = serve(&path);
    let frontend = kept(&original);
    drop(original);
    let copy = dir.path().join("copy");
    let done = Command::new("cp").arg("-a").args([&path, &copy]).status();
    assert!(done.unwrap().success());
    let copy = serve(&copy);
    assert_eq!(hand_back(&copy, &frontend), HandedBack::OtherFile);
    let nothing = File::open("/dev/null").unwrap();
    assert_eq!(hand_back(&copy, &nothing.into()), HandedBack::OtherFile);
}

#[test]
fn a_copy_made_of_links_is_served_by_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let copy = dir.path().join("copy");
    let done = Command::new("cp").arg("-al").args([&path, &copy]).status();
    assert!(done.unwrap().success());
    for path in [&path, &copy] {
        let error = Image::open_to_serve(path, &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Linked);
    }
}

#[test]
fn another_description_of_the_lock_is_refused_while_somebody_has_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let backend = serve(&path);
    let open = |write| {
        let mut options = File::options();
        let file = options.read(true).write(write).open(path.join("lock"));
        OwnedFd::from(file.unwrap())
    };
    assert_eq!(hand_back(&backend, &open(true)), HandedBack::Busy);
    let lock = backend.lock().unwrap();
    assert!(lock.hand_back(open(false)).is_err(), "it holds no lock");
}

#[test]
fn the_text_tells_a_backend_from_a_command() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let purpose = || {
        let stored = Stored::open(&path, &[]).unwrap();
        let Some(Holder::Writer(record)) = holder(stored.directory()).unwrap() else {
            panic!("nobody writes");
        };
        record.process.unwrap().1
    };
    let served = serve(&path);
    assert_eq!(purpose(), Purpose::Serve);
    drop(served);
    let _changed = Image::open(&path, &[]).unwrap();
    assert_eq!(purpose(), Purpose::Change);
}

/// What a failed flush leaves makes the next opening write all that it reads: a frontend that goes on would lose stores.
#[test]
fn an_image_that_a_frontend_keeps_is_not_written_again_after_a_failed_flush() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a");
    let first = serve(&path);
    let map = path.join(map_name(first.root().active));
    let frontend = kept(&first);
    drop(first);
    let identity = Identity {
        device: 0,
        inode: 0,
        birth_ns: 0,
    };
    let tag = Tag::of_failed_flush(identity).encode();
    let map = File::options().write(true).open(map).unwrap();
    map.write_all_at(&tag, TAG_OFFSET).unwrap();
    let refused = Image::open_to_serve(&path, &[]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::FlushFailed, "{refused}");
    drop(frontend);
    serve(&path);
}
