// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A backend one of whose system calls fails, once or for ever, or is its last: while it starts, while it serves, or while it
//! ends.
//!
//! It does not start, and says why; or the guest goes on, or waits until nothing fails any more or another backend is there. It
//! never loads another byte than it stored; a flush that failed stays failed; and what was stored is there afterwards.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pcow_format::{FLUSH_FAILED_FILE, Stored};
use pcow_protocol::control::Client;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::memory::Memory;
use pcow_tests::program;
use pcow_tests::scratch::Scratch;
use pcow_tests::tracer::{Call, Failure, Fault, Running, Traced};
use serde_json::json;

use crate::judge::must_be_survived;
use crate::world::{PATIENCE, call_once_free, copy_to};

/// A fault that lasts ends after so long, if the guest still waits.
const ENDURANCE: Duration = Duration::from_millis(500);
const CLUSTER: usize = 64 << 10;
/// So often somebody comes to the control socket in the end.
const ATTEMPTS: u64 = 20;
/// Where the guest stores in each cluster.
const PLACE: usize = 4096;
/// The snapshots of the image at the beginning: one that is deleted, and one that goes on.
const DELETED: &str = "first";
const KEPT: &str = "second";

/// What came of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// The call did not come.
    Missed,
    /// The backend did not start.
    NotStarted,
    /// It was killed, or ended, and another one went on.
    Replaced,
    /// The guest waited until nothing failed any more.
    Waited,
    /// A flush or the snapshot was refused.
    Refused,
    /// Nobody noticed, or only who reads the log.
    Tolerated,
}

/// What an image shows before a backend serves it.
struct Before {
    disk: Vec<u8>,
    deleted: Vec<u8>,
    kept: Vec<u8>,
}

impl Before {
    fn of(image: &Path) -> Self {
        Self {
            disk: shown(image, None).unwrap(),
            deleted: shown(image, Some(DELETED)).unwrap(),
            kept: shown(image, Some(KEPT)).unwrap(),
        }
    }
}

/// What the guest, and who asks the backend for it, got.
struct Done {
    /// The disk at the beginning, when the snapshot was asked for, and at the end.
    disks: [Vec<u8>; 3],
    /// Flush, snapshot, flush, deletion of a snapshot.
    went_well: [bool; 4],
    /// Whether the backend can still be asked for something in the end.
    answers: bool,
}

/// A backend with its log, and its successors.
struct Served {
    scratch: Scratch,
    folder: PathBuf,
    image: PathBuf,
    fault: Option<Fault>,
    backend: Running,
    /// Those before it.
    dead: Vec<Traced>,
    started: Instant,
    /// Whether the fault was ended because somebody waited.
    relented: bool,
}

impl Served {
    fn start(start: &Path, fault: Option<Fault>) -> Self {
        let scratch = Scratch::new();
        let images = scratch.path("images");
        copy_to(start, &images);
        let folder = images.canonicalize().unwrap();
        let backend = start_backend(&scratch, &folder, fault);
        Self {
            scratch,
            image: folder.join("vm"),
            folder,
            fault,
            backend,
            dead: Vec::new(),
            started: Instant::now(),
            relented: false,
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.scratch.path("log")).unwrap()
    }

    /// Somebody waits: starts another backend after one that has ended; lets nothing fail any more after a while.
    fn help(&mut self) {
        if self.backend.has_ended() {
            let next = start_backend(&self.scratch, &self.folder, None);
            let dead = std::mem::replace(&mut self.backend, next);
            self.dead.push(dead.terminate());
        }
        let lasts = self.fault.is_some_and(|f| f.lasting);
        if lasts && !self.relented && self.started.elapsed() > ENDURANCE {
            self.backend.relent();
            self.relented = true;
        }
        assert!(
            self.started.elapsed() < PATIENCE,
            "somebody waits for ever: {}",
            self.log()
        );
        std::thread::sleep(Duration::from_millis(2));
    }

    /// `None` if the backend does not start.
    fn connect(&mut self) -> Option<Frontend> {
        let socket = self.scratch.path("socket");
        loop {
            let connected = Frontend::connect(&socket, &FrontendOptions::default());
            if let Ok(frontend) = connected {
                return Some(frontend);
            }
            if self.fault.is_none_or(|f| f.failure != Failure::Kill) && self.backend.has_ended() {
                return None;
            }
            self.help();
        }
    }
}

fn start_backend(scratch: &Scratch, folder: &Path, fault: Option<Fault>) -> Running {
    let mut command = Command::new(program("pcow-backend"));
    command.arg("--socket").arg(scratch.path("socket"));
    command.arg("--image").arg(folder.join("vm"));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut log = File::options();
    let log = log.create(true).append(true).open(scratch.path("log"));
    command.stderr(log.unwrap());
    Running::start(command, folder, fault)
}

/// What `@snapshot`, or the disk, of `image` shows now; `None` without such a snapshot.
fn shown(image: &Path, snapshot: Option<&str>) -> Option<Vec<u8>> {
    let stored = Stored::open(image, &[]).unwrap();
    let layer = match snapshot {
        Some(name) => stored.root().snapshot(name).ok()?.layer,
        None => stored.root().active,
    };
    let view = stored.view(layer).unwrap();
    let mut bytes = vec![0; usize::try_from(view.size()).unwrap()];
    view.read(0, &mut bytes).unwrap();
    Some(bytes)
}

/// Touches every cluster, takes a snapshot, touches them again, and deletes another one; in a thread, since it may wait.
fn script(image: PathBuf, frontend: Frontend, mut disk: Vec<u8>) -> JoinHandle<Done> {
    std::thread::spawn(move || {
        let memory = Memory::new(frontend.region());
        let at_first = disk.clone();
        touch(&memory, &mut disk, 1);
        let first = frontend.flush().is_ok();
        let before = disk.clone();
        let taken = ask(&image, "snapshot-create", json!({ "name": "taken" }));
        touch(&memory, &mut disk, 2);
        let second = frontend.flush().is_ok();
        let deleted = ask(&image, "snapshot-delete", json!({ "snapshot": DELETED }));
        touch(&memory, &mut disk, 3);
        Done {
            disks: [at_first, before, disk],
            went_well: [first, taken, second, deleted],
            answers: answers(&image),
        }
    })
}

/// Whether somebody greets those who come to the control socket; the first of them may meet with the fault.
fn answers(image: &Path) -> bool {
    (0..ATTEMPTS).any(|attempt| {
        std::thread::sleep(Duration::from_millis(20 * attempt));
        Client::connect(image, None).is_ok_and(|client| client.is_some())
    })
}

/// Whether the backend did it.
fn ask(image: &Path, command: &str, arguments: serde_json::Value) -> bool {
    let client = Client::connect(image, None).ok().flatten();
    client.is_some_and(|mut client| client.execute(command, arguments, PATIENCE).is_ok())
}

/// Loads and compares a word of each cluster, stores another one into every second, and loads that.
fn touch(memory: &Memory, disk: &mut [u8], round: u64) {
    for (number, cluster) in (0..).zip(disk.chunks_mut(CLUSTER)) {
        let word: &mut [u8; 8] = (&mut cluster[PLACE..PLACE + 8]).try_into().unwrap();
        let offset = u64::try_from(PLACE).unwrap() + number * u64::try_from(CLUSTER).unwrap();
        let expected = u64::from_le_bytes(*word);
        assert_eq!(memory.load(offset), expected, "cluster {number}");
        if (number + round).is_multiple_of(2) {
            let stored = round << 32 | number;
            memory.store(offset, stored);
            assert_eq!(memory.load(offset), stored, "cluster {number}");
            *word = stored.to_le_bytes();
        }
    }
}

/// Serves a copy of the image `vm` in `start` while `fault` comes to pass, and looks at what is left. Returns the calls, too.
pub fn serve(start: &Path, fault: Option<Fault>) -> (Vec<Call>, Outcome) {
    let before = Before::of(&start.join("vm"));
    let mut served = Served::start(start, fault);
    let done = served.connect().map(|frontend| {
        let script = script(served.image.clone(), frontend, before.disk.clone());
        while !script.is_finished() {
            served.help();
        }
        script.join().unwrap()
    });
    let Served {
        scratch,
        image,
        backend,
        mut dead,
        relented,
        ..
    } = served;
    dead.push(backend.terminate());
    let log = fs::read_to_string(scratch.path("log")).unwrap();
    let replaced = dead.len() > 1;
    let is_deaf = done.as_ref().is_some_and(|done| !done.answers);
    let said_so = log.contains("no control socket");
    assert!(
        !is_deaf || said_so || fault.is_some_and(|f| f.lasting) && !relented,
        "nothing fails any more, and nobody can ask for anything: {log}"
    );
    judge_ends(&dead, fault, &log);
    judge_image(&image, &before, done.as_ref(), fault, replaced, &log);
    let failed = dead.iter().any(|traced| !traced.failed.is_empty());
    let all_went_well = done.as_ref().is_some_and(|d| d.went_well == [true; 4]);
    assert!(failed || all_went_well, "fails by itself: {log}");
    let outcome = match &done {
        _ if !failed => Outcome::Missed,
        None => Outcome::NotStarted,
        Some(_) if replaced => Outcome::Replaced,
        Some(_) if !all_went_well => Outcome::Refused,
        Some(_) if relented => Outcome::Waited,
        Some(_) => Outcome::Tolerated,
    };
    let ended_well = dead.len() == 1 && dead[0].status.success();
    assert!(
        ended_well || !fault.is_some_and(is_a_short_wait),
        "ends because it could not wait once: {log}"
    );
    assert!(
        outcome != Outcome::NotStarted || !fault.is_some_and(must_be_survived),
        "does not start: {log}"
    );
    let calls = dead.into_iter().flat_map(|traced| traced.calls);
    (calls.collect(), outcome)
}

/// Whether somebody only could not wait once: the next time they can.
fn is_a_short_wait(fault: Fault) -> bool {
    fault.name == "ppoll" && !fault.lasting && fault.failure != Failure::Kill
}

/// A backend ends by itself if it cannot start, and when it is asked to; one whose last flush failed, or that could not start,
/// says why.
fn judge_ends(ends: &[Traced], fault: Option<Fault>, log: &str) {
    assert!(!log.contains("panicked"), "{log}");
    for traced in ends {
        let killed = fault.is_some_and(|f| f.failure == Failure::Kill);
        if killed && traced.status.signal().is_some() {
            continue;
        }
        let code = traced.status.code();
        let failed = !traced.failed.is_empty();
        assert!(
            code == Some(0) || code == Some(1) && failed,
            "{}: {log}",
            traced.status
        );
        assert!(
            code == Some(0) || says_why(fault, log),
            "does not say why: {log}"
        );
    }
}

/// Whether the log has the cause that the system gave, if it gave one.
fn says_why(fault: Option<Fault>, log: &str) -> bool {
    let says = |number: i32| log.contains(&format!("(os error {number})"));
    let is_of = |name| fault.is_some_and(|fault| fault.name == name);
    match fault.map(|f| f.failure) {
        // Whoever starts a thread is told that there are no resources, whatever there is none of (pthread_create(3)).
        Some(Failure::Error(libc::ENOMEM)) if is_of("clone3") => says(libc::EAGAIN),
        Some(Failure::Error(number)) => says(number),
        _ => true,
    }
}

fn judge_image(
    image: &Path,
    before: &Before,
    done: Option<&Done>,
    fault: Option<Fault>,
    replaced: bool,
    log: &str,
) {
    let marked = image.join(FLUSH_FAILED_FILE).exists();
    if marked {
        call_once_free(image, "check --repair .");
    }
    let now = shown(image, None).unwrap();
    match done {
        None => assert!(now == before.disk, "disk: {log}"),
        Some(done) => {
            judge_flushes(done, marked, fault, replaced, log);
            judge_disks(image, &now, done, marked, log);
        }
    }
    judge_snapshots(image, before, done, log);
    let stored = Stored::open(image, &[]).unwrap();
    let report = pcow_format::check::check(&stored).unwrap();
    let found = [report.corruptions, report.unchecked].concat();
    assert!(found.is_empty(), "{found:?}: {log}");
}

/// The snapshot that is deleted is gone, or is what it was if nobody was told so; the other one is what it was in any case.
fn judge_snapshots(image: &Path, before: &Before, done: Option<&Done>, log: &str) {
    let is_deleted = done.is_some_and(|d| d.went_well[3]);
    let deleted = shown(image, Some(DELETED));
    assert!(
        deleted
            .as_ref()
            .is_none_or(|now| !is_deleted && *now == before.deleted),
        "the snapshot that is deleted: {log}"
    );
    assert!(
        deleted.is_some() || done.is_some(),
        "a snapshot is gone that nobody deleted: {log}"
    );
    assert!(
        shown(image, Some(KEPT)).as_ref() == Some(&before.kept),
        "the snapshot that is kept: {log}"
    );
}

/// A flush that failed stays failed, and somebody is told (I7).
fn judge_flushes(done: &Done, marked: bool, fault: Option<Fault>, replaced: bool, log: &str) {
    let [first, _, second, _] = done.went_well;
    // A flush fails for the frontend, too, if the backend ends meanwhile.
    assert!(
        first || !second || replaced,
        "a flush succeeds after one that failed: {log}"
    );
    // The last flush comes when the guest is gone: the log is all that there is to tell.
    assert!(
        !marked || !second || says_why(fault, log),
        "a flush failed, and nobody was told: {log}"
    );
}

fn judge_disks(image: &Path, now: &[u8], done: &Done, marked: bool, log: &str) {
    let taken = shown(image, Some("taken"));
    assert!(
        taken.is_some() || !done.went_well[1],
        "the snapshot is not there: {log}"
    );
    let [at_first, before, disk] = &done.disks;
    assert!(
        taken.is_none_or(|taken| taken == *before),
        "snapshot: {log}"
    );
    // What a failed flush was to write may be what it was (M14).
    let mut each = (0..now.len()).step_by(CLUSTER).map(|at| at..at + CLUSTER);
    let is_older =
        |at: Range<usize>| now[at.clone()] == before[at.clone()] || now[at.clone()] == at_first[at];
    let right = each.all(|at| now[at.clone()] == disk[at.clone()] || marked && is_older(at));
    assert!(right, "disk: {log}");
}
