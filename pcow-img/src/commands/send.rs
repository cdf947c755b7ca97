// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `send`: a snapshot as a stream.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use pcow_format::Stored;
use pcow_format::root::Snapshot;
use pcow_format::stream::{self, Sending, Sent, Token};
use serde::Serialize;

use crate::base;
use crate::cli::Global;
use crate::console::{Console, Form};
use crate::failure::{Doing, Failure};
use crate::open;
use crate::progress::Progress;
use crate::size::Bytes;
use crate::snapshots::SnapshotInfo;
use crate::temporary::{Temporary, cannot_write};

/// Send a snapshot as a stream, for 'receive'
///
/// The stream goes to standard output, unless -o says where. It has all that the snapshot shows, or with --from what it shows
/// otherwise than an earlier one, which the receiver must have. Holes, and what both have in common, are neither read nor sent.
/// It does not matter whether the image is served: layers of snapshots do not change. A base is sent like the rest.
///
/// What was cut off goes on with --resume and the word that 'receive --token' prints at the other end.
#[derive(Debug, Args)]
pub struct Send {
    /// What to send: IMAGE@SNAPSHOT; with --resume just IMAGE
    source: OsString,

    /// The snapshot that the receiver has: only what has changed since is sent
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "resume")]
    from: Option<String>,

    /// Send what is missing of a stream that was cut off
    #[arg(long, value_name = "TOKEN", value_parser = token)]
    resume: Option<Token>,

    /// Write the stream into a new file
    #[arg(short = 'o', long = "file", value_name = "FILE")]
    file: Option<PathBuf>,
}

/// What `send` wrote into a file.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    /// The image's directory.
    filename: PathBuf,
    /// The snapshot that was sent.
    snapshot: SnapshotInfo,
    /// The name of the snapshot that the stream continues, or null.
    from: Option<String>,
    /// The file.
    stream: PathBuf,
    /// Its length in bytes.
    stream_size: u64,
    /// Bytes of data in it.
    data_size: u64,
}

const PURPOSE: &str = "cannot send";

fn token(text: &str) -> Result<Token, String> {
    text.parse().map_err(|e: pcow_format::Error| e.to_string())
}

impl Send {
    /// Sends.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let (path, snapshot) = base::split(&self.source)?;
        self.check_call(snapshot, console.form())?;
        let stored = open::for_reading(path, &global.base_dirs, PURPOSE)?;
        let context = || format!("{PURPOSE} {}", self.source.display());
        let sending = match (snapshot, &self.resume) {
            (_, Some(token)) => Sending::rest(&stored, token),
            (snapshot, None) => {
                Sending::of(&stored, snapshot.unwrap_or_default(), self.from.as_deref())
            }
        };
        let sending = sending.doing(context)?;
        let mut progress = Progress::new(sending.header().size.bytes(), global.quiet);
        let mut write = |out: &mut dyn Write| {
            let sent = sending.write(out, &mut |at| progress.reach(at));
            sent.doing(context)
        };
        let Some(file) = &self.file else {
            write(console.writer())?;
            return console.finish();
        };
        let sent = into_file(file, &mut write)?;
        drop(progress);
        console.confirm(&describe(path, &stored, sending.header(), file, sent)?)
    }

    fn check_call(&self, snapshot: Option<&str>, form: Form) -> Result<(), Failure> {
        match (snapshot, &self.resume) {
            (None, None) => {
                let advice = "what the disk shows now is sent by taking a snapshot first";
                return Err(
                    Failure::usage("say which snapshot to send: IMAGE@SNAPSHOT").advising(advice)
                );
            }
            (Some(_), Some(_)) => {
                let what = "--resume says which snapshot is sent; leave out @SNAPSHOT";
                return Err(Failure::usage(what));
            }
            _ => {}
        }
        if self.file.is_some() {
            return Ok(());
        }
        if form == Form::Json {
            let what = "the stream goes to standard output, and so would the JSON; give -o FILE";
            return Err(Failure::usage(what));
        }
        if io::stdout().is_terminal() {
            let what = format!("{PURPOSE} a stream to a terminal");
            let advice = "send it into a pipe, or into a file with -o";
            return Err(Failure::refused(what).advising(advice));
        }
        Ok(())
    }
}

/// The file appears when it is complete, or not at all.
fn into_file(
    path: &Path,
    write: &mut dyn FnMut(&mut dyn Write) -> Result<Sent, Failure>,
) -> Result<Sent, Failure> {
    if path.symlink_metadata().is_ok() {
        let what = format!("{PURPOSE}: {} exists already", path.display());
        return Err(Failure::refused(what).advising("choose another name"));
    }
    let part = Temporary::beside(path);
    let mut file = File::create_new(&part.0).map_err(|e| cannot_write(path, &e))?;
    let sent = write(&mut file)?;
    part.settle(path)?;
    Ok(sent)
}

fn describe(
    path: &Path,
    stored: &Stored,
    header: &stream::Header,
    file: &Path,
    sent: Sent,
) -> Result<Done, Failure> {
    let is_it = |s: &&Snapshot| s.uuid == header.snapshot.uuid;
    let snapshot = stored.root().snapshots.iter().find(is_it);
    let snapshot = snapshot.ok_or_else(|| Failure::refused(PURPOSE.to_owned()))?;
    Ok(Done {
        filename: path.to_owned(),
        snapshot: SnapshotInfo::from(snapshot),
        from: header.from.as_ref().map(|from| from.name.clone()),
        stream: file.to_owned(),
        stream_size: sent.stream_bytes,
        data_size: sent.data_bytes,
    })
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (image, s) = (self.filename.display(), &self.snapshot);
        write!(f, "{image}: sent snapshot {} '{}'", s.id, s.name)?;
        if let Some(from) = &self.from {
            write!(f, ", what has changed since '{from}'")?;
        }
        let (file, data) = (self.stream.display(), Bytes(self.data_size));
        writeln!(f, ": {data} of data, in {file}")
    }
}
