// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `receive`: a snapshot out of a stream.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use pcow_format::ops::{self, Unfinished};
use serde::Serialize;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure};
use crate::progress::Progress;
use crate::size::Bytes;
use crate::snapshots::SnapshotInfo;

/// Receive a snapshot that 'send' has sent
///
/// A full stream makes a new image. One that was sent with --from adds its snapshot to an image whose newest snapshot is the one
/// that it continues, and whose disk was not written to since. The snapshot appears when all of it is there and durable, or not
/// at all.
///
/// What was received of a stream that is cut off is kept, as IMAGE.receive.part: 'send --resume' goes on with the word that
/// --token prints.
#[derive(Debug, Args)]
pub struct Receive {
    /// The image
    image: PathBuf,

    /// The stream; standard input if it is left out
    file: Option<PathBuf>,

    /// Name of the snapshot here [default: the one that it has there]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Print the word with which 'send --resume' sends what is missing
    #[arg(long, conflicts_with_all = ["file", "name", "abort"])]
    token: bool,

    /// Give up what was received of a stream that was cut off
    #[arg(long, conflicts_with_all = ["file", "name"])]
    abort: bool,
}

/// What `receive` received.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    /// The image's directory.
    filename: PathBuf,
    /// The snapshot, as the image has it.
    snapshot: SnapshotInfo,
    /// The name that the snapshot that it continues has at the sender's; null if the image is new.
    from: Option<String>,
    /// Bytes of data that came in.
    received_size: u64,
}

/// What is there of a stream that was cut off.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Rest {
    /// The image's directory.
    filename: PathBuf,
    /// What `send --resume` wants.
    token: String,
    /// The name of the snapshot at the sender's.
    snapshot: String,
    /// How far the disk was received.
    position: u64,
    /// Its size.
    virtual_size: u64,
    /// Whether it was given up.
    #[serde(skip)]
    given_up: bool,
}

const PURPOSE: &str = "cannot receive";

impl Receive {
    /// Receives, or looks after what was not received to its end.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let dirs = &global.base_dirs;
        let context = || format!("{PURPOSE} {}", self.image.display());
        if self.abort {
            let rest = ops::give_up_receiving(&self.image, dirs).doing(context)?;
            return console.confirm(&self.describe_rest(rest)?);
        }
        if self.token {
            let rest = ops::unfinished(&self.image, dirs).doing(context)?;
            return console.show(&self.describe_rest(rest)?);
        }
        let mut input = self.open_stream()?;
        let mut progress = Progress::new(0, global.quiet);
        let reached = &mut |at, size| {
            progress.expect(size);
            progress.reach(at);
        };
        let name = self.name.as_deref();
        let received = ops::receive(&self.image, input.as_mut(), name, dirs, reached);
        drop(progress);
        let received = received.doing(context)?;
        console.confirm(&Done {
            filename: self.image,
            snapshot: SnapshotInfo::from(&received.snapshot),
            from: received.from.map(|from| from.name),
            received_size: received.data_bytes,
        })
    }

    fn open_stream(&self) -> Result<Box<dyn Read>, Failure> {
        let Some(path) = &self.file else {
            if io::stdin().is_terminal() {
                let what = format!("{PURPOSE} a stream from a terminal");
                let advice = "give it a file, or the output of 'pcow-img send'";
                return Err(Failure::refused(what).advising(advice));
            }
            return Ok(Box::new(io::stdin().lock()));
        };
        let file = File::open(path)
            .map_err(|e| Failure::refused(format!("cannot read {}: {e}", path.display())))?;
        Ok(Box::new(BufReader::new(file)))
    }

    fn describe_rest(&self, rest: Option<Unfinished>) -> Result<Rest, Failure> {
        let rest = rest.ok_or_else(|| nothing(&self.image))?;
        Ok(Rest {
            filename: self.image.clone(),
            token: rest.token().to_string(),
            snapshot: rest.header.snapshot.name,
            position: rest.header.start,
            virtual_size: rest.header.size.bytes(),
            given_up: self.abort,
        })
    }
}

fn nothing(image: &Path) -> Failure {
    Failure::refused(format!(
        "nothing is there of a stream into {} that was cut off",
        image.display()
    ))
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (image, s) = (self.filename.display(), &self.snapshot);
        write!(f, "{image}: received snapshot {} '{}'", s.id, s.name)?;
        if let Some(from) = &self.from {
            write!(f, ", what has changed since '{from}'")?;
        }
        writeln!(f, ": {} of data", Bytes(self.received_size))
    }
}

impl fmt::Display for Rest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.given_up {
            let (image, name) = (self.filename.display(), &self.snapshot);
            return writeln!(f, "{image}: gave up what was received of snapshot '{name}'");
        }
        // The word alone: it goes into a command line.
        writeln!(f, "{}", self.token)
    }
}
