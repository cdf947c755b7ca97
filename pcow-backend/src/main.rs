// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `pcow-backend`: serves a pcow image to a virtual machine monitor.
//!
//! This crate joins the image (`pcow-format`) and the wire (`pcow-protocol`): it decides how each touch of the guest is
//! answered. It knows neither QEMU nor the layout of an image on disk.

#![deny(unsafe_code)]

mod cli;
mod connection;
mod control;
mod disk;
mod endpoint;
mod failure;
mod occupancy;
mod readiness;
mod server;
mod service;
mod service_manager;
mod signals;
mod takeover;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use pcow_format::medium::{Domain, Hindrance};
use pcow_format::{Image, Stored};
use rustix::process::{Resource, getrlimit, setrlimit};

use cli::Cli;
use connection::Offer;
use control::Control;
use control::commands::Operator;
use disk::{Disk, ReadOnlyDisk, WritableDisk};
use endpoint::{Endpoint, Place};
use failure::{EXIT_USAGE, Failure};
use occupancy::Occupancy;
use server::{Quit, Server};
use service::Budgets;
use signals::Signals;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are no errors; a closed standard output is nobody's loss.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { EXIT_USAGE } else { 0 });
        }
    };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format_timestamp_millis()
        .init();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("pcow-backend: {failure}");
            ExitCode::from(failure.code())
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    if cli.print_capabilities {
        println!("{}", cli::capabilities());
        return Ok(());
    }
    let Some(image) = &cli.image else {
        return Err(Failure::usage("--image is missing"));
    };
    let signals =
        Signals::block().map_err(|e| Failure::new("cannot handle signals").caused_by(&e))?;
    raise_descriptor_limit();
    // A socket that cannot be used leaves the image untouched; an image that cannot be used is never served.
    let place = match (&cli.socket, cli.fd) {
        (Some(path), _) => Place::path(path, cli.takeover)?,
        (None, Some(fd)) => Place::from_fd(fd)?,
        (None, None) => match service_manager::socket()? {
            Some(fd) => Place::from_fd(fd)?,
            None => {
                let what =
                    "--socket or --fd is missing, and no service manager has handed a socket down";
                return Err(Failure::usage(what));
            }
        },
    };
    // Before a backend that serves it is asked to end: its guest would be left without one.
    if !cli.read_only && !cli.page_cache {
        refuse_without_dax(&Stored::open(image, &cli.base_dir)?)?;
    }
    if cli.takeover {
        takeover::take_over(image, &cli.base_dir)?;
    }
    let served = open(image, cli)?;
    let quit = Arc::new(Quit::new()?);
    let offer = Arc::new(Offer {
        disk: served.disk(),
        budgets: Budgets {
            cache_bytes: cli.cache_size,
            mappings: cli.max_mappings,
            stop_on_low_space: cli.stop_on_low_space,
        },
        uffd_device: open_uffd_device(),
        place: Occupancy::default(),
        session: std::sync::Mutex::default(),
        events: Arc::default(),
        ending: std::sync::atomic::AtomicBool::default(),
        switching: std::sync::Mutex::default(),
    });
    // Listens before the endpoint does: who finds the one finds the other. Ends before the image is let go of.
    let _control = match &served {
        Served::ReadOnly(_) => None,
        Served::ForWriting(disk) => {
            let operator = Operator::new(Arc::clone(&offer), Arc::clone(disk), Arc::clone(&quit));
            control(image, cli, operator)?
        }
    };
    let endpoint = place.open()?;
    let flush_interval = cli
        .flush_interval()
        .filter(|_| !offer.disk.read_only() && !offer.disk.is_dax());
    let server = Server::new(offer, quit, flush_interval);
    service_manager::ready();
    let result = server.run(&endpoint, &signals);
    if let Endpoint::Listening(_, Some(path)) = &endpoint {
        // Best effort: a stale socket is replaced by the next backend. While the image is still held, or the socket could
        // be that one's already.
        let _ = std::fs::remove_file(path);
    }
    drop(server);
    result
}

/// What is served.
enum Served {
    ReadOnly(Arc<ReadOnlyDisk>),
    ForWriting(Arc<WritableDisk>),
}

impl Served {
    fn disk(&self) -> Arc<dyn Disk> {
        match self {
            Self::ReadOnly(disk) => Arc::clone(disk) as Arc<dyn Disk>,
            Self::ForWriting(disk) => Arc::clone(disk) as Arc<dyn Disk>,
        }
    }
}

/// Opens the control socket. In its usual place it may be missing: a full filesystem keeps nobody from being served.
fn control(image: &Path, cli: &Cli, operator: Operator) -> Result<Option<Control>, Failure> {
    let access = if cli.control_for_group {
        control::Access::Group
    } else {
        control::Access::Owner
    };
    match control::Socket::bind(image, cli.control.as_deref(), access) {
        Ok(socket) => Control::start(socket, operator).map(Some),
        Err(failure) if cli.control.is_none() => {
            log::warn!("no control socket: {failure}");
            Ok(None)
        }
        Err(failure) => Err(failure),
    }
}

fn open(path: &Path, cli: &Cli) -> Result<Served, Failure> {
    if cli.read_only {
        let lock = Stored::open(path, &cli.base_dir)?.lock_shared()?;
        // Again: what was read before the lock may have changed since.
        let disk = ReadOnlyDisk::new(&Stored::open(path, &cli.base_dir)?, lock)?;
        announce(path, &disk);
        return Ok(Served::ReadOnly(Arc::new(disk)));
    }
    let image = Image::open_to_serve(path, &cli.base_dir)?;
    let discarded = image.recovery().discarded_clusters;
    if discarded > 0 {
        log::warn!(
            "{discarded} clusters were written but never flushed before the machine went down; they show their base again"
        );
    }
    if image.recovery().left_dax {
        log::warn!(
            "this image was on DAX until now and is in the page cache: what a guest flushes through an nvdimm is not durable any more"
        );
    }
    if image.lock().is_some_and(|lock| lock.in_use().is_none()) {
        log::info!("a virtual machine uses the image already: waiting for it to come back");
    }
    let disk = WritableDisk::new(image);
    announce(path, &disk);
    Ok(Served::ForWriting(Arc::new(disk)))
}

/// Who has an image on persistent memory expects that a guest's own flushes are durable. What leaves DAX must say so.
fn refuse_without_dax(stored: &Stored) -> Result<(), Failure> {
    // Files of two domains are refused at the opening, with other advice.
    if !matches!(stored.domain(), Ok(Domain::PageCache)) {
        return Ok(());
    }
    let Some((file, hindrance)) = stored.dax_hindrance()? else {
        return Ok(());
    };
    let advice = hindrance
        .advice()
        .map_or(String::new(), |a| format!("{a}; "));
    Err(Failure::new(format!(
        "{file} {}; {advice}or serve it through the page cache, where flushes of a guest through nvdimm do not reach the \
         disk: --page-cache",
        hindrance.reason()
    )))
}

fn announce(path: &Path, disk: &dyn Disk) {
    let mode = if disk.read_only() {
        "read-only"
    } else {
        "for writing"
    };
    log::info!("serving {} {mode}, {} bytes", path.display(), disk.size());
    if !disk.read_only() && copies_on_write(disk) {
        log::warn!(
            "this filesystem writes every block anew, so storage cannot be reserved: a store of the guest that meets a \
             full disk ends the guest; use ext4 or XFS"
        );
    }
    if disk.is_dax() {
        log::info!("DAX: what the guest flushes is durable");
    } else if !disk.read_only() {
        log::info!(
            "page cache: a crash of a process loses nothing; a power failure loses what was not flushed, \
             and flushes of a guest through nvdimm do not reach the disk"
        );
        let file = disk.file(disk::FileKey::Active);
        if let Some(hindrance) = file.as_real().and_then(Hindrance::of) {
            log::warn!("the image {}", hindrance.reason());
        }
    }
}

/// Whether the data file lies on btrfs, bcachefs or ZFS (their superblock magics).
fn copies_on_write(disk: &dyn Disk) -> bool {
    const MAGICS: [i128; 3] = [0x9123_683e, 0xca45_1a4e, 0x2fc1_2fc1];
    let file = disk.file(disk::FileKey::Active);
    let file = file.as_real();
    file.and_then(|f| rustix::fs::fstatfs(f).ok())
        .is_some_and(|s| MAGICS.contains(&(i128::from(s.f_type) & 0xffff_ffff)))
}

/// A chain of thousands of layers takes two descriptors for each.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        log::debug!("cannot raise the limit of open files: {e}");
    }
}

/// For frontends without the right to open it themselves; without it they use what they may.
fn open_uffd_device() -> Option<OwnedFd> {
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open("/dev/userfaultfd", flags, rustix::fs::Mode::empty())
        .inspect_err(|e| log::debug!("cannot open /dev/userfaultfd: {e}"))
        .ok()
}
