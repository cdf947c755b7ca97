// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel tells of a process in `/proc` (proc(5)): its descriptors, and the memory of a range of addresses.

use std::fs;
use std::ops::Range;

use pcow_protocol::frontend::GuestRegion;
use rustix::process::{Resource, getrlimit, setrlimit};

/// How many descriptors the process `pid` has open.
pub fn descriptor_count(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// A number of `/proc/PID/status`, such as `Threads`.
pub fn status_number(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.trim_start_matches(':').split_whitespace().next());
    number.unwrap().parse().unwrap()
}

/// The state of the thread `name` of the process `pid`, as in proc_pid_stat(5): `S` for one that waits for others.
///
/// # Panics
/// If the process has no such thread.
pub fn thread_state(pid: u32, name: &str) -> char {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("stat")).ok());
    let of_name = |stat: String| {
        let (head, rest) = stat.rsplit_once(") ")?;
        let (_, found) = head.split_once('(')?;
        (found == name).then(|| rest.chars().next())?
    };
    stats
        .filter_map(of_name)
        .next()
        .unwrap_or_else(|| panic!("no thread {name}"))
}

/// Lets this process open as many files as it may: a chain of a thousand layers takes two for each.
pub fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

/// `vm.max_map_count`.
pub fn max_map_count() -> usize {
    let text = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    text.trim().parse().unwrap()
}

/// One mapping of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses.
    pub addresses: Range<u64>,
    /// As in `/proc/self/maps`: `rw-s` and the like.
    pub access: String,
    /// The mapped file, empty for anonymous memory.
    pub file: String,
    /// Bytes of anonymous pages in it.
    pub anonymous_bytes: u64,
    /// As in `VmFlags`: `sf` for a synchronous mapping.
    pub flags: Vec<String>,
}

/// The mappings of this process that lie in a region.
pub fn mappings(region: &GuestRegion) -> Vec<Mapping> {
    let start = u64::try_from(region.as_ptr().addr()).unwrap();
    let whole = start..start + u64::try_from(region.len()).unwrap();
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some(mapping) = head(line) {
            mappings.push(mapping);
        } else if let Some(kib) = line.strip_prefix("Anonymous:") {
            let kib: u64 = kib.trim().trim_end_matches(" kB").parse().unwrap();
            mappings.last_mut().unwrap().anonymous_bytes = kib << 10;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let flags = flags.split_whitespace().map(str::to_owned);
            mappings.last_mut().unwrap().flags = flags.collect();
        }
    }
    mappings.retain(|m| m.addresses.start >= whole.start && m.addresses.end <= whole.end);
    mappings
}

/// The first line of a mapping's entry: addresses, access, offset, device, inode, file.
fn head(line: &str) -> Option<Mapping> {
    let (addresses, rest) = line.split_once(' ')?;
    let (start, end) = addresses.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let mut fields = rest.split_whitespace();
    Some(Mapping {
        addresses: address(start)?..address(end)?,
        access: fields.next()?.to_owned(),
        file: fields.nth(3).unwrap_or_default().to_owned(),
        anonymous_bytes: 0,
        flags: Vec::new(),
    })
}

/// Where every thread of this process sleeps, a line each: name, and function of the kernel (proc(5), `wchan`).
pub fn waits() -> String {
    let threads = fs::read_dir("/proc/self/task").unwrap();
    let line = |thread: fs::DirEntry| {
        let read = |file| fs::read_to_string(thread.path().join(file)).ok();
        Some(format!("{}: {}\n", read("comm")?.trim(), read("wchan")?))
    };
    // A thread that has ended meanwhile does not wait.
    threads.map_while(Result::ok).filter_map(line).collect()
}
