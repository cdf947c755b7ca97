// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sends memory over TCP where it stands (the kernel's `networking/msg_zerocopy.rst`), so that a network device gets
//! its address.

use std::mem::{offset_of, size_of};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr;

use rustix::event::{PollFd, PollFlags, poll};

/// `SO_EE_ORIGIN_ZEROCOPY` of `linux/errqueue.h`.
const ORIGIN_ZEROCOPY: u8 = 5;
/// `SO_EE_CODE_ZEROCOPY_COPIED` of `linux/errqueue.h`.
const CODE_COPIED: u8 = 1;

/// Few, because the kernel keeps a note of each until it is told of.
const BYTES_PER_CALL: usize = 1 << 20;

/// Sends `bytes`, and waits until the network is done with them.
///
/// # Panics
/// If the kernel says that it has copied any of them.
pub fn send(peer: &str, bytes: &[u8]) {
    let stream = TcpStream::connect(peer).unwrap();
    let fd = stream.as_raw_fd();
    allow(fd);
    let mut sent = 0;
    let mut calls = 0;
    while sent < bytes.len() {
        let rest = &bytes[sent..];
        let length = rest.len().min(BYTES_PER_CALL);
        // SAFETY: `length` bytes are at the address, and they stay there unchanged until `finished` has told of all
        // calls.
        let got = unsafe { libc::send(fd, rest.as_ptr().cast(), length, libc::MSG_ZEROCOPY) };
        sent += usize::try_from(got).unwrap_or_else(|_| panic!("{}", last_error()));
        calls += 1;
    }
    let mut told = 0;
    while told < calls {
        // The error condition is always polled for.
        poll(
            &mut [PollFd::new(&stream.as_fd(), PollFlags::empty())],
            None,
        )
        .unwrap();
        told += finished(fd);
    }
}

fn last_error() -> std::io::Error {
    std::io::Error::last_os_error()
}

fn allow(fd: RawFd) {
    let one: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap();
    let value = ptr::from_ref(&one).cast();
    // SAFETY: `value` points to as many bytes as `length` says.
    let set = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_ZEROCOPY, value, length) };
    assert_eq!(set, 0, "{}", last_error());
}

/// Reads one message of the socket's error queue, and returns of how many calls it tells that they are over.
fn finished(fd: RawFd) -> u32 {
    // Aligned as a control message has to be.
    let mut control = [0_u64; 16];
    // SAFETY: all zeros are a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the message names no buffer but `control`, with its length.
    let got = unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_ERRQUEUE) };
    assert_eq!(got, 0, "{}", last_error());
    let error = extended_error(&control);
    assert_eq!(error.ee_origin, ORIGIN_ZEROCOPY);
    assert_eq!(error.ee_code & CODE_COPIED, 0, "the kernel has copied");
    error.ee_data - error.ee_info + 1
}

/// The only control message: its head, and a `sock_extended_err` behind it (cmsg(3)).
fn extended_error(control: &[u64; 16]) -> libc::sock_extended_err {
    const HEAD: usize = size_of::<libc::cmsghdr>();
    const { assert!(HEAD.is_multiple_of(8) && offset_of!(libc::cmsghdr, cmsg_len) == 0) }
    let length = usize::try_from(control[0]).unwrap();
    assert!(length >= HEAD + size_of::<libc::sock_extended_err>());
    let data = control[HEAD / 8..]
        .as_ptr()
        .cast::<libc::sock_extended_err>();
    // SAFETY: inside of `control`, which is larger than both, and aligned to eight; any bytes are such an error.
    unsafe { data.read() }
}
