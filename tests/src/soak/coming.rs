// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frontends that come and go, and what their backend takes meanwhile.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use pcow_protocol::frontend::{Frontend, FrontendOptions};

use super::load::{Load, build};
use crate::backend::Backend;
use crate::proc;
use crate::scratch::Scratch;
use crate::waiting::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);
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
    /// After the first tenth of the time.
    pub early: Usage,
    /// At the end.
    pub late: Usage,
}

impl Coming {
    /// Whether the backend takes what it took early: to within what an allocator keeps.
    pub fn is_flat(&self) -> bool {
        let Self { early, late, .. } = self;
        late.descriptors == early.descriptors
            && late.threads == early.threads
            && late.memory_kib <= early.memory_kib + early.memory_kib / 4 + 4096
    }
}

impl fmt::Display for Coming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { early, late, .. } = self;
        write!(
            f,
            "{} frontends came and went: memory {} KiB early and {} KiB at the end, descriptors {} and {}, threads {} and {}",
            self.frontends,
            early.memory_kib,
            late.memory_kib,
            early.descriptors,
            late.descriptors,
            early.threads,
            late.threads
        )
    }
}

/// Has frontends with eight threads each come and go for `time`, besides connections that are of no use.
///
/// # Panics
/// If one is not served.
pub fn come_and_go(time: Duration) -> Coming {
    let scratch = Scratch::new();
    let image = build(&scratch, 1);
    let backend = Backend::start(&image, &[]);
    let begin = Instant::now();
    let mut early = None;
    let mut frontends = 0;
    while begin.elapsed() < time {
        stay(&backend, frontends);
        frontends += 1;
        if early.is_none() && begin.elapsed() >= time / 10 {
            early = Some(usage_when_alone(&backend));
        }
    }
    let late = usage_when_alone(&backend);
    Coming {
        frontends,
        early: early.unwrap_or(late),
        late,
    }
}

fn stay(backend: &Backend, number: usize) {
    let useless = UnixStream::connect(backend.socket()).unwrap();
    let frontend = Frontend::connect(backend.socket(), &FrontendOptions::default()).unwrap();
    let load = Load::start(&frontend, 1);
    // What the threads of earlier frontends have stored is no difference: only what is taken is looked at.
    std::thread::sleep(STAY);
    load.finish();
    if number.is_multiple_of(2) {
        frontend.flush().unwrap();
    }
    drop(useless);
}

fn usage_when_alone(backend: &Backend) -> Usage {
    // The daemon joins ended connections within a second, and gives idle threads no work.
    let alone = || proc::status_number(backend.pid(), "Threads") == 1;
    wait_until("the backend is alone", PATIENCE, alone);
    Usage::of(backend.pid())
}
