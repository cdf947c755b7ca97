// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Parser};

/// Serve a pcow image to a virtual machine monitor.
///
/// The backend listens on a socket and hands file descriptors and offsets to the frontend that connects
/// (QEMU's memory-backend-pcow, or a program that links pcow-protocol), one at a time. It stays in the foreground, goes on
/// listening when a frontend leaves, and ends cleanly on SIGTERM or SIGINT.
#[derive(Debug, Parser)]
#[command(name = "pcow-backend", version, group = ArgGroup::new("endpoint").args(["socket", "fd", "print_capabilities"]))]
#[command(
    after_help = "Without --socket and --fd the socket is the one that a service manager hands down (LISTEN_FDS).\nExit codes: 0 clean end, 1 failure, 64 arguments that cannot be used.\nThe log level is set with RUST_LOG (default: info)."
)]
pub struct Cli {
    /// Listen on this path.
    #[arg(
        long,
        alias = "socket-path",
        value_name = "PATH",
        conflicts_with = "fd"
    )]
    pub socket: Option<PathBuf>,

    /// Use this inherited file descriptor: a listening or a connected Unix stream socket.
    #[arg(long, value_name = "N")]
    pub fd: Option<RawFd>,

    /// The image's directory.
    #[arg(
        long,
        value_name = "IMAGE",
        required_unless_present = "print_capabilities"
    )]
    pub image: Option<PathBuf>,

    /// Serve for reading only; any number of backends can do so at once.
    #[arg(long)]
    pub read_only: bool,

    /// Replace the backend that serves the image now: ask it to end, kill it if it does not within ten seconds, and go on
    /// where it was. The virtual machine only pauses.
    #[arg(long, conflicts_with = "read_only")]
    pub takeover: bool,

    /// Listen for operators here [default: control.sock in the image's directory; none with --read-only]
    #[arg(long, value_name = "PATH", conflicts_with = "read_only")]
    pub control: Option<PathBuf>,

    /// Let the group of the control socket's file use it, too
    #[arg(long, conflicts_with = "read_only")]
    pub control_for_group: bool,

    /// Print what this program can do, as JSON, and exit.
    #[arg(long)]
    pub print_capabilities: bool,

    /// Most memory of the frontend that read copies may take, in bytes or with a suffix K, M, G or T.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_cache_size)]
    pub cache_size: u64,

    /// Most memory mappings that may be made in the frontend's process, if fewer than it allows.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16..))]
    pub max_mappings: Option<u32>,

    /// Serve through the page cache an image whose device can do DAX, such as one on a filesystem that is mounted without it.
    #[arg(long, conflicts_with = "read_only")]
    pub page_cache: bool,

    /// Seconds within which what a guest on page cache has stored is made durable, if the storage is fast enough. With 0 the
    /// backend flushes when it is asked to, when a frontend leaves and when it ends.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub flush_interval: u64,

    /// Have the virtual machine stopped when the filesystem is nearly full, before a store has to wait for space. Free some,
    /// then continue the machine.
    #[arg(long, conflicts_with = "read_only")]
    pub stop_on_low_space: bool,

    /// A directory below which base files outside of the image may lie, besides the one that holds the image.
    #[arg(long, value_name = "DIR")]
    pub base_dir: Vec<PathBuf>,
}

impl Cli {
    /// Time within which what was stored is made durable, if it is.
    pub fn flush_interval(&self) -> Option<Duration> {
        (self.flush_interval > 0).then(|| Duration::from_secs(self.flush_interval))
    }
}

/// Less would make the guest wait for room at every load.
const MIN_CACHE_BYTES: u64 = 1 << 20;

fn parse_cache_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((i, 'k' | 'K')) => (&text[..i], 10),
        Some((i, 'm' | 'M')) => (&text[..i], 20),
        Some((i, 'g' | 'G')) => (&text[..i], 30),
        Some((i, 't' | 'T')) => (&text[..i], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "not a size".to_owned())?;
    let bytes = number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".to_owned())?;
    if bytes < MIN_CACHE_BYTES {
        return Err("must be at least 1M".to_owned());
    }
    Ok(bytes)
}

/// What `--print-capabilities` prints: the convention of vhost-user backends.
pub fn capabilities() -> serde_json::Value {
    serde_json::json!({
        "type": "pcow",
        "features": ["read-only", "dax", "flush", "takeover", "control"],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_a_suffix_and_refuse_what_is_none() {
        assert_eq!(parse_cache_size("2M"), Ok(2 << 20));
        assert_eq!(parse_cache_size("1048576"), Ok(1 << 20));
        for bad in ["", "M", "-1M", "1MB", "0", "1023K", "99999999999T"] {
            assert!(parse_cache_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_definitions_agree_with_each_other() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
