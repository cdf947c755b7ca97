// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A backend that serves an image while one of its system calls on the image's files fails, once or for ever.
//!
//! The guest goes on, or waits until nothing fails any more. It never loads another byte than it stored; a flush that failed
//! stays failed; and what was stored is there afterwards.

use std::fs::{self, File};
use std::ops::Range;
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
use pcow_tests::tracer::{Call, Fault, Running};
use pcow_tests::waiting::wait_until;
use serde_json::json;

use crate::world::{call, copy_to};

/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);
/// A fault that lasts ends after so long, if the guest still waits.
const ENDURANCE: Duration = Duration::from_millis(500);
const CLUSTER: usize = 64 << 10;
/// Where the guest stores in each cluster.
const PLACE: usize = 4096;

/// What a session was like.
pub struct Session {
    /// All calls of the backend.
    pub calls: Vec<Call>,
    /// Whether the fault came to pass.
    pub failed: bool,
    /// Whether the guest waited for its end.
    pub waited: bool,
    /// Whether something was refused.
    pub refused: bool,
}

/// What the guest, and who asks the backend for it, got.
struct Done {
    /// The disk at the beginning, when the snapshot was asked for, and at the end.
    disks: [Vec<u8>; 3],
    /// Flush, snapshot, flush.
    went_well: [bool; 3],
}

/// A backend with its log.
struct Served {
    scratch: Scratch,
    image: PathBuf,
    backend: Running,
}

impl Served {
    fn start(start: &Path) -> Self {
        let scratch = Scratch::new();
        let images = scratch.path("images");
        copy_to(start, &images);
        let folder = images.canonicalize().unwrap();
        let image = folder.join("vm");
        let mut command = Command::new(program("pcow-backend"));
        command.arg("--socket").arg(scratch.path("socket"));
        command.arg("--image").arg(&image);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(scratch.path("log")).unwrap());
        let backend = Running::start(command, &folder);
        Self {
            scratch,
            image,
            backend,
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.scratch.path("log")).unwrap()
    }

    fn connect(&self) -> Frontend {
        let mut frontend = None;
        wait_until("the backend listens", PATIENCE, || {
            assert!(!self.backend.has_ended(), "{}", self.log());
            let socket = self.scratch.path("socket");
            frontend = Frontend::connect(&socket, &FrontendOptions::default()).ok();
            frontend.is_some()
        });
        frontend.unwrap()
    }

    /// What `@snapshot`, or the disk, shows now; `None` without such a snapshot.
    fn shown(&self, snapshot: Option<&str>) -> Option<Vec<u8>> {
        let stored = Stored::open(&self.image, &[]).unwrap();
        let layer = match snapshot {
            Some(name) => stored.root().snapshot(name).ok()?.layer,
            None => stored.root().active,
        };
        let view = stored.view(layer).unwrap();
        let mut bytes = vec![0; usize::try_from(view.size()).unwrap()];
        view.read(0, &mut bytes).unwrap();
        Some(bytes)
    }
}

/// Touches every cluster, takes a snapshot, and touches them again; in a thread, since it may wait.
fn script(image: PathBuf, frontend: Frontend, mut disk: Vec<u8>) -> JoinHandle<Done> {
    std::thread::spawn(move || {
        let memory = Memory::new(frontend.region());
        let at_first = disk.clone();
        touch(&memory, &mut disk, 1);
        let first = frontend.flush().is_ok();
        let before = disk.clone();
        let client = Client::connect(&image, None).ok().flatten();
        let taken = client.is_some_and(|mut client| {
            let arguments = json!({ "name": "taken" });
            let taken = client.execute("snapshot-create", arguments, PATIENCE);
            taken.is_ok()
        });
        touch(&memory, &mut disk, 2);
        let second = frontend.flush().is_ok();
        Done {
            disks: [at_first, before, disk],
            went_well: [first, taken, second],
        }
    })
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

/// Serves a copy of the image `vm` in `start` while `fault` comes to pass, and looks at what is left.
pub fn serve(start: &Path, fault: Option<Fault>) -> Session {
    let served = Served::start(start);
    let frontend = served.connect();
    let disk = served.shown(None).unwrap();
    served.backend.begin(fault);
    let script = script(served.image.clone(), frontend, disk);
    let deadline = Instant::now() + ENDURANCE;
    let lasting = fault.is_some_and(|fault| fault.lasting);
    while !script.is_finished() && (!lasting || Instant::now() < deadline) {
        std::thread::sleep(Duration::from_millis(2));
        let hangs = Instant::now() > deadline + PATIENCE;
        assert!(!hangs, "the guest waits for ever: {}", served.log());
    }
    let waited = !script.is_finished();
    let (calls, failed) = served.backend.end();
    wait_until("the guest goes on", PATIENCE, || script.is_finished());
    let done = script.join().unwrap();
    assert!(!served.backend.has_ended(), "{}", served.log());
    served.backend.terminate();
    judge(&served, &done);
    Session {
        calls,
        failed: !failed.is_empty(),
        waited,
        refused: done.went_well.contains(&false),
    }
}

fn judge(served: &Served, done: &Done) {
    let log = served.log();
    assert!(!log.contains("panicked"), "{log}");
    let marked = served.image.join(FLUSH_FAILED_FILE).exists();
    let [first, taken, second] = done.went_well;
    assert!(
        first || !second || !marked,
        "a flush succeeds after one that failed: {log}"
    );
    assert!(
        !marked || !second,
        "a flush failed, and nobody was told: {log}"
    );
    if marked {
        call(&served.image, "check --repair .");
    }
    let shown = served.shown(Some("taken"));
    assert!(
        shown.is_some() || !taken,
        "the snapshot is not there: {log}"
    );
    let [at_first, before, disk] = &done.disks;
    assert!(
        shown.is_none_or(|shown| shown == *before),
        "snapshot: {log}"
    );
    let shown = served.shown(None).unwrap();
    // What a failed flush was to write may be what it was (M14).
    let mut each = (0..shown.len()).step_by(CLUSTER).map(|at| at..at + CLUSTER);
    let is_older = |at: Range<usize>| {
        shown[at.clone()] == before[at.clone()] || shown[at.clone()] == at_first[at]
    };
    let right = each.all(|at| shown[at.clone()] == disk[at.clone()] || marked && is_older(at));
    assert!(right, "disk: {log}");
    let stored = Stored::open(&served.image, &[]).unwrap();
    let report = pcow_format::check::check(&stored).unwrap();
    let found = [report.corruptions, report.unchecked].concat();
    assert!(found.is_empty(), "{found:?}: {log}");
}
