// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The text in the `lock` file: which process holds an image for writing. For people and their messages, and for who
//! replaces a backend; no lock rests on it, since a process that died has left its text.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use uuid::Uuid;

/// Longest text of a holder that is read.
const MAX_BYTES: usize = 512;
/// Position of `starttime` in `/proc/PID/stat`, counted from the field after the name (proc_pid_stat(5): field 22 of
/// all; the name is field 2).
const START_FIELD: usize = 22 - 3;

/// What a process holds an image for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To serve it to a virtual machine.
    Serve,
    /// To change it, for as long as a command takes.
    Change,
}

impl Purpose {
    fn name(self) -> &'static str {
        match self {
            Self::Serve => "serve",
            Self::Change => "change",
        }
    }
}

/// A process, told apart from every other one of this host, of any boot and namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// The namespace in which it has that number (inode of `/proc/self/ns/pid`).
    pub namespace: u64,
    /// The kernel's boot id.
    pub boot: Uuid,
    /// When it started, in clock ticks since the boot.
    pub start: u64,
}

impl Process {
    /// The process `pid` of this namespace, as it is now.
    ///
    /// # Errors
    /// If `/proc` does not tell, for example because there is no such process.
    pub fn running(pid: u32, boot: Uuid) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name may hold anything, parentheses and blanks included; nothing after it does.
        let (_, fields) = stat.rsplit_once(')').ok_or(io::ErrorKind::InvalidData)?;
        let start = fields.split_ascii_whitespace().nth(START_FIELD);
        let start = start.and_then(|s| s.parse().ok());
        Ok(Self {
            pid,
            namespace: std::fs::metadata("/proc/self/ns/pid")?.ino(),
            boot,
            start: start.ok_or(io::ErrorKind::InvalidData)?,
        })
    }
}

/// What the text of a `lock` file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The first line, for people: process and host.
    pub name: String,
    /// The second line, if it is one.
    pub process: Option<(Process, Purpose)>,
}

impl Record {
    /// Writes this process's text.
    pub(super) fn write(file: &File, boot: Uuid, purpose: Purpose) -> io::Result<()> {
        let process = Process::running(std::process::id(), boot)?;
        let host = rustix::system::uname();
        let mut text = format!(
            "process {} on {}\n",
            process.pid,
            host.nodename().to_string_lossy()
        );
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "pid={} namespace={} boot={} start={} purpose={}",
            process.pid,
            process.namespace,
            process.boot.hyphenated(),
            process.start,
            purpose.name()
        );
        file.set_len(0)?;
        file.write_all_at(text.as_bytes(), 0)
    }

    /// The text that the last holder left.
    pub(super) fn read(file: &File) -> Self {
        let mut raw = [0; MAX_BYTES];
        let got = file.read_at(&mut raw, 0).unwrap_or(0);
        Self::parse(&String::from_utf8_lossy(&raw[..got]))
    }

    fn parse(text: &str) -> Self {
        let mut lines = text.lines();
        let name = lines.next().unwrap_or("").trim();
        let name = if name.is_empty() {
            "another process".to_owned()
        } else {
            name.escape_debug().to_string()
        };
        let process = lines.next().and_then(parse_process);
        Self { name, process }
    }
}

/// `None` unless every field is there, once and in its order: half a text names nobody.
fn parse_process(line: &str) -> Option<(Process, Purpose)> {
    let mut fields = line.split(' ');
    let mut value = |name: &str| fields.next()?.strip_prefix(name)?.strip_prefix('=');
    let process = Process {
        pid: value("pid")?.parse().ok().filter(|pid| *pid != 0)?,
        namespace: value("namespace")?.parse().ok()?,
        boot: Uuid::parse_str(value("boot")?).ok()?,
        start: value("start")?.parse().ok()?,
    };
    let purpose = match value("purpose")? {
        "serve" => Purpose::Serve,
        "change" => Purpose::Change,
        _ => return None,
    };
    fields.next().is_none().then_some((process, purpose))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_names_this_process() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[b'x'; 400], 0).unwrap();
        let boot = Uuid::new_v4();
        Record::write(&file, boot, Purpose::Serve).unwrap();
        let record = Record::read(&file);
        let me = std::process::id();
        assert!(record.name.starts_with(&format!("process {me} on ")));
        let running = Process::running(me, boot).unwrap();
        assert_eq!(record.process, Some((running, Purpose::Serve)));
    }

    #[test]
    fn half_a_text_and_a_foreign_one_name_nobody() {
        let boot = Uuid::nil();
        let whole = format!("process 1 on h\npid=1 namespace=2 boot={boot} start=3 purpose=change");
        assert!(Record::parse(&whole).process.is_some());
        for end in 0..whole.len() {
            assert_eq!(Record::parse(&whole[..end]).process, None, "{end}");
        }
        for bad in [
            whole.replace("pid=1", "pid=0"),
            whole.replace("pid=1", "pid=-1"),
            whole.replace("start=3", "start="),
            whole.clone() + " more=1",
        ] {
            assert_eq!(Record::parse(&bad).process, None, "{bad}");
        }
        assert_eq!(Record::parse("").name, "another process");
        assert_eq!(Record::parse("a\u{1b}[2J\n").name, "a\\u{1b}[2J");
    }

    #[test]
    fn a_process_is_told_apart_from_a_later_one_with_its_number() {
        let me = Process::running(std::process::id(), Uuid::nil()).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let other = Process::running(child.id(), Uuid::nil()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(other.start >= me.start);
        assert_eq!(other.namespace, me.namespace);
        assert!(Process::running(child.id(), Uuid::nil()).is_err());
    }
}
