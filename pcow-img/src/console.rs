// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Standard output in the form that the user asked for. Knows no image.

use std::fmt::Display;
use std::io::{self, BufWriter, StdoutLock, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::failure::Failure;

/// The form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// Text for people; may change between versions
    Human,
    /// JSON for programs; fields are only ever added
    Json,
}

/// Standard output.
#[derive(Debug)]
pub struct Console {
    form: Form,
    quiet: bool,
    out: BufWriter<StdoutLock<'static>>,
}

impl Console {
    /// The process's standard output.
    pub fn new(form: Form, quiet: bool) -> Self {
        let out = BufWriter::new(io::stdout().lock());
        Self { form, quiet, out }
    }

    /// The form of the output.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Where to write what is too long to be collected first; `finish` it.
    pub fn writer(&mut self) -> &mut dyn Write {
        &mut self.out
    }

    /// Writes out what is still in the buffer.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn finish(&mut self) -> Result<(), Failure> {
        Ok(self.out.flush()?)
    }

    /// Shows what was asked for.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn show(&mut self, answer: &(impl Serialize + Display)) -> Result<(), Failure> {
        match self.form {
            Form::Human => write!(self.out, "{answer}")?,
            Form::Json => {
                serde_json::to_writer_pretty(&mut self.out, answer).map_err(io::Error::from)?;
                writeln!(self.out)?;
            }
        }
        self.finish()
    }

    /// Says what was done; silent with `--quiet`, unless a program wants to know.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn confirm(&mut self, done: &(impl Serialize + Display)) -> Result<(), Failure> {
        if self.quiet && self.form == Form::Human {
            return Ok(());
        }
        self.show(done)
    }
}

/// Says something that the user should know although the command goes on.
pub fn warn(text: &str) {
    eprintln!("pcow-img: warning: {text}");
}
