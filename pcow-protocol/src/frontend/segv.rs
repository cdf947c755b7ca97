// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! This process's own stores in a moment (`protocol.md` section 5.3): a SIGSEGV handler that lets them be repeated.
//!
//! The handler may run in any thread at any instruction, so it takes no lock: the regions are in a table of atomics.
#![allow(unsafe_code)] // sigaction(2)

use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use libc::{c_int, c_void, sigaction, siginfo_t};

use crate::error::{Error, Result};

/// `SEGV_ACCERR` of `asm-generic/siginfo.h`: the mapping is there and does not allow the access.
const SEGV_ACCERR: c_int = 2;
/// Regions of one process that the handler knows. A store in a moment of another one ends the process.
const REGIONS: usize = 256;

struct Slot {
    base: AtomicUsize,
    /// 0: the slot is free, or on its way to be.
    len: AtomicUsize,
}

static TABLE: [Slot; REGIONS] = [const {
    Slot {
        base: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
    }
}; REGIONS];

/// What was there before, as long as there is a handler.
static BEFORE: OnceLock<sigaction> = OnceLock::new();

/// A range of addresses that the handler knows, until this is dropped.
#[derive(Debug)]
pub(super) struct Repeatable(Option<usize>);

impl Repeatable {
    pub(super) fn new(base: usize, len: usize) -> Self {
        let free = |slot: &Slot| {
            // A base that is not zero marks the slot as taken, before the length makes it count.
            let taken = slot
                .base
                .compare_exchange(0, base, Ordering::SeqCst, Ordering::SeqCst);
            taken.is_ok()
        };
        let slot = TABLE.iter().position(free);
        match slot {
            Some(index) => TABLE[index].len.store(len, Ordering::SeqCst),
            None => {
                log::warn!("more than {REGIONS} regions: moments of this one are not waited for")
            }
        }
        Self(slot)
    }
}

impl Drop for Repeatable {
    fn drop(&mut self) {
        if let Some(index) = self.0 {
            TABLE[index].len.store(0, Ordering::SeqCst);
            TABLE[index].base.store(0, Ordering::SeqCst);
        }
    }
}

fn is_repeatable(address: usize) -> bool {
    // Base first: a slot that is freed and taken anew in between has a length of zero until its base is the new one.
    TABLE.iter().any(|slot| {
        let base = slot.base.load(Ordering::SeqCst);
        let len = slot.len.load(Ordering::SeqCst);
        address.wrapping_sub(base) < len
    })
}

/// Installs a handler of SIGSEGV for this process that repeats stores into regions in the moments of BOUNCE, and passes
/// everything else on to the handler that was there before. Once per process; further calls do nothing.
///
/// # Errors
/// `ErrorKind::Io` if the handler cannot be installed.
pub fn repeat_stores_in_bounces() -> Result<()> {
    // Filled in before the handler is installed, which reads it. Two callers at once install the same handler twice,
    // and the second finds the first one's: `pass_on` must not call itself then, so the first value stays.
    let mut before = MaybeUninit::<sigaction>::uninit();
    // SAFETY: a null action only asks; the result is written to `before`, which has room for it.
    check(unsafe { libc::sigaction(libc::SIGSEGV, std::ptr::null(), before.as_mut_ptr()) })?;
    // SAFETY: the call above has filled it.
    let before = unsafe { before.assume_init() };
    if BEFORE.set(before).is_err() {
        return Ok(());
    }
    // SAFETY: all zero is a valid sigaction: an empty mask, no flags, the default action.
    let mut action: sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as *const () as usize;
    // On the thread's own signal stack if it has one (as Rust's own handler for stack overflows), with the siginfo.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature of SA_SIGINFO and does only what signal-safety(7) allows.
    check(unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) })
}

fn check(result: c_int) -> Result<()> {
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Error::io("install a handler of SIGSEGV", error))
}

extern "C" fn handler(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a SA_SIGINFO handler a valid siginfo.
    let info_ref = unsafe { &*info };
    // SAFETY: a SIGSEGV's siginfo has an address (for one that a process sent, it is not looked at, below).
    let address = unsafe { info_ref.si_addr() }.addr();
    if info_ref.si_code == SEGV_ACCERR && is_repeatable(address) {
        // Nothing but a moment forbids access in a region, and it ends by itself: the store is repeated until then.
        return;
    }
    pass_on(signal, info, context);
}

fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(before) = BEFORE.get() else {
        return; // the handler is installed after this was set
    };
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The instruction is repeated, and then ends the process as it would have without this handler.
            // SAFETY: the action was the process's own; sigaction(2) is async-signal-safe.
            unsafe { libc::sigaction(signal, std::ptr::from_ref(before), std::ptr::null_mut()) };
        }
        address if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: SA_SIGINFO says that the address is a handler of this type.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(address) };
            handler(signal, info, context);
        }
        address => {
            // SAFETY: neither default nor ignored and without SA_SIGINFO: a handler that takes the signal's number.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(address) };
            handler(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Repeatable, is_repeatable};

    #[test]
    fn an_address_is_repeatable_as_long_as_its_region_exists() {
        let base = 0x7000_0000_0000;
        let region = Repeatable::new(base, 4096);
        assert!(is_repeatable(base) && is_repeatable(base + 4095));
        assert!(!is_repeatable(base + 4096) && !is_repeatable(base - 1));
        drop(region);
        assert!(!is_repeatable(base));
    }
}
