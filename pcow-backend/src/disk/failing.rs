// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls that fail under a disk that is served: each system call of each thing that the fault service asks of it, once and
//! for ever, in every way.
//!
//! Whatever happens there is no panic, the error says what failed, the guest is shown the right bytes, a fault that failed
//! is answered when it is tried again, a snapshot that cannot go on waits for the medium, a failed flush stays (I7), and
//! `check` finds nothing afterwards.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pcow_format::medium::faulty::{Failure, Faults, Plan};
use pcow_format::medium::sim::{Moment, Sim};
use pcow_format::medium::{self, Directory, Domain, Site};
use pcow_format::ops::{Base, NewImage, create_in};
use pcow_format::{
    BaseDirs, ClusterSize, Environment, ErrorKind, FLUSH_FAILED_FILE, Image, Result, Stored,
    VirtualSize, check, data_name,
};
use uuid::Uuid;

use super::{Access, Answer, Disk, Scratch, WritableDisk};
use crate::service::board::Board;

const CLUSTER: u64 = 64 << 10;
const CLUSTERS: u8 = 32;
/// Bytes of a cluster that are compared and stored to.
const HEAD: usize = 4096;
/// Clusters, by what they are at first.
const IN_BASE: u8 = 1;
const CLEAN: u8 = 2;
const OWN: u8 = 5;
const NOBODYS: u8 = 10;
/// Stored to after a failure.
const LATER: u8 = 14;

/// How long something may take before it is taken to wait for the medium.
const PATIENCE: Duration = Duration::from_millis(300);

const FAILURES: [Failure; 5] = [
    Failure::Error(libc::EIO),
    Failure::Error(libc::ENOSPC),
    Failure::Error(libc::ENOMEM),
    Failure::Error(libc::EINTR),
    Failure::Short,
];

/// A served disk, and the byte that each of its clusters is to show.
struct Served {
    disk: WritableDisk,
    board: Arc<Board>,
    /// The medium without its failures, and the image's name on it.
    plain: Arc<dyn Directory>,
    name: &'static str,
    shown: [u8; 32],
}

/// What the service asks of a disk: what comes before, and what is to fail.
struct Request {
    name: &'static str,
    before: fn(&mut Served) -> Result<()>,
    run: fn(&mut Served) -> Result<()>,
}

const REQUESTS: &[Request] = &[
    request("a load of the base", nothing, |s| {
        s.fault(IN_BASE, Access::Read).map(drop)
    }),
    request("a store over the base", nothing, |s| s.store(IN_BASE, 0x71)),
    request("a store to nobody's", nothing, |s| s.store(NOBODYS, 0x7a)),
    request("a store to data", nothing, |s| s.store(OWN, 0x75)),
    request("storage ahead", nothing, |s| {
        let start = u64::from(NOBODYS) * CLUSTER;
        s.disk.prepare(start..start + 4 * CLUSTER)
    }),
    request("storage given back", prepared, |s| s.disk.give_back()),
    request("clean clusters given back", touched, |s| {
        let start = u64::from(CLEAN) * CLUSTER;
        let clean = start..start + CLUSTER;
        s.disk.give_back_clean(clean, Instant::now()).map(drop)
    }),
    request("a flush", touched, |s| s.disk.flush()),
    request("a snapshot", touched, snapshot),
    request("a deletion", snapshotted, |s| {
        s.disk.delete_snapshot("1").map(drop)
    }),
];

const fn request(
    name: &'static str,
    before: fn(&mut Served) -> Result<()>,
    run: fn(&mut Served) -> Result<()>,
) -> Request {
    Request { name, before, run }
}

fn nothing(_: &mut Served) -> Result<()> {
    Ok(())
}

fn prepared(served: &mut Served) -> Result<()> {
    let start = u64::from(NOBODYS) * CLUSTER;
    served.disk.prepare(start..start + 4 * CLUSTER)
}

/// A cluster that holds what it covers, and one that does not.
fn touched(served: &mut Served) -> Result<()> {
    served.fault(CLEAN, Access::Write)?;
    served.store(IN_BASE, 0x61)
}

fn snapshotted(served: &mut Served) -> Result<()> {
    touched(served)?;
    snapshot(served)?;
    served.store(OWN, 0x65)?;
    snapshot(served)?;
    served.store(NOBODYS, 0x6a)
}

fn snapshot(served: &mut Served) -> Result<()> {
    let prepared = served.disk.prepare_snapshot(None)?;
    served.disk.take_snapshot(prepared)?;
    served.disk.write_checksums()
}

impl Served {
    fn new(image: Image, (sim, name): (&Sim, &'static str), shown: [u8; 32]) -> Self {
        let disk = WritableDisk::new(image);
        Self {
            board: Board::new(disk.unit()),
            disk,
            plain: sim.top(),
            name,
            shown,
        }
    }

    /// Resolves a fault as the crew does, and looks at a read copy.
    fn fault(&self, cluster: u8, access: Access) -> Result<Answer> {
        let offset = u64::from(cluster) * CLUSTER;
        let claim = self.board.try_claim(self.disk.scope(offset));
        let mut claim = claim.expect("nobody else is at work");
        let mut scratch = Scratch::default();
        let answer = self
            .disk
            .resolve(offset, access, &mut claim, &mut scratch)?;
        if let Answer::Copy(bytes) = &answer {
            let mut copy = [0; HEAD];
            self.disk.read(bytes.start, &mut copy)?;
            assert_eq!(
                copy,
                [self.shown[usize::from(cluster)]; HEAD],
                "a read copy"
            );
        }
        Ok(answer)
    }

    /// The guest stores once its fault was answered, never before.
    fn store(&mut self, cluster: u8, byte: u8) -> Result<()> {
        self.fault(cluster, Access::Write)?;
        let dir = self.plain.open_dir(self.name).unwrap();
        let name = data_name(self.disk.root().active);
        let file = dir.open(&name, medium::Access::Write).unwrap();
        file.write_at(GUEST, &[byte; HEAD], u64::from(cluster) * CLUSTER)
            .unwrap();
        self.shown[usize::from(cluster)] = byte;
        Ok(())
    }

    fn check(&self, when: &str) {
        for cluster in 0..CLUSTERS {
            let mut found = [0; HEAD];
            let read = self.disk.read(u64::from(cluster) * CLUSTER, &mut found);
            read.unwrap_or_else(|e| panic!("{when}: {e}"));
            let expected = [self.shown[usize::from(cluster)]; HEAD];
            assert!(
                found == expected,
                "{when}: other bytes in cluster {cluster}"
            );
        }
    }
}

const GUEST: Site = Site("guest.store");

fn environment(top: &Arc<dyn Directory>) -> Environment {
    Environment {
        bases: BaseDirs::in_directory(Arc::clone(top)),
        boot: Uuid::from_u128(1),
    }
}

fn load(top: &Arc<dyn Directory>) -> Image {
    let dir = top.open_dir("img").unwrap();
    Image::load(dir, environment(top)).unwrap()
}

/// An image on a base, closed and flushed, and what it shows.
fn build(domain: Domain) -> (Moment, [u8; 32]) {
    let sim = Sim::new(domain);
    let top = sim.top();
    let mut shown = [0; 32];
    for (name, base, clusters) in [
        ("base", None, vec![(IN_BASE, 0xb1), (CLEAN, 0xb2)]),
        ("img", Some("base"), vec![(OWN, 0x55)]),
    ] {
        let new = NewImage {
            size: Some(VirtualSize::new(u64::from(CLUSTERS) * CLUSTER).unwrap()),
            cluster: ClusterSize::new(CLUSTER).unwrap(),
            allocation_unit: Some(CLUSTER),
            base: base.map(|path: &str| Base::Image {
                path: path.into(),
                snapshot: None,
                reference: false,
            }),
        };
        create_in(top.as_ref(), name, &new, &environment(&top)).unwrap();
        let image = Image::load(top.open_dir(name).unwrap(), environment(&top)).unwrap();
        let mut served = Served::new(image, (&sim, name), shown);
        for (cluster, byte) in clusters {
            served.store(cluster, byte).unwrap();
        }
        served.disk.flush().unwrap();
        shown = served.shown;
    }
    (sim.now(), shown)
}

/// One request with one call that fails. Returns how many calls there are.
fn attempt(start: &(Moment, [u8; 32]), request: &Request, plan: Option<Plan>) -> usize {
    let sim = start.0.process_death();
    let faults = Faults::default();
    faults.write_back_of(sim.clone());
    let image = load(&faults.around(sim.top()));
    let mut served = Served::new(image, (&sim, "img"), start.1);
    (request.before)(&mut served).unwrap();
    faults.begin(plan);
    let (result, calls, fired) = run(&mut served, request, &faults);
    let failed = match result {
        Ok(()) => false,
        Err(e) => {
            assert!(fired, "fails by itself: {e}");
            assert!(e.to_string().len() > 10, "an unclear error: {e}");
            e.kind() == ErrorKind::FlushFailed
        }
    };
    served.check("after the failure");
    assert_eq!(
        served.disk.flush().is_err(),
        failed,
        "a failed flush stays, and no other"
    );
    // The service tries faults again; an operator the rest.
    let again = (request.run)(&mut served);
    assert!(
        again.is_ok() || failed || request.name == "a deletion",
        "again: {again:?}"
    );
    served.store(LATER, 0x7e).unwrap();
    served.check("used on");
    assert_eq!(served.disk.flush().is_err(), failed, "later");
    let shown = served.shown;
    drop(served);
    check_left(&sim, failed.then_some(&start.1), &shown);
    calls
}

/// Runs a request; if it waits for the medium, that is mended.
fn run(served: &mut Served, request: &Request, faults: &Faults) -> (Result<()>, usize, bool) {
    let (done, mended) = std::thread::scope(|scope| {
        let work = || catch_unwind(AssertUnwindSafe(|| (request.run)(served)));
        let thread = scope.spawn(work);
        let start = Instant::now();
        while !thread.is_finished() && start.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        let mended = (!thread.is_finished()).then(|| faults.end());
        (thread.join().expect("panics are caught"), mended)
    });
    let (calls, fired) = mended.unwrap_or_else(|| faults.end());
    (done.expect("no panic"), calls.len(), fired)
}

/// What the next process finds. After a failed flush a cluster may be as it was before (M14).
fn check_left(sim: &Sim, before: Option<&[u8; 32]>, shown: &[u8; 32]) {
    let top = sim.top();
    let dir = top.open_dir("img").unwrap();
    let marked = dir.unlink(Site("user.unlink"), FLUSH_FAILED_FILE).is_ok();
    assert_eq!(marked, before.is_some(), "a failed flush leaves its mark");
    let image = load(&top);
    for cluster in 0..CLUSTERS {
        let mut found = [0; HEAD];
        let at = usize::from(cluster);
        image
            .read(u64::from(cluster) * CLUSTER, &mut found)
            .unwrap();
        let as_before = before.is_some_and(|b| found == [b[at]; HEAD]);
        assert!(
            found == [shown[at]; HEAD] || as_before,
            "cluster {cluster} is lost"
        );
    }
    drop(image);
    let stored = Stored::load(dir, environment(&top)).unwrap();
    let report = check::check(&stored).unwrap();
    let found = [report.corruptions, report.unchecked].concat();
    assert_eq!(found, Vec::<String>::new());
}

fn fail_all(domain: Domain) {
    let start = build(domain);
    for request in REQUESTS {
        let calls = attempt(&start, request, None);
        assert!(calls > 0, "{}", request.name);
        for number in 0..calls {
            for failure in FAILURES {
                for lasting in [false, true] {
                    println!(
                        "{}: call {number}, {failure:?}, lasting: {lasting}",
                        request.name
                    );
                    let plan = Plan {
                        number,
                        failure,
                        lasting,
                    };
                    attempt(&start, request, Some(plan));
                }
            }
        }
    }
}

#[test]
fn a_call_that_fails_under_a_served_image_in_the_page_cache_harms_nothing() {
    fail_all(Domain::PageCache);
}

#[test]
fn a_call_that_fails_under_a_served_image_on_dax_harms_nothing() {
    fail_all(Domain::Dax);
}
