// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image whose active map is anything.

use std::sync::OnceLock;

use crate::support::{image, look_at, scratch, sign_map};
use pcow_format::map::{HEADER_BYTES, Header, TAG_BYTES, Tag};
use pcow_format::{Stored, map_name};

static IMAGE: OnceLock<(tempfile::TempDir, std::path::PathBuf, Vec<u8>)> = OnceLock::new();

/// Tries an input; `false` if it is not one for this target.
#[must_use]
pub fn run(data: &[u8]) -> bool {
    let Some((first, map)) = data.split_first() else {
        return false;
    };
    let (_, path, root) = IMAGE.get_or_init(|| {
        let dir = scratch();
        let path = image(dir.path());
        let root = std::fs::read(path.join("image.json")).expect("the root");
        (dir, path, root)
    });
    let mut map = map.to_vec();
    // Bit 0: with a right checksum. Bit 1: as long as it must be.
    if first & 1 != 0 {
        sign_map(&mut map);
    }
    if first & 2 != 0 {
        map.resize(8192, 0);
    }
    if let Some(raw) = map.first_chunk::<HEADER_BYTES>()
        && let Ok(header) = Header::decode(raw)
    {
        assert_eq!(Header::decode(&header.encode()).expect("its own"), header);
    }
    if let Some(raw) = map.first_chunk::<TAG_BYTES>() {
        let _ = Tag::decode(raw);
    }
    // What a run before has changed is undone.
    std::fs::write(path.join("image.json"), root).expect("the root is written");
    let active = Stored::open(path, &[]).expect("a sound root").root().active;
    std::fs::write(path.join(map_name(active)), &map).expect("the map is written");
    let _ = std::fs::remove_file(path.join("flush-failed"));
    look_at(path);
    true
}
