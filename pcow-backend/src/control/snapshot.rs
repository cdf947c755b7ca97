// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot of the image while it is served: the order between the disk, which has layers, and the session, which has a
//! guest.
//!
//! | | what | a failure or the backend's death leaves |
//! |---|---|---|
//! | 0 | the new layer's files and most of the flush, while the guest runs | the old layer, and the guest in it |
//! | 1 | a cut: device I/O held, no fault under way, nothing mapped | the same; after a death the guest's touches wait for the next backend if the mappings were gone already |
//! | 2 | seal: own writer closed, lease, flush, commit | before the commit the old layer, after it the new one |
//! | 3 | faults are served, then device I/O goes on | the new layer |

use std::fmt;
use std::time::{Duration, Instant};

use pcow_format::ErrorKind;
use pcow_format::root::Proof;

use crate::connection::{Offer, chain, with_advice};
use crate::disk::{Disk, WritableDisk};
use crate::service::{Cut, CutTimes};

/// How often a cut is made before a writer that does not go is believed in.
///
/// A thread of the guest whose fault in a mapped file had to wait for the page keeps the file open until it returns to user
/// mode. If RESET comes first, it faults again without returning, and waits for this backend: only being served ends that.
const ATTEMPTS: u32 = 5;

/// How long it may take to give back what was only read. What remains is sealed as data.
const GIVE_BACK: Duration = Duration::from_secs(2);

/// Why there is no snapshot.
#[derive(Debug)]
pub enum Failed {
    /// The image refused.
    Image(pcow_format::Error),
    /// The frontend did.
    Frontend(pcow_protocol::Error),
    /// A frontend comes or goes.
    Unsettled,
    /// One whose backend has ended has not come back, and may store into what it has mapped.
    Kept,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(e) => f.write_str(&with_advice(e)),
            Self::Frontend(e) => write!(f, "cannot {}", chain(e)),
            Self::Unsettled => f.write_str("a frontend is coming or going; try again"),
            Self::Kept => f.write_str(
                "a virtual machine whose backend has ended has the image, and has not come back; try again when it has, or has ended",
            ),
        }
    }
}

/// A snapshot that was taken.
#[derive(Debug)]
pub struct Taken {
    /// Its number.
    pub number: u64,
    /// How it was made sure that nobody writes to the sealed layer any more.
    pub proof: Proof,
    /// How long its steps took.
    pub times: Times,
}

/// How long the steps of a snapshot took, as above.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Step 0.
    pub prepare: Duration,
    /// Step 1; nothing without a frontend.
    pub cut: CutTimes,
    /// Step 2.
    pub seal: Duration,
    /// Step 3.
    pub resume: Duration,
}

/// Nobody can store into the disk.
enum Quiet<'a> {
    /// A frontend waits.
    Cut(Box<Cut>),
    /// There is no frontend, and none gets in.
    Empty(Reserved<'a>),
}

impl Quiet<'_> {
    fn times(&self) -> CutTimes {
        match self {
            Self::Cut(cut) => cut.times(),
            Self::Empty(_) => CutTimes::default(),
        }
    }
}

/// The place of the frontend, which others wait for.
struct Reserved<'a>(&'a Offer);

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.0.place.free();
    }
}

/// Takes a snapshot. The caller sees to it that nobody else changes the layer tree.
///
/// # Errors
/// Why there is none, or why it is not durable for certain. The guest goes on in either case.
pub fn take(
    offer: &Offer,
    disk: &WritableDisk,
    name: Option<&str>,
    deadline: Instant,
) -> Result<Taken, Failed> {
    offer.give_back(deadline.min(Instant::now() + GIVE_BACK));
    let mut attempt = 1;
    loop {
        match take_once(offer, disk, name, deadline) {
            Err(Failed::Image(e))
                if e.kind() == ErrorKind::Locked
                    && attempt < ATTEMPTS
                    && Instant::now() < deadline =>
            {
                log::info!(
                    "the layer is still open for writing; trying again: {}",
                    chain(&e)
                );
                attempt += 1;
            }
            ended => return ended,
        }
    }
}

fn take_once(
    offer: &Offer,
    disk: &WritableDisk,
    name: Option<&str>,
    deadline: Instant,
) -> Result<Taken, Failed> {
    let mut last = Instant::now();
    let mut step = || std::mem::replace(&mut last, Instant::now()).elapsed();
    let prepared = disk.prepare_snapshot(name).map_err(Failed::Image)?;
    let number = prepared.number();
    let prepare = step();
    // From before the cut until everything goes on: no other session begins.
    let _switching = offer.switching();
    let quiet = match quiet(offer, deadline) {
        Ok(quiet) => quiet,
        Err(failed) => {
            disk.abandon_snapshot(prepared);
            return Err(failed);
        }
    };
    step();
    let cut = quiet.times();
    let (_, before) = disk.identity();
    let taken = disk.take_snapshot(prepared);
    let (_, now) = disk.identity();
    let seal = step();
    match quiet {
        Quiet::Cut(cut) if now != before => cut.go_on_with(now),
        // As it was.
        Quiet::Cut(cut) => drop(cut),
        Quiet::Empty(reserved) => drop(reserved),
    }
    let times = Times {
        prepare,
        cut,
        seal,
        resume: step(),
    };
    let proof = taken.map_err(Failed::Image)?;
    Ok(Taken {
        number,
        proof,
        times,
    })
}

fn quiet(offer: &Offer, deadline: Instant) -> Result<Quiet<'_>, Failed> {
    let session = offer.session().clone();
    if let Some(cut) = session.cut(deadline).map_err(Failed::Frontend)? {
        return Ok(Quiet::Cut(Box::new(cut)));
    }
    if offer.disk.lock().is_none() {
        return Err(Failed::Kept);
    }
    if offer.place.reserve() {
        return Ok(Quiet::Empty(Reserved(offer)));
    }
    Err(Failed::Unsettled)
}
