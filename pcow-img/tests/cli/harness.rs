// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A directory to work in, and ways to run the tool in it that tell everything when something is not as expected.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use pcow_format::{Error, ErrorKind, Image, Stored, data_name};
use serde_json::Value;

pub const MIB: u64 = 1 << 20;

/// What a file of an image is: kind and mode, inode, links, length, blocks, and its bytes.
type FileState = (u32, u64, u64, u64, u64, Vec<u8>);

pub struct Sandbox(tempfile::TempDir);

impl Sandbox {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// In memory where the machine has a place for that: for thousands of syncs whose effect is not looked at.
    pub fn without_disk() -> Self {
        tempfile::tempdir_in("/dev/shm").map_or_else(|_| Self::new(), Self)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs the tool in this directory.
    pub fn run(&self, args: &[&str]) -> Finished {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pcow-img"));
        command.stdout(Stdio::piped());
        let output = output(command.args(args).current_dir(self.0.path()));
        let call = format!("pcow-img {}", args.join(" "));
        Finished { call, output }
    }

    /// As [`Sandbox::run`], with bytes on its standard input.
    pub fn run_with_input(&self, args: &[&str], input: &[u8]) -> Finished {
        let path = self.path("input-of-a-test");
        std::fs::write(&path, input).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pcow-img"));
        command.stdin(std::fs::File::open(&path).unwrap());
        command.stdout(Stdio::piped());
        let output = output(command.args(args).current_dir(self.0.path()));
        std::fs::remove_file(&path).unwrap();
        let call = format!("pcow-img {}", args.join(" "));
        Finished { call, output }
    }

    /// Runs a line of a shell in this directory, with the tool on its path.
    pub fn shell(&self, line: &str) -> Finished {
        let tool = Path::new(env!("CARGO_BIN_EXE_pcow-img"));
        let others = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{others}", tool.parent().unwrap().display());
        let mut command = Command::new("sh");
        command.args(["-c", line]).env("PATH", path);
        command.stdout(Stdio::piped());
        let output = output(command.current_dir(self.0.path()));
        let call = line.to_owned();
        Finished { call, output }
    }

    /// Runs the tool, which must succeed without a complaint; returns its output.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let finished = self.run(args);
        finished.expect(
            finished.code() == 0 && finished.complaints().is_empty(),
            "success",
        );
        finished.stdout()
    }

    /// As [`Sandbox::ok`] with `--output json`; returns what the output says.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let finished = self.run(&[args, &["--output", "json"]].concat());
        finished.expect(
            finished.code() == 0 && finished.complaints().is_empty(),
            "success",
        );
        finished.json()
    }

    /// Runs the tool, which must refuse with this exit code and one line that says all of `parts`, print nothing else,
    /// and leave every byte below this directory as it was.
    #[track_caller]
    pub fn refused(&self, args: &[&str], code: i32, parts: &[&str]) {
        let before = self.state();
        let finished = self.run(args);
        finished.expect(finished.code() == code, &format!("exit code {code}"));
        finished.expect(finished.stdout().is_empty(), "nothing on standard output");
        let line = finished.stderr();
        finished.expect(line.starts_with("pcow-img: "), "its name in front");
        finished.expect(line.trim_end().lines().count() == 1, "one line");
        for part in parts {
            finished.expect(line.contains(part), &format!("'{part}' in the line"));
        }
        let after = self.state();
        let names = |s: &BTreeMap<_, _>| s.keys().cloned().collect::<Vec<PathBuf>>();
        finished.expect(names(&before) == names(&after), "the same files as before");
        for (name, state) in &before {
            let same = *state == after[name];
            finished.expect(same, &format!("{} as it was", name.display()));
        }
    }

    /// Every file below this directory.
    pub fn state(&self) -> BTreeMap<PathBuf, FileState> {
        let mut state = BTreeMap::new();
        let mut todo = vec![self.0.path().to_owned()];
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                state.insert(path.clone(), file_state(&path));
                if path.is_dir() {
                    todo.push(path);
                }
            }
        }
        state
    }

    /// Storage that the files of an image take, by the filesystem's own account.
    pub fn allocated(&self, image: &str) -> u64 {
        let entries = std::fs::read_dir(self.path(image)).unwrap();
        entries
            .map(|e| e.unwrap().metadata().unwrap().blocks() * 512)
            .sum()
    }

    /// Changes the text of an image's root, and signs it again if `sign`.
    pub fn edit_root(&self, image: &str, sign: bool, edit: impl Fn(&str) -> String) {
        let path = self.path(image).join("image.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut text = edit(&text).into_bytes();
        if sign {
            let digits = CHECKSUM_OFFSET..CHECKSUM_OFFSET + 8;
            text[digits.clone()].fill(b'0');
            let sum = format!("{:08x}", crc32c::crc32c(&text));
            text[digits].copy_from_slice(sum.as_bytes());
        }
        std::fs::write(path, text).unwrap();
    }

    /// Takes an image for writing in this process.
    pub fn image(&self, name: &str) -> HeldImage {
        let path = self.path(name);
        let image = Some(Image::open(&path, &[]).unwrap());
        HeldImage { path, image }
    }

    pub fn active_data(&self, name: &str) -> PathBuf {
        let active = Stored::open(&self.path(name), &[]).unwrap().root().active;
        self.path(name).join(data_name(active))
    }

    /// Stores `byte` at `offset` the way a guest does, and makes it durable.
    pub fn store(&self, name: &str, offset: u64, byte: u8) {
        let image = self.image(name);
        store(&image, offset, byte);
        image.flush().unwrap();
    }

    /// The byte that a guest would read at `offset`.
    pub fn load(&self, name: &str, offset: u64) -> u8 {
        let mut buf = [0xee];
        self.image(name).read(offset, &mut buf).unwrap();
        buf[0]
    }
}

/// Held while a child starts: until it runs its program it has all open files of this process, locks included. It may
/// have them a little longer: vfork(2) wakes the parent before the files are closed.
static STARTING: Mutex<()> = Mutex::new(());

/// Runs a program and waits for its end; its standard output goes where the caller wants it.
pub fn output(command: &mut Command) -> Output {
    let starting = STARTING.lock().unwrap();
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    drop(starting);
    child.wait_with_output().unwrap()
}

/// An image that is free again as soon as this is dropped, whatever other threads start.
pub struct HeldImage {
    path: PathBuf,
    image: Option<Image>,
}

impl Drop for HeldImage {
    fn drop(&mut self) {
        let _no_child_starts = STARTING.lock();
        self.image = None;
        let is_locked = |r: Result<Image, Error>| r.is_err_and(|e| e.kind() == ErrorKind::Locked);
        wait_until(Duration::from_secs(30), || {
            !is_locked(Image::open(&self.path, &[]))
        });
    }
}

impl Deref for HeldImage {
    type Target = Image;

    fn deref(&self) -> &Image {
        self.image.as_ref().unwrap()
    }
}

impl DerefMut for HeldImage {
    fn deref_mut(&mut self) -> &mut Image {
        self.image.as_mut().unwrap()
    }
}

/// Waits for `condition`; loud if it does not come true in time.
pub fn wait_until(timeout: Duration, condition: impl Fn() -> bool) {
    let end = Instant::now() + timeout;
    while !condition() {
        assert!(Instant::now() < end, "nothing happened in {timeout:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Offset of the checksum's digits in `image.json`: behind `{\n  "pcow": "image",\n  "checksum": "`.
const CHECKSUM_OFFSET: usize = 36;

pub fn store(image: &Image, offset: u64, byte: u8) {
    let cluster = image.cluster_size().cluster_at(offset);
    image
        .make_writable(cluster.only(), &mut Vec::new())
        .unwrap();
    let file = image.active().data_file().as_real().unwrap();
    file.write_all_at(&[byte], offset).unwrap();
}

fn file_state(path: &Path) -> FileState {
    let m = std::fs::symlink_metadata(path).unwrap();
    let content = if m.is_file() {
        std::fs::read(path).unwrap()
    } else {
        Vec::new()
    };
    let blocks = m.blocks();
    (m.mode(), m.ino(), m.nlink(), m.len(), blocks, content)
}

/// A run of the tool that is over.
pub struct Finished {
    call: String,
    output: Output,
}

impl Finished {
    pub fn code(&self) -> i32 {
        self.output.status.code().unwrap_or(-1)
    }

    pub fn stdout(&self) -> String {
        String::from_utf8(self.output.stdout.clone()).unwrap()
    }

    pub fn bytes(&self) -> &[u8] {
        &self.output.stdout
    }

    pub fn stderr(&self) -> String {
        String::from_utf8(self.output.stderr.clone()).unwrap()
    }

    /// What is on standard error, but that the disk, small as those of tests are, is no multiple of a guest's steps.
    pub fn complaints(&self) -> String {
        let is_complaint = |line: &&str| !line.contains("Linux takes memory in steps of");
        self.stderr().lines().filter(is_complaint).collect()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        let value = serde_json::from_slice(&self.output.stdout);
        self.expect(value.is_ok(), "JSON on standard output");
        value.unwrap()
    }

    #[track_caller]
    pub fn expect(&self, condition: bool, what: &str) {
        assert!(
            condition,
            "expected {what} of\n  {}\nwhich ended with {}\n--- standard output\n{}--- standard error\n{}---",
            self.call,
            self.output.status,
            self.stdout(),
            self.stderr(),
        );
    }
}
