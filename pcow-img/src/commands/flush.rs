// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `flush`: what was stored is durable.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::json;

use crate::cli::Global;
use crate::console::Console;
use crate::failure::{Doing, Failure};
use crate::live::Backend;
use crate::open;

/// Make durable what was stored so far
///
/// Of an image that is served its backend does it. Useful before an image is copied, after a backend that was killed.
#[derive(Debug, Args)]
pub struct Flush {
    /// The image
    image: PathBuf,
}

/// What `flush` did.
#[derive(Debug, Serialize)]
struct Done {
    /// The image's directory.
    filename: PathBuf,
}

const PURPOSE: &str = "cannot flush";

impl Flush {
    /// Flushes.
    pub fn run(self, global: &Global, console: &mut Console) -> Result<(), Failure> {
        let stored = open::for_reading(&self.image, &global.base_dirs, PURPOSE)?;
        if let Some(mut backend) = Backend::find(&self.image, &stored, global)? {
            backend.order("flush", json!({}), PURPOSE)?;
        } else {
            let context = || format!("{PURPOSE} {}", self.image.display());
            let image = open::for_writing(&self.image, &global.base_dirs, PURPOSE)?;
            image.flush().doing(context)?;
        }
        console.confirm(&Done {
            filename: self.image,
        })
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: flushed", self.filename.display())
    }
}
