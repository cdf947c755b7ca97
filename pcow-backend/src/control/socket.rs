// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where clients of the control socket connect: a name in a directory, bound through the open directory, so that no path
//! is too long for it (unix(7)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use pcow_protocol::control::{SOCKET_FILE, inside};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::failure::Failure;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Who may connect, besides root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The user that the backend runs as.
    Owner,
    /// And the socket file's group.
    Group,
}

impl Access {
    fn mode(self) -> Mode {
        match self {
            Self::Owner => Mode::RUSR | Mode::WUSR,
            Self::Group => Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP,
        }
    }
}

/// The image's directory, as it is told to clients.
#[derive(Debug, Clone)]
pub struct ImageDirectory {
    /// The path under which it was opened.
    pub path: PathBuf,
    /// Its device number.
    pub device: u64,
    /// Its inode number.
    pub inode: u64,
}

/// A listening socket.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    image: ImageDirectory,
    /// The directory that it lies in, its name there, and its inode number.
    place: (OwnedFd, PathBuf, u64),
}

impl Socket {
    /// Listens at `path`, or under the usual name in the directory of the image, which this process has locked.
    ///
    /// # Errors
    /// If the place is taken or cannot be used.
    pub fn bind(image: &Path, path: Option<&Path>, access: Access) -> Result<Self, Failure> {
        let usual = image.join(SOCKET_FILE);
        let path = path.unwrap_or(&usual);
        let fail = |e: &dyn std::error::Error| {
            Failure::new(format!("cannot listen on {}", path.display())).caused_by(e)
        };
        let stat = std::fs::metadata(image).map_err(|e| fail(&e))?;
        let (dir, name) = open_parent(path).map_err(|e| fail(&e))?;
        let short = inside(&dir, &name);
        remove_stale(&short, path)?;
        let listener = listen(&short, access).map_err(|e| fail(&e))?;
        let inode = short.symlink_metadata().map_err(|e| fail(&e))?.ino();
        let image = ImageDirectory {
            path: image.canonicalize().unwrap_or_else(|_| image.to_owned()),
            device: stat.dev(),
            inode: stat.ino(),
        };
        log::info!("control socket: {}", path.display());
        Ok(Self {
            listener,
            image,
            place: (dir, name, inode),
        })
    }

    /// The image's directory.
    pub fn image(&self) -> &ImageDirectory {
        &self.image
    }

    /// Readable when a client connects.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// A client, if one is there. The stream blocks.
    ///
    /// # Errors
    /// As accept(2).
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Removes the socket's name, if it is still this socket's.
    pub fn remove(&self) {
        let (dir, name, inode) = &self.place;
        let short = inside(dir, name);
        if short.symlink_metadata().is_ok_and(|m| m.ino() == *inode) {
            // Best effort: a stale socket is replaced by the next backend.
            let _ = std::fs::remove_file(short);
        }
    }
}

fn open_parent(path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let parent = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(parent, flags, Mode::empty())?;
    Ok((dir, PathBuf::from(name)))
}

/// Removes a socket file that nobody listens on any more. Anything else that stands there stays.
fn remove_stale(short: &Path, path: &Path) -> Result<(), Failure> {
    let Ok(meta) = short.symlink_metadata() else {
        return Ok(());
    };
    let taken = |why: &str| Failure::new(format!("cannot listen on {}: {why}", path.display()));
    if !meta.file_type().is_socket() {
        return Err(taken("it exists and is no socket"));
    }
    match UnixStream::connect(short) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
        _ => return Err(taken("a process already listens there")),
    }
    log::info!("replacing the stale socket {}", path.display());
    std::fs::remove_file(short).map_err(|e| taken("it cannot be replaced").caused_by(&e))
}

/// The file has its mode from its first moment: the kernel takes it from the socket (unix(7), "Pathname socket ownership
/// and permissions": Linux honours the mode of the socket that is bound), less the umask.
fn listen(short: &Path, access: Access) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::fs::fchmod(&socket, access.mode())?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(short)?)?;
    // A umask may have taken the group's part away; adding it after the fact opens nothing that was not asked for.
    rustix::fs::chmod(short, access.mode())?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_path_of_any_length_can_be_bound_and_only_its_owner_may_connect() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("x".repeat(120));
        std::fs::create_dir(&image).unwrap();
        for (access, mode) in [(Access::Owner, 0o600), (Access::Group, 0o660)] {
            let socket = Socket::bind(&image, None, access).unwrap();
            let meta = image.join(SOCKET_FILE).metadata().unwrap();
            assert_eq!(meta.permissions().mode() & 0o777, mode);
            socket.remove();
            assert!(!image.join(SOCKET_FILE).exists());
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let bind = || Socket::bind(dir.path(), None, Access::Owner);
        let first = bind().unwrap();
        let refused = bind().unwrap_err().to_string();
        assert!(refused.contains("already listens"), "{refused}");
        drop(first);
        let second = bind().unwrap();
        // Another one's socket under the same name is not removed.
        std::fs::remove_file(dir.path().join(SOCKET_FILE)).unwrap();
        std::fs::write(dir.path().join(SOCKET_FILE), "").unwrap();
        second.remove();
        let refused = bind().unwrap_err().to_string();
        assert!(refused.contains("is no socket"), "{refused}");
    }
}
