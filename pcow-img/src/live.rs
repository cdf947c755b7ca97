// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The backend that serves an image, if one does: commands find it by themselves and have it do what they cannot do beside
//! it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pcow_format::{Holder, Stored, holder};
use pcow_protocol::control::{Client, ControlError};
use serde_json::Value;

use crate::cli::Global;
use crate::failure::{Doing, Failure, Status};

/// How long a backend may take for a command that changes the image, besides what the command itself allows.
const PATIENCE: Duration = Duration::from_secs(660);
/// How long it may take to say how it is.
const QUERY: Duration = Duration::from_secs(10);

/// A backend that serves the image.
#[derive(Debug)]
pub struct Backend {
    client: Client,
    image: PathBuf,
}

impl Backend {
    /// Finds the backend that serves the image at `path`; `None` if the image is not served for writing.
    ///
    /// # Errors
    /// If it is served, and its backend cannot be reached.
    pub fn find(path: &Path, stored: &Stored, global: &Global) -> Result<Option<Self>, Failure> {
        match Client::connect(path, global.control.as_deref()) {
            Ok(Some(client)) => Ok(Some(Self {
                client,
                image: path.to_owned(),
            })),
            // A socket that came with a copy of the image's directory says nothing of this image.
            Ok(None) | Err(ControlError::Elsewhere { .. }) if global.control.is_none() => Ok(None),
            Ok(None) => Err(unreachable(
                path,
                "nobody listens on the socket of --control",
            )),
            Err(e) => match held_by(stored, path)? {
                None if global.control.is_none() => Ok(None),
                _ => Err(unreachable(path, &e.to_string())),
            },
        }
    }

    /// As [`Backend::find`], for commands that show something without it, too.
    pub fn find_to_ask(path: &Path, global: &Global) -> Option<Self> {
        let client = Client::connect(path, global.control.as_deref()).ok()??;
        Some(Self {
            client,
            image: path.to_owned(),
        })
    }

    /// Has something done.
    ///
    /// # Errors
    /// What the backend says.
    pub fn order(
        &mut self,
        command: &str,
        arguments: Value,
        purpose: &str,
    ) -> Result<Value, Failure> {
        let image = self.image.display();
        let done = self.client.execute(command, arguments, PATIENCE);
        done.map_err(|e| {
            let advice = match &e {
                ControlError::Refused { .. } => None,
                ControlError::Io(e) if is_timeout(e) => {
                    Some("it may still be done: see 'pcow-img list'".to_owned())
                }
                _ => Some("see the backend's log, and 'pcow-img list'".to_owned()),
            };
            Failure::Refused {
                message: format!("{purpose} {image}: {e}"),
                advice,
                status: Status::Failed,
            }
        })
    }

    /// Asks something; `None` if it does not answer.
    pub fn ask(&mut self, query: &str) -> Option<Value> {
        let none = serde_json::json!({});
        self.client.execute(query, none, QUERY).ok()
    }

    /// Its process, as it says.
    pub fn process(&self) -> u64 {
        self.client.process()
    }
}

/// Who has the image for writing.
///
/// # Errors
/// If the lock cannot be looked at.
pub fn held_by(stored: &Stored, path: &Path) -> Result<Option<Holder>, Failure> {
    holder(stored.directory()).doing(|| format!("cannot look at {}", path.display()))
}

fn unreachable(path: &Path, why: &str) -> Failure {
    Failure::Refused {
        message: format!("cannot reach the backend of {}: {why}", path.display()),
        advice: Some("check its --control, and who may use that socket".to_owned()),
        status: Status::Failed,
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
