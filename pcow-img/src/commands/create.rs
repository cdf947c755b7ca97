// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `create`: a new image, empty or on a base.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use pcow_format::ops::{self, Base, Created, NewImage};
use pcow_format::{
    Cluster, ClusterRange, ClusterSize, DEFAULT_CLUSTER_BYTES, ErrorKind, Image, VirtualSize,
};
use serde::Serialize;

use crate::base::{self, BaseFormat, BaseOptions};
use crate::cli::Global;
use crate::console::{Console, warn};
use crate::failure::{Doing, Failure, one_line};
use crate::open;
use crate::progress::Progress;
use crate::size::{self, Bytes};

const USAGE: &str = "pcow-img create [OPTIONS] IMAGE [SIZE]
       pcow-img create [OPTIONS] CLUSTER_KIB SIZE_GIB IMAGE [BASE]";

/// Make an image
///
/// With a base, SIZE may be left out; the image then has the size of the base. The base is not changed, except that its
/// present state becomes a snapshot of it if none is named. Its files get a second name in the new image if both are on
/// one filesystem, and are copied otherwise.
///
/// The second form is the older one: cluster size in KiB and disk size in GiB, both plain numbers, in front. It is
/// recognised by having three or four arguments; the first form has one or two.
#[derive(Debug, Args)]
#[command(override_usage = USAGE)]
pub struct Create {
    /// The new image, and the size of its disk: a multiple of 2M up to 8388606M
    #[arg(required = true, num_args = 1..=4, value_name = "IMAGE [SIZE]")]
    arguments: Vec<OsString>,

    /// What the disk shows where nothing was written: IMAGE, IMAGE@SNAPSHOT or a raw file
    #[arg(short, long, value_name = "BASE")]
    base: Option<OsString>,

    /// Format of the image, for those who are used to give it
    #[arg(
        short = 'f',
        value_enum,
        value_name = "FORMAT",
        default_value = "pcow",
        hide = true
    )]
    format: OnlyPcow,

    /// size=, cluster_size=, preallocation=, backing_file= or backing_fmt=, as with 'qemu-img create'
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,

    #[command(flatten)]
    base_options: BaseOptions,

    /// Bytes that are allocated or copied together: a power of two from 4K to 2M [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = size::cluster)]
    cluster_size: Option<ClusterSize>,

    /// Bytes that the first write to a place allocates at least [default: 64K, on DAX 2M]
    #[arg(long, value_name = "SIZE", value_parser = size::allocation_unit)]
    allocation_unit: Option<u64>,

    /// What gets storage at once: nothing, the map, or all of the disk, with the base's bytes copied
    #[arg(long, value_enum, value_name = "MODE", default_value = "off")]
    preallocation: Preallocation,
}

/// The one format that can be created.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnlyPcow {
    /// An image of this program
    Pcow,
}

/// What a new image gets storage for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Preallocation {
    /// Nothing: storage comes with writing
    Off,
    /// The states of all clusters
    Metadata,
    /// All of the disk
    Full,
}

/// The arguments, whatever their form.
struct Wanted<'a> {
    image: &'a Path,
    size: Option<VirtualSize>,
    cluster: ClusterSize,
    base: Option<&'a OsStr>,
}

/// What `create` made.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct NewImageInfo {
    /// The image's directory.
    filename: PathBuf,
    /// Always `pcow`.
    format: &'static str,
    /// Size of the disk in bytes.
    virtual_size: u64,
    /// Size of its clusters in bytes.
    cluster_size: u64,
    /// Bytes that an allocation covers at least.
    allocation_unit: u64,
    /// Bytes of the base that had to be copied.
    copied_size: u64,
    /// Name of the snapshot of the base that was made to fix its present state, or null.
    sealed_base_as: Option<String>,
}

impl Create {
    /// Makes the image.
    pub fn run(mut self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let OnlyPcow::Pcow = self.format;
        for option in std::mem::take(&mut self.options) {
            self.take_option(&option).map_err(Failure::usage)?;
        }
        let wanted = self.wanted()?;
        self.check_unit(wanted.cluster)?;
        let find = |text| base::find(text, &self.base_options, &global.base_dirs);
        let base = wanted.base.map(find).transpose()?;
        let new = NewImage {
            size: wanted.size,
            cluster: wanted.cluster,
            allocation_unit: self.allocation_unit,
            base,
        };
        let created = create(wanted.image, &new, self.preallocation, global)?;
        let info = describe(wanted.image, created, global)?;
        let rest = info.virtual_size % STEP_OF_GUESTS;
        if rest > 0 {
            let (step, rest) = (Bytes(STEP_OF_GUESTS), Bytes(rest));
            warn(&format!(
                "Linux takes memory in steps of {step}: a guest may not see the last {rest}"
            ));
        }
        console.confirm(&info)
    }

    /// Puts an option of `-o` where the one with its own name goes.
    fn take_option(&mut self, option: &str) -> Result<(), String> {
        let Some((key, value)) = option.split_once('=') else {
            return Err(format!("'-o {option}' has no value: write {option}=VALUE"));
        };
        let twice = || format!("'-o {key}' is given twice, or in two ways");
        let is_free = match key {
            "size" if self.arguments.len() == 1 => {
                self.arguments.push(value.into());
                true
            }
            "size" => false,
            "cluster_size" => self.cluster_size.replace(size::cluster(value)?).is_none(),
            "backing_file" => self.base.replace(value.into()).is_none(),
            "backing_fmt" => {
                let format = BaseFormat::from_str(value, false)?;
                self.base_options.base_format.replace(format).is_none()
            }
            "preallocation" => {
                self.preallocation = Preallocation::from_str(value, false)?;
                true
            }
            _ => return Err(format!("'-o {key}' is not known")),
        };
        is_free.then_some(()).ok_or_else(twice)
    }

    fn wanted(&self) -> Result<Wanted<'_>, Failure> {
        let (options, arguments) = (&self.base_options, self.arguments.as_slice());
        let wanted = match arguments {
            [image] => self.wanted_new(image, None)?,
            [image, size] => self.wanted_new(image, Some(size))?,
            [cluster, size, image, base @ ..] => {
                self.wanted_older((cluster, size), image, base.first())?
            }
            [] => return Err(Failure::usage("give the name of the new image")),
        };
        if wanted.base.is_none() && (options.reference || options.base_format.is_some()) {
            let what = "--base-format and --reference say how to use a base; give one with --base";
            return Err(Failure::usage(what));
        }
        Ok(wanted)
    }

    fn wanted_new<'a>(
        &'a self,
        image: &'a OsStr,
        size: Option<&OsString>,
    ) -> Result<Wanted<'a>, Failure> {
        let size = size
            .map(|text| size::bytes(&text.to_string_lossy()).and_then(size::virtual_size))
            .transpose()
            .map_err(Failure::usage)?;
        if size.is_none() && self.base.is_none() {
            return Err(Failure::usage(
                "an image without base needs a size, such as 128G",
            ));
        }
        let default = ClusterSize::new(DEFAULT_CLUSTER_BYTES);
        let cluster = self.cluster_size.map_or(default, Ok);
        Ok(Wanted {
            image: Path::new(image),
            size,
            cluster: cluster.doing(|| "cannot choose a cluster size".to_owned())?,
            base: self.base.as_deref(),
        })
    }

    fn wanted_older<'a>(
        &'a self,
        (cluster, size): (&OsStr, &OsStr),
        image: &'a OsStr,
        base: Option<&'a OsString>,
    ) -> Result<Wanted<'a>, Failure> {
        let (Some(cluster), Some(size)) = (scaled(cluster, 10), scaled(size, 30)) else {
            let what = "too many arguments: give IMAGE [SIZE], or in the older form two plain numbers, \
                        cluster size in KiB and disk size in GiB, then IMAGE [BASE]";
            return Err(Failure::usage(what));
        };
        if self.cluster_size.is_some() || self.base.is_some() {
            let what = "the older form gives cluster size and base without option; leave out \
                        --cluster-size and --base";
            return Err(Failure::usage(what));
        }
        Ok(Wanted {
            image: Path::new(image),
            size: Some(size::virtual_size(size).map_err(Failure::usage)?),
            cluster: ClusterSize::new(cluster).map_err(|e| Failure::usage(e.to_string()))?,
            base: base.map(OsString::as_os_str),
        })
    }

    /// Before a base is touched: a refused command changes nothing.
    fn check_unit(&self, cluster: ClusterSize) -> Result<(), Failure> {
        match self.allocation_unit {
            Some(unit) if unit < cluster.bytes() => Err(Failure::usage(format!(
                "an allocation unit of {} is smaller than a cluster, which has {}",
                Bytes(unit),
                Bytes(cluster.bytes())
            ))),
            _ => Ok(()),
        }
    }
}

/// A plain number, times two to the power of `bits`; what is too large for that is too large for any image.
fn scaled(text: &OsStr, bits: u32) -> Option<u64> {
    let text = text.to_str()?;
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let number = || text.parse::<u64>().unwrap_or(u64::MAX);
    plain.then(|| number().saturating_mul(1 << bits))
}

fn create(
    path: &Path,
    new: &NewImage,
    preallocation: Preallocation,
    global: &Global,
) -> Result<Created, Failure> {
    let dirs = &global.base_dirs;
    let created = match preallocation {
        Preallocation::Off => ops::create(path, new, dirs),
        Preallocation::Metadata => {
            ops::create_filled(path, new, dirs, &mut |image| image.active().reserve_map())
        }
        Preallocation::Full => {
            let mut progress = Progress::new(0, global.quiet);
            ops::create_filled(path, new, dirs, &mut |image| {
                progress.expect(image.virtual_size().bytes());
                allocate_all(image, &mut progress)
            })
        }
    };
    let locked = matches!(&created, Err(e) if e.kind() == ErrorKind::Locked);
    let created = created.doing(|| format!("cannot create {}", path.display()));
    match &new.base {
        Some(Base::Image { path, .. }) if locked => created.map_err(|f| {
            f.advising(format!(
                "stop that process, or give a snapshot: --base {}@SNAPSHOT",
                path.display()
            ))
        }),
        _ => created,
    }
}

/// Makes all clusters data, a number of them at a time.
fn allocate_all(image: &Image, progress: &mut Progress) -> pcow_format::Result<()> {
    let cluster = image.cluster_size();
    let all = cluster.clusters_in(image.virtual_size().bytes());
    let step = (ALLOCATION_BYTES / cluster.bytes()).max(1);
    let mut buf = Vec::new();
    let mut start = 0;
    while start < all {
        let run = ClusterRange::new(start, all.min(start + step));
        image.make_writable(run, &mut buf)?;
        start = run.end;
        progress.reach(cluster.offset_of(Cluster(start)));
    }
    Ok(())
}

/// Sections in which Linux on x86 takes memory in.
const STEP_OF_GUESTS: u64 = 128 << 20;
/// Bytes that get storage in one step.
const ALLOCATION_BYTES: u64 = 64 << 20;

fn describe(path: &Path, created: Created, global: &Global) -> Result<NewImageInfo, Failure> {
    let stored = open::for_reading(path, &global.base_dirs, "cannot read back")?;
    let active = stored
        .root()
        .active_layer()
        .doing(|| "cannot read back".to_owned())?;
    // A base that was named by the user may lie where the image itself may not look.
    if let Err(e) = stored.chain(active.uuid) {
        let advice = e.advice().unwrap_or("see 'pcow-img info'");
        let what = one_line(&e);
        warn(&format!(
            "{} was created, but {what}; {advice}",
            path.display()
        ));
    }
    Ok(NewImageInfo {
        filename: path.to_owned(),
        format: "pcow",
        virtual_size: active.virtual_size,
        cluster_size: active.cluster_size,
        allocation_unit: stored.root().allocation_unit,
        copied_size: created.copied_bytes,
        sealed_base_as: created.sealed_base_as,
    })
}

impl fmt::Display for NewImageInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "created {}: {}, clusters of {}",
            self.filename.display(),
            Bytes(self.virtual_size),
            Bytes(self.cluster_size)
        )?;
        if let Some(name) = &self.sealed_base_as {
            writeln!(f, "the base's present state is now its snapshot '{name}'")?;
        }
        if self.copied_size > 0 {
            let copied = Bytes(self.copied_size);
            writeln!(
                f,
                "copied {copied} of the base, which is on another filesystem"
            )?;
        }
        Ok(())
    }
}
