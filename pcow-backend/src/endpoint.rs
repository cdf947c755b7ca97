// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where frontends come from: a path to listen on, or a descriptor that was handed down.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};
use vhost::vhost_user::Listener;

use crate::failure::Failure;

/// Longest socket path that the kernel takes, in bytes (unix(7)).
const MAX_PATH_BYTES: usize = 107;

/// Where frontends come from.
pub enum Endpoint {
    /// A socket that accepts one connection after the other; the path is removed at the end.
    Listening(Listener, Option<PathBuf>),
    /// One connection that exists already.
    Connected(UnixStream),
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Endpoint::Listening(_, path) => f.debug_tuple("Listening").field(path).finish(),
            Endpoint::Connected(stream) => f.debug_tuple("Connected").field(stream).finish(),
        }
    }
}

/// Where an endpoint will be: checked, and nobody can connect yet unless somebody else made the socket.
#[derive(Debug)]
pub enum Place {
    /// A path that a socket can be bound to.
    Path(PathBuf),
    /// A descriptor that is an endpoint already.
    Ready(Endpoint),
}

impl Endpoint {
    /// Readable when a frontend connects; `None` if there is only one connection.
    pub fn listener_fd(&self) -> Option<BorrowedFd<'_>> {
        let Self::Listening(listener, _) = self else {
            return None;
        };
        // SAFETY: the descriptor is open for as long as the listener, which the result borrows.
        Some(unsafe { BorrowedFd::borrow_raw(listener.as_raw_fd()) })
    }
}

impl Place {
    /// The path to listen on. With `taken_over` a process may still listen there, which will have ended when it is opened.
    ///
    /// # Errors
    /// `Usage` if it is too long or taken.
    pub fn path(path: &Path, taken_over: bool) -> Result<Self, Failure> {
        let bytes = path.as_os_str().len();
        if bytes > MAX_PATH_BYTES {
            return Err(Failure::usage(format!(
                "the socket path {} has {bytes} bytes, the kernel takes {MAX_PATH_BYTES}; choose a shorter one",
                path.display()
            )));
        }
        if !taken_over {
            is_stale(path)?;
        }
        Ok(Self::Path(path.to_owned()))
    }

    /// Begins to listen. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// `Usage` if the path was taken meanwhile.
    pub fn open(self) -> Result<Endpoint, Failure> {
        match self {
            Self::Path(path) => listen(path),
            Self::Ready(endpoint) => Ok(endpoint),
        }
    }

    /// Takes the descriptor `fd`, a listening or a connected socket.
    ///
    /// # Errors
    /// `Usage` if it is no open stream socket.
    pub fn from_fd(fd: RawFd) -> Result<Self, Failure> {
        let bad = |e: io::Error| Failure::usage(format!("--fd {fd} is no socket")).caused_by(&e);
        // SAFETY: F_GETFD only looks the number up; a number that is not open is an error.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(bad(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is open (above), was handed down for this use with --fd, and is taken once.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if socket_type(fd.as_fd()).map_err(|e| bad(e.into()))? != SocketType::STREAM {
            return Err(Failure::usage("the socket of --fd is no stream socket"));
        }
        let listening = socket_acceptconn(fd.as_fd()).map_err(|e| bad(e.into()))?;
        if !listening {
            return Ok(Self::Ready(Endpoint::Connected(UnixStream::from(fd))));
        }
        use std::os::fd::IntoRawFd;
        // SAFETY: `fd` is an open listening socket, and its ownership moves here.
        let listener = unsafe { Listener::from_raw_fd(fd.into_raw_fd()) };
        listener
            .set_nonblocking(true)
            .map_err(|e| Failure::new("cannot use the socket of --fd").caused_by(&e))?;
        Ok(Self::Ready(Endpoint::Listening(listener, None)))
    }
}

/// The process that connected `stream`; 0 if it is in a namespace that is not visible from here, or nobody says.
pub fn peer_process(stream: &UnixStream) -> u32 {
    // Not through rustix, whose process number is never 0, while the kernel's is for an invisible process (unix(7)).
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    // SAFETY: SO_PEERCRED writes at most `len` bytes of a `struct ucred`, which `credentials` has room for; both live
    // longer than the call, and the descriptor is open.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        u32::try_from(credentials.pid).unwrap_or(0)
    } else {
        0
    }
}

fn listen(path: PathBuf) -> Result<Endpoint, Failure> {
    if is_stale(&path)? {
        log::info!("replacing the stale socket {}", path.display());
        std::fs::remove_file(&path).map_err(|e| {
            Failure::new(format!("cannot replace {}", path.display())).caused_by(&e)
        })?;
    }
    let listener = Listener::new(&path, false)
        .and_then(|l| l.set_nonblocking(true).map(|()| l))
        .map_err(|e| Failure::new(format!("cannot listen on {}", path.display())).caused_by(&e))?;
    Ok(Endpoint::Listening(listener, Some(path)))
}

/// Whether a socket file stands at `path` that nobody listens on any more; an error if anything else does.
fn is_stale(path: &Path) -> Result<bool, Failure> {
    let Ok(meta) = path.symlink_metadata() else {
        return Ok(false);
    };
    if !meta.file_type().is_socket() {
        let what = format!(
            "{} exists and is no socket; choose another path",
            path.display()
        );
        return Err(Failure::usage(what));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        _ => Err(Failure::usage(format!(
            "a process already listens on {}; stop it or choose another path",
            path.display()
        ))),
    }
}
