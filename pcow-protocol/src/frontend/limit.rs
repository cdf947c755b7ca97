// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many memory mappings a backend may cause in this process (`protocol.md` section 6, rule 5).

use std::fs;

use crate::error::{Error, ErrorKind, Result};
use crate::wire::MIN_MAPPING_LIMIT;

const MAX_MAP_COUNT: &str = "/proc/sys/vm/max_map_count";
const OWN_MAPS: &str = "/proc/self/maps";

/// The limit that the user chose, else half of what the kernel allows less what the process has already.
///
/// # Errors
/// [`ErrorKind::MappingLimit`] if it is below [`MIN_MAPPING_LIMIT`].
pub(super) fn mapping_limit(chosen: Option<u32>) -> Result<u32> {
    let limit = match chosen {
        Some(limit) => limit,
        None => (kernel_limit()? / 2).saturating_sub(own_mappings()?),
    };
    if limit < MIN_MAPPING_LIMIT {
        return Err(Error::new(
            ErrorKind::MappingLimit,
            format!("mapping limit of {limit}"),
        ));
    }
    Ok(limit)
}

fn kernel_limit() -> Result<u32> {
    let text = read(MAX_MAP_COUNT)?;
    let limit: u64 = text
        .trim()
        .parse()
        .map_err(|_| Error::new(ErrorKind::Io, format!("read {MAX_MAP_COUNT}")))?;
    Ok(u32::try_from(limit).unwrap_or(u32::MAX))
}

fn own_mappings() -> Result<u32> {
    let lines = read(OWN_MAPS)?.lines().count();
    Ok(u32::try_from(lines).unwrap_or(u32::MAX))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).map_err(|e| Error::io(format!("read {path}"), e))
}
