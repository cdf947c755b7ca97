// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A kernel whose userfaultfd lacks a feature, as far as a program can tell: a system call filter answers as it would.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// The request in which a process says which features it needs (linux/userfaultfd.h). A kernel that does not know one of
/// them answers `EINVAL`.
const UFFDIO_API: u64 = 0xC018_AA3F;

fn filter() -> BpfProgram {
    let request =
        SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, UFFDIO_API).unwrap();
    let refused = SeccompRule::new(vec![request]).unwrap();
    SeccompFilter::new(
        [(libc::SYS_ioctl, vec![refused])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EINVAL.cast_unsigned()),
        std::env::consts::ARCH.try_into().unwrap(),
    )
    .unwrap()
    .try_into()
    .unwrap()
}

/// Has this thread run on such a kernel from now on.
///
/// # Panics
/// If the kernel has no filters.
pub fn enter() {
    seccompiler::apply_filter(&filter()).unwrap();
}

/// Has `command` run on such a kernel.
pub fn run_on(command: &mut Command) {
    let filter = filter();
    let enter = move || seccompiler::apply_filter(&filter).map_err(io::Error::other);
    // SAFETY: between fork and exec, `apply_filter` makes two system calls and touches nothing but the filter, which was
    // made before; only its failure allocates, and then the child ends.
    unsafe { command.pre_exec(enter) };
}
