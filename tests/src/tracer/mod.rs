// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process one of whose system calls fails, is cut short, or is its last (ptrace(2)).
//!
//! A filter (seccomp(2)) stops every thread and child of the process at the system calls that can fail. Of those on files only
//! calls on files below one folder, on sockets and on a userfaultfd count, so that those of the loader and of libc are left
//! alone; others, such as those that start a thread, count all. A call that fails is not carried out; one that is short is carried out by the kernel, with half of its length.

mod calls;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};

pub use calls::Call;
use calls::{Entered, Lent};

use crate::waiting::wait_until;

/// Longer than anything here takes on a slow machine; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Whoever is interrupted for ever gets nowhere, and is not to blame: an interruption that lasts ends after so many calls.
const MOST_INTERRUPTIONS: u32 = 100;

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It is not carried out, and fails with this `errno`.
    Error(i32),
    /// It moves half of the bytes that it was to move.
    Short,
    /// The process is killed in front of it.
    Kill,
}

/// Which call fails, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Its name.
    pub name: &'static str,
    /// How many of that name come before it.
    pub number: u32,
    /// What becomes of it.
    pub failure: Failure,
    /// Whether all later ones of that name fail, too.
    pub lasting: bool,
}

/// A process that has ended.
#[derive(Debug)]
pub struct Traced {
    /// Its calls that count, in order.
    pub calls: Vec<Call>,
    /// Those of them that failed.
    pub failed: Vec<Call>,
    /// How it ended.
    pub status: ExitStatus,
}

/// Runs `command` to its end. Its calls on files below `folder`, which has no link on its way, are listed, and fail as
/// `fault` says.
///
/// # Panics
/// If it cannot be started or traced, or has not ended after a minute.
pub fn run(command: &mut Command, folder: &Path, fault: Option<Fault>) -> Traced {
    let seen = Arc::new(Mutex::new(Seen::new(fault)));
    let mut tracer = Tracer::start(command, folder, Arc::clone(&seen));
    let watch = Watch::new(tracer.process);
    let status = tracer.follow();
    let Seen { calls, failed, .. } = std::mem::take(&mut *lock(&seen));
    watch.end(&calls);
    Traced {
        calls,
        failed,
        status,
    }
}

/// A process that runs on while its calls are listed and fail. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    process: Pid,
    seen: Arc<Mutex<Seen>>,
    /// Who traces must be who has started it. `None` once it was waited for.
    thread: Option<JoinHandle<ExitStatus>>,
}

impl Running {
    /// Starts `command`. Its calls that count, as those on files below `folder` do, are listed, and fail as `fault` says.
    pub fn start(mut command: Command, folder: &Path, fault: Option<Fault>) -> Self {
        let seen = Arc::new(Mutex::new(Seen::new(fault)));
        let (folder, shared) = (folder.to_owned(), Arc::clone(&seen));
        let (tell, told) = channel();
        let thread = std::thread::spawn(move || {
            let mut tracer = Tracer::start(&mut command, &folder, shared);
            tell.send(tracer.process).unwrap();
            tracer.follow()
        });
        Self {
            process: told.recv().unwrap(),
            seen,
            thread: Some(thread),
        }
    }

    /// Lets no call fail from now on.
    pub fn relent(&self) {
        lock(&self.seen).fault = None;
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Asks it to end if it has not, and waits for that.
    pub fn terminate(mut self) -> Traced {
        if !self.has_ended() {
            // It may end by itself at this moment.
            let _ = kill(self.process, Signal::SIGTERM);
        }
        wait_until("the process ends", PATIENCE, || self.has_ended());
        let status = self.thread.take().unwrap().join().unwrap();
        let Seen { calls, failed, .. } = std::mem::take(&mut *lock(&self.seen));
        Traced {
            calls,
            failed,
            status,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended() {
            let _ = kill(self.process, Signal::SIGKILL);
        }
    }
}

/// What was seen of a process, and what is to fail.
#[derive(Debug, Default)]
struct Seen {
    fault: Option<Fault>,
    /// How many calls of each name there were.
    numbers: BTreeMap<&'static str, u32>,
    calls: Vec<Call>,
    failed: Vec<Call>,
}

impl Seen {
    fn new(fault: Option<Fault>) -> Self {
        Self {
            fault,
            ..Self::default()
        }
    }

    /// Notes a call that is about to be made; returns what becomes of it.
    fn note(&mut self, call: Call) -> Option<Failure> {
        let before = self.numbers.entry(call.name).or_default();
        let number = *before;
        *before += 1;
        let failure = self.failure_of(&call, number);
        if failure.is_some() {
            self.failed.push(call.clone());
        }
        self.calls.push(call);
        failure
    }

    fn failure_of(&self, call: &Call, number: u32) -> Option<Failure> {
        let fault = self.fault.filter(|fault| fault.name == call.name)?;
        let most = match fault.failure {
            Failure::Error(libc::EINTR) => MOST_INTERRUPTIONS,
            _ => u32::MAX,
        };
        let meant = if fault.lasting {
            number >= fault.number && number - fault.number < most
        } else {
            number == fault.number
        };
        let can = fault.failure != Failure::Short || call.amount > 1;
        (meant && can).then_some(fault.failure)
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap()
}

/// Ends a process that hangs.
struct Watch {
    over: Sender<()>,
    /// Whether it had to.
    thread: JoinHandle<bool>,
}

impl Watch {
    fn new(process: Pid) -> Self {
        let number = rustix::process::Pid::from_raw(process.as_raw()).unwrap();
        let process: OwnedFd = pidfd_open(number, PidfdFlags::empty()).unwrap();
        let (over, wait) = channel();
        let thread = std::thread::spawn(move || {
            let hangs = wait.recv_timeout(PATIENCE).is_err();
            if hangs {
                // It may have ended at this very moment.
                let _ = pidfd_send_signal(&process, rustix::process::Signal::KILL);
            }
            hangs
        });
        Self { over, thread }
    }

    fn end(self, calls: &[Call]) {
        // Nobody listens any more if it hung.
        let _ = self.over.send(());
        let last = calls.len().saturating_sub(8);
        let hung = self.thread.join().unwrap();
        assert!(!hung, "hangs after {:#?}", &calls[last..]);
    }
}

/// Traces the children of its own thread.
#[derive(Debug)]
struct Tracer {
    process: Pid,
    folder: PathBuf,
    seen: Arc<Mutex<Seen>>,
    /// All traced threads, with what has to be put back at the end of their call.
    threads: HashMap<Pid, Option<(Entered, Lent)>>,
}

impl Tracer {
    #[expect(clippy::zombie_processes, reason = "`follow` waits for it")]
    fn start(command: &mut Command, folder: &Path, seen: Arc<Mutex<Seen>>) -> Self {
        let filter = calls::filter();
        let trace_me = move || {
            ptrace::traceme()?;
            seccompiler::apply_filter(&filter).map_err(io::Error::other)
        };
        // SAFETY: between fork and exec it makes system calls, and takes no lock; memory is allocated only for an error.
        unsafe { command.pre_exec(trace_me) };
        let child = command.spawn().unwrap();
        Self {
            process: Pid::from_raw(i32::try_from(child.id()).unwrap()),
            folder: folder.to_owned(),
            seen,
            threads: HashMap::new(),
        }
    }

    /// Lets the process run until it ends.
    fn follow(&mut self) -> ExitStatus {
        // Children of other threads are of other tests.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        loop {
            match waitpid(None, Some(flags)).unwrap() {
                WaitStatus::Exited(process, code) if process == self.process => {
                    return ExitStatus::from_raw(code << 8);
                }
                WaitStatus::Signaled(process, signal, _) if process == self.process => {
                    return ExitStatus::from_raw(signal as i32);
                }
                WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..) => {
                    self.threads.remove(&thread);
                }
                WaitStatus::PtraceEvent(thread, _, libc::PTRACE_EVENT_SECCOMP) => {
                    self.at_entry(thread);
                }
                WaitStatus::PtraceEvent(thread, ..) => go_on(thread, None),
                WaitStatus::PtraceSyscall(thread) => self.at_exit(thread),
                WaitStatus::Stopped(thread, signal) => {
                    let signal = self.signal_for(thread, signal);
                    go_on(thread, signal);
                }
                WaitStatus::Continued(_) | WaitStatus::StillAlive => {}
            }
        }
    }

    /// A first stop is the tracer's own: the process has executed its program, or a thread is new.
    fn signal_for(&mut self, thread: Pid, signal: Signal) -> Option<Signal> {
        if self.threads.contains_key(&thread) {
            return Some(signal);
        }
        self.threads.insert(thread, None);
        if thread == self.process {
            let options = Options::PTRACE_O_TRACESECCOMP
                | Options::PTRACE_O_TRACESYSGOOD
                | Options::PTRACE_O_TRACECLONE
                | Options::PTRACE_O_TRACEFORK
                | Options::PTRACE_O_TRACEVFORK
                | Options::PTRACE_O_TRACEEXEC
                | Options::PTRACE_O_EXITKILL;
            ptrace::setoptions(thread, options).unwrap();
        }
        None
    }

    fn at_entry(&mut self, thread: Pid) {
        let lent = self.meddle(thread);
        if let Some(lent) = lent {
            self.threads.insert(thread, Some(lent));
            // To its exit.
            tolerate_death(ptrace::syscall(thread, None));
        } else {
            go_on(thread, None);
        }
    }

    /// Notes a call that counts, and makes it fail if it is to.
    fn meddle(&mut self, thread: Pid) -> Option<(Entered, Lent)> {
        // A thread that was killed meanwhile has no registers.
        let mut entered = Entered::new(thread, ptrace::getregs(thread).ok()?)?;
        let call = entered.call(&self.folder)?;
        let failure = lock(&self.seen).note(call)?;
        let lent = match failure {
            Failure::Error(number) => {
                entered.fail(number);
                None
            }
            Failure::Short => entered.halve(),
            Failure::Kill => {
                kill(self.process, Signal::SIGKILL).unwrap();
                return None;
            }
        };
        tolerate_death(ptrace::setregs(thread, entered.registers));
        lent.map(|lent| (entered, lent))
    }

    fn at_exit(&mut self, thread: Pid) {
        if let Some((entered, lent)) = self.threads.get_mut(&thread).and_then(Option::take) {
            entered.put_back(lent);
        }
        go_on(thread, None);
    }
}

/// Lets a thread run to its next call.
fn go_on(thread: Pid, signal: Option<Signal>) {
    tolerate_death(ptrace::cont(thread, signal));
}

/// A thread that was killed meanwhile cannot be told anything; its end is heard of.
fn tolerate_death(result: nix::Result<()>) {
    match result {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => panic!("cannot trace: {error}"),
    }
}
