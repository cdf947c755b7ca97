// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot as it is printed.

use pcow_format::root::Snapshot;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

/// A snapshot. The first four fields are those of `qemu-img`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Its number, as text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since the epoch.
    pub date_sec: u64,
    /// Nanoseconds of that time; not recorded, so 0.
    pub date_nsec: u32,
    /// UUID of the layer that it shows.
    pub layer: Uuid,
    /// Its own UUID, the same in every image that has received it.
    pub uuid: Uuid,
}

impl SnapshotInfo {
    /// From what a backend says of a snapshot that it has taken.
    pub fn from_backend(answer: &Value) -> Option<Self> {
        let snapshot = &answer["snapshot"];
        Some(Self {
            id: snapshot["number"].as_u64()?.to_string(),
            name: snapshot["name"].as_str()?.to_owned(),
            date_sec: snapshot["time"].as_u64()?,
            date_nsec: 0,
            layer: Uuid::parse_str(answer["layer"].as_str()?).ok()?,
            uuid: Uuid::parse_str(snapshot["uuid"].as_str()?).ok()?,
        })
    }
}

impl From<&Snapshot> for SnapshotInfo {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            id: snapshot.number.to_string(),
            name: snapshot.name.clone(),
            date_sec: snapshot.time,
            date_nsec: 0,
            layer: snapshot.layer,
            uuid: snapshot.uuid,
        }
    }
}
