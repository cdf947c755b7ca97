// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `map`: which bytes of the disk are data, and in which file they are.

use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;

use clap::Args;
use pcow_format::{Error, ErrorKind, Stored};
use serde::Serialize;
use uuid::Uuid;

use crate::cli::Global;
use crate::console::{Console, Form};
use crate::failure::{Doing, Failure};
use crate::layers;
use crate::open;

/// Show which bytes of the disk are data, and in which file they are
///
/// A byte of the disk is at the same offset of its file. What is not listed reads zero.
#[derive(Debug, Args)]
pub struct Map {
    /// The image
    image: PathBuf,

    /// Show a snapshot (name or number) instead of the present state
    #[arg(long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
}

/// A piece of the disk. The output is an array of these, as that of `qemu-img map --output=json`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Piece<'a> {
    /// First byte.
    start: u64,
    /// How many bytes.
    length: u64,
    /// The layer that has it, counted from the top, 0; if none has it, the lowest one.
    depth: usize,
    /// Whether a layer has it.
    present: bool,
    /// Whether it is known to read zero.
    zero: bool,
    /// Whether it is in a file.
    data: bool,
    /// Where in the file; only with `data`.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    /// Which file; only with `data`.
    #[serde(skip_serializing_if = "Option::is_none")]
    filename: Option<&'a str>,
}

const PURPOSE: &str = "cannot map";

impl Map {
    /// Prints the pieces.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let context = || format!("{PURPOSE} {}", self.image.display());
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        let top = match &self.snapshot {
            Some(name) => stored.root().snapshot(name).doing(context)?.layer,
            None => stored.root().active,
        };
        let chain = stored.root().chain(top).doing(context)?;
        let file = |layer| layers::data_file(layer, &self.image);
        let files: Vec<_> = chain
            .into_iter()
            .map(|l| file(l).to_string_lossy().into_owned())
            .collect();
        let mut printer = Printer::new(console, &files);
        let walked = printer.walk(&stored, top);
        printer.end(walked.doing(context))?;
        console.finish()
    }
}

/// Prints pieces as they are found: there may be more than memory holds.
struct Printer<'a> {
    form: Form,
    out: &'a mut dyn Write,
    files: &'a [String],
    any: bool,
    /// Why the output could not be written.
    broken: Option<io::Error>,
}

impl<'a> Printer<'a> {
    fn new(console: &'a mut Console, files: &'a [String]) -> Self {
        Self {
            form: console.form(),
            out: console.writer(),
            files,
            any: false,
            broken: None,
        }
    }

    fn walk(&mut self, stored: &Stored, top: Uuid) -> pcow_format::Result<()> {
        stored.for_each_extent(top, &mut |bytes, depth| {
            self.print(bytes, depth).map_err(|e| {
                self.broken = Some(e);
                Error::new(ErrorKind::Io, "cannot write the output")
            })
        })
    }

    fn print(&mut self, bytes: Range<u64>, depth: Option<usize>) -> io::Result<()> {
        match self.form {
            Form::Human => self.print_line(&bytes, depth),
            Form::Json => self.print_object(&bytes, depth),
        }
    }

    fn print_line(&mut self, bytes: &Range<u64>, depth: Option<usize>) -> io::Result<()> {
        let Some(depth) = depth else { return Ok(()) };
        self.begin()?;
        let (start, length) = (bytes.start, bytes.end - bytes.start);
        let file = &self.files[depth];
        writeln!(self.out, "{start:<#16x}{length:<#16x}{depth:<8}{file}")
    }

    fn print_object(&mut self, bytes: &Range<u64>, depth: Option<usize>) -> io::Result<()> {
        let piece = Piece {
            start: bytes.start,
            length: bytes.end - bytes.start,
            depth: depth.unwrap_or(self.files.len() - 1),
            present: depth.is_some(),
            zero: depth.is_none(),
            data: depth.is_some(),
            offset: depth.map(|_| bytes.start),
            filename: depth.map(|d| self.files[d].as_str()),
        };
        if self.any {
            writeln!(self.out, ",")?;
        }
        self.begin()?;
        serde_json::to_writer(&mut self.out, &piece).map_err(io::Error::from)
    }

    /// What stands before the first piece. Not written before there is one: a refusal prints nothing.
    fn begin(&mut self) -> io::Result<()> {
        match (std::mem::replace(&mut self.any, true), self.form) {
            (true, _) => Ok(()),
            (false, Form::Json) => write!(self.out, "["),
            (false, Form::Human) => {
                writeln!(
                    self.out,
                    "{:<16}{:<16}{:<8}File",
                    "Offset", "Length", "Depth"
                )
            }
        }
    }

    /// Ends the output; an output that could not be written explains any failure.
    fn end(mut self, walked: Result<(), Failure>) -> Result<(), Failure> {
        if let Some(e) = self.broken {
            return Err(e.into());
        }
        walked?;
        self.begin()?;
        if self.form == Form::Json {
            writeln!(self.out, "]")?;
        }
        Ok(())
    }
}
