// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One `sendmsg` and one `recvmsg` with file descriptors. Knows no message.
//!
//! Received descriptors are close-on-exec from the start, which `vmm_sys_util::sock_ctrl_msg` cannot ask for.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::wire::MAX_FDS;

/// Whether a call may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    Forever,
    Never,
}

/// What one `recvmsg` brought.
pub(super) struct Chunk {
    /// Bytes; 0 at the end of the stream.
    pub bytes: usize,
    pub fds: Vec<OwnedFd>,
    /// The kernel had more descriptors than fit, and closed those.
    pub truncated: bool,
}

/// Sends as much of `bytes` as the socket takes, with `fds` on its first byte. Returns the bytes sent.
///
/// At most [`MAX_FDS`] descriptors. One system call.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    wait: Wait,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL);
    }
    let flags = match wait {
        Wait::Forever => SendFlags::NOSIGNAL,
        Wait::Never => SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    };
    retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags))
}

/// Receives what is there, up to the length of `buffer`. One system call.
///
/// The kernel never joins two sets of descriptors in one call: a chunk ends with the piece that carried its set.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    wait: Wait,
) -> Result<Chunk, Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = match wait {
        Wait::Forever => RecvFlags::CMSG_CLOEXEC,
        Wait::Never => RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    };
    let mut slices = [IoSliceMut::new(buffer)];
    let message = retry_on_intr(|| recvmsg(socket, &mut slices, &mut control, flags))?;
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    Ok(Chunk {
        bytes: message.bytes,
        fds,
        truncated: message.flags.contains(ReturnFlags::CTRUNC),
    })
}
