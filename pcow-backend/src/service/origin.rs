// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who asks: a thread of the frontend's, whose faults say what they want, or one of the kernel's workers, whose do not.
//!
//! Under KVM on x86 a vCPU hands the wait for a missing page to a worker (an asynchronous page fault), and a worker
//! always asks for write access. Only workers may be bounced: a system call of anybody else that stores would fail in
//! the moment. Thread numbers come from the userfaultfd in the namespace of the thread that faulted.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Workers that are remembered.
const MAX_WORKERS: usize = 256;
/// Threads of the frontend's that are remembered.
const MAX_OWN: usize = 1024;

/// Where a request for write access comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// A thread that stores.
    Storing,
    /// A kernel worker: it may be a load.
    Worker,
    /// Nobody can say: it may be a load, and must not be bounced.
    Unclear,
}

/// What a thread had of the processors so far (Linux, Documentation/scheduler/sched-stats.rst).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Share {
    /// How long it ran. Of one that runs now, not up to date: by a few milliseconds at most.
    pub(super) time: Duration,
    /// How often it was given a processor.
    pub(super) runs: u64,
}

/// A kernel worker as proc(5) shows it. The files stay those of this thread when its number is used again.
#[derive(Debug)]
pub(super) struct Worker {
    thread: u32,
    stat: File,
    schedstat: Option<File>,
}

impl Worker {
    /// The thread with this number, if it is a kernel worker.
    fn open(thread: u32) -> io::Result<Option<Self>> {
        let stat = File::open(format!("/proc/{thread}/stat"))?;
        let schedstat = File::open(format!("/proc/{thread}/schedstat")).ok();
        let worker = Self {
            thread,
            stat,
            schedstat,
        };
        let is_worker = worker.name()?.starts_with("kworker/");
        Ok(is_worker.then_some(worker))
    }

    /// The second field of `stat`, in parentheses; for a worker: `kworker/` and what it works for.
    fn name(&self) -> io::Result<String> {
        let text = read(&self.stat)?;
        let name = text.split_once('(').map_or("", |(_, rest)| rest);
        Ok(name.to_owned())
    }

    /// What it had of the processors; `None` if the kernel does not tell.
    pub(super) fn share(&self) -> Option<Share> {
        let text = read(self.schedstat.as_ref()?).ok()?;
        let mut numbers = text.split_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        let (time, _waited, runs) = (next()?, next()?, next()?);
        Some(Share {
            time: Duration::from_nanos(time),
            runs,
        })
    }

    /// Its number.
    pub(super) fn thread(&self) -> u32 {
        self.thread
    }

    /// Whether it has no work; true also if it is gone. One that waits for a lock or for memory has some.
    pub(super) fn is_idle(&self) -> bool {
        // The third field, after the name in parentheses, which may contain anything.
        let text = read(&self.stat).unwrap_or_default();
        let state = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
        !state.starts_with(['R', 'D'])
    }

    /// Whether it is still the thread that it was.
    fn exists(&self) -> bool {
        read(&self.stat).is_ok()
    }
}

fn read(file: &File) -> io::Result<String> {
    let mut buf = [0; 512];
    let len = file.read_at(&mut buf, 0)?;
    Ok(String::from_utf8_lossy(&buf[..len]).into_owned())
}

/// Tells origins apart, for one session.
#[derive(Debug)]
pub(super) struct Origins {
    /// The frontend's process; 0 if it is in a namespace that is not visible from here.
    process: u32,
    /// Threads of the frontend's that have asked.
    own: HashSet<u32>,
    /// Whether it numbers its threads in another namespace than ours: then a worker and a thread of the frontend's may have
    /// one number. Looked at once, since threads cannot change that.
    nested: Option<bool>,
    workers: HashMap<u32, Arc<Worker>>,
}

impl Origins {
    pub(super) fn new(process: u32) -> Self {
        Self {
            process,
            own: HashSet::new(),
            nested: None,
            workers: HashMap::new(),
        }
    }

    /// Who `thread` is.
    pub(super) fn of(&mut self, thread: u32) -> Origin {
        // Before anybody is taken for a worker.
        let process = self.process;
        let nested = *self.nested.get_or_insert_with(|| is_nested(process));
        if !nested && self.is_own(thread) {
            return Origin::Storing;
        }
        if !nested && self.worker(thread).is_some() {
            return Origin::Worker;
        }
        // Kernels before 6.4 serve vhost devices from kernel threads of this name, which copy in the direction that they need.
        if is_vhost(thread) {
            return Origin::Storing;
        }
        Origin::Unclear
    }

    /// Whether this is a thread of the frontend's. Asked of that thread alone: the frontend may have begun it a moment ago, and
    /// it exists as long as it waits for its touch.
    fn is_own(&mut self, thread: u32) -> bool {
        if self.own.contains(&thread) {
            return true;
        }
        let is_own = Path::new(&format!("/proc/{}/task/{thread}", self.process)).exists();
        if is_own {
            if self.own.len() >= MAX_OWN {
                self.own.clear();
            }
            self.own.insert(thread);
        }
        is_own
    }

    /// The kernel worker with this number.
    pub(super) fn worker(&mut self, thread: u32) -> Option<Arc<Worker>> {
        if let Some(known) = self.workers.get(&thread) {
            if known.exists() {
                return Some(Arc::clone(known));
            }
            self.workers.remove(&thread);
        }
        let worker = Arc::new(Worker::open(thread).ok()??);
        if self.workers.len() >= MAX_WORKERS {
            self.workers.clear();
        }
        self.workers.insert(thread, Arc::clone(&worker));
        Some(worker)
    }
}

/// Whether `process` is in a namespace below ours, as far as it can be seen.
fn is_nested(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"));
    status.is_ok_and(|status| has_several_numbers(&status))
}

/// `NSpid` of proc(5): a number in each namespace, from ours inwards.
fn has_several_numbers(status: &str) -> bool {
    let numbers = status.lines().find_map(|l| l.strip_prefix("NSpid:"));
    numbers.is_some_and(|numbers| numbers.split_whitespace().count() > 1)
}

fn is_vhost(thread: u32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{thread}/comm"));
    name.is_ok_and(|name| name.starts_with("vhost-"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn some_worker_number() -> u32 {
        let processes = std::fs::read_dir("/proc").unwrap().map_while(Result::ok);
        let numbers = processes.filter_map(|p| p.file_name().to_str()?.parse().ok());
        let mut workers = numbers.filter(|n| Worker::open(*n).is_ok_and(|w| w.is_some()));
        workers.next().expect("every kernel has workers")
    }

    /// A worker of this machine's kernel.
    pub fn some_worker() -> Arc<Worker> {
        Arc::new(Worker::open(some_worker_number()).unwrap().unwrap())
    }

    #[test]
    fn own_threads_store_workers_may_not_and_of_others_nothing_is_known() {
        let mut origins = Origins::new(std::process::id());
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        assert_eq!(origins.of(u32::try_from(own).unwrap()), Origin::Storing);
        let worker = some_worker_number();
        assert_eq!(origins.of(worker), Origin::Worker);
        let worker = origins.worker(worker).unwrap();
        assert!(worker.share().is_some_and(|share| share.runs > 0));
        // One that has work now has none a moment later.
        while !worker.is_idle() {
            std::thread::yield_now();
        }
        assert_eq!(origins.of(1), Origin::Unclear, "init is no part of this");
        assert_eq!(Origins::new(0).of(u32::MAX), Origin::Unclear);
    }

    /// A list of the frontend's threads was up to a tenth of a second old once, and a thread that QEMU had begun since then to
    /// read from a disk was nobody that was known.
    #[test]
    fn a_thread_that_was_begun_a_moment_ago_is_known() {
        let mut origins = Origins::new(std::process::id());
        assert_eq!(origins.of(1), Origin::Unclear, "init is no part of this");
        let fresh = std::thread::spawn(move || {
            let own = rustix::thread::gettid().as_raw_nonzero().get();
            origins.of(u32::try_from(own).unwrap())
        });
        assert_eq!(fresh.join().unwrap(), Origin::Storing);
    }

    #[test]
    fn numbers_of_a_nested_namespace_say_nothing_for_sure() {
        assert!(has_several_numbers("Name:\tqemu\nNSpid:\t4711\t7\n"));
        assert!(!has_several_numbers("Name:\tqemu\nNSpid:\t4711\n"));
        let mut origins = Origins::new(std::process::id());
        origins.nested = Some(true);
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        for thread in [u32::try_from(own).unwrap(), some_worker_number()] {
            assert_eq!(origins.of(thread), Origin::Unclear);
        }
    }
}
