// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frontends that come and go, and what their backend takes meanwhile.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use pcow_protocol::frontend::{Frontend, FrontendOptions};

use super::load::{Difference, Done, Load, build};
use crate::backend::Backend;
use crate::proc;
use crate::scratch::Scratch;
use crate::waiting::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than the backend takes to notice that a connection has ended.
const FORGOTTEN: Duration = Duration::from_millis(1500);
/// How long each frontend works.
const STAY: Duration = Duration::from_millis(50);

/// What a process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Memory of its own, in KiB: not what it has mapped of files.
    pub memory_kib: u64,
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: u64,
}

impl Usage {
    fn of(pid: u32) -> Self {
        Self {
            memory_kib: proc::status_number(pid, "RssAnon"),
            descriptors: proc::descriptor_count(pid),
            threads: proc::status_number(pid, "Threads"),
        }
    }
}

/// What frontends that came and went have left.
#[derive(Debug, Clone, Copy)]
pub struct Coming {
    /// How many there were.
    pub frontends: usize,
    /// What was not as the threads of all of them know it.
    pub difference: Difference,
    /// After the first tenth of the time.
    pub early: Usage,
    /// At the end.
    pub late: Usage,
}

impl Coming {
    /// Whether nothing was wrong and the backend takes what it took early, to within what an allocator keeps.
    pub fn is_flat(&self) -> bool {
        let Self { early, late, .. } = self;
        self.difference == Difference::default()
            && late.descriptors == early.descriptors
            && late.threads == early.threads
            && late.memory_kib <= early.memory_kib + early.memory_kib / 4 + 4096
    }
}

impl fmt::Display for Coming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { early, late, .. } = self;
        write!(
            f,
            "{} frontends came and went: memory {} KiB early and {} KiB at the end, descriptors {} and {}, threads {} and {}; {}",
            self.frontends,
            early.memory_kib,
            late.memory_kib,
            early.descriptors,
            late.descriptors,
            early.threads,
            late.threads,
            self.difference
        )
    }
}

/// Has frontends with eight threads each come and go for `time`, besides connections that are of no use.
///
/// # Panics
/// If one is not served.
pub fn come_and_go(time: Duration) -> Coming {
    // In memory: each frontend leaves a flush behind, and a disk would be all that is waited for.
    let scratch = Scratch::below("/dev/shm".as_ref());
    let image = build(&scratch, 1);
    let backend = Backend::start(&image, &[]);
    let begin = Instant::now();
    let mut early = None;
    let mut frontends = 0;
    let mut done = Done::default();
    while begin.elapsed() < time {
        done = stay(&backend, frontends, done);
        frontends += 1;
        if early.is_none() && begin.elapsed() >= time / 10 {
            early = Some(usage_when_alone(&backend));
        }
    }
    let late = usage_when_alone(&backend);
    drop(backend);
    Coming {
        frontends,
        difference: done.compare_with_disk(&image),
        early: early.unwrap_or(late),
        late,
    }
}

fn stay(backend: &Backend, number: usize, before: Done) -> Done {
    let useless = UnixStream::connect(backend.socket()).unwrap();
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let load = Load::go_on(&frontend, number.try_into().unwrap(), before);
    std::thread::sleep(STAY);
    let done = load.finish();
    if number.is_multiple_of(2) {
        frontend.flush().unwrap();
    }
    drop(useless);
    done
}

/// What the backend has when nothing of its frontends is left: it forgets connections that have ended, and closes what
/// belongs to them, within a second.
fn usage_when_alone(backend: &Backend) -> Usage {
    let count = || {
        let usage = Usage::of(backend.pid());
        (usage.threads, usage.descriptors)
    };
    let mut since = (count(), Instant::now());
    wait_until("it has forgotten them", PATIENCE, || {
        if count() != since.0 {
            since = (count(), Instant::now());
        }
        since.1.elapsed() > FORGOTTEN
    });
    Usage::of(backend.pid())
}
