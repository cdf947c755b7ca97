// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image's directory of which the root is anything, and the maps of its layers hold any words.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::support::{look_at, scratch, sign_root};
use pcow_format::map::{Header, WORDS_OFFSET, file_bytes};
use pcow_format::root::{Layer, Root};
use pcow_format::{LOCK_FILE, data_name, map_name};

/// Layers that get files.
const LAYERS: usize = 6;

/// Files that fit what the root says of a layer, with words of the fuzzer's in the map.
fn make_files(dir: &Path, image: uuid::Uuid, layer: &Layer, words: &[u8]) -> std::io::Result<()> {
    let (Ok(size), Ok(cluster)) = (layer.size(), layer.cluster()) else {
        return Ok(());
    };
    let map = File::create(dir.join(map_name(layer.uuid)))?;
    let bytes = file_bytes(size, cluster);
    map.set_len(bytes)?;
    let header = Header {
        layer: layer.uuid,
        parent: layer.parent,
        image,
        size,
        cluster,
        clip: layer.clip,
    };
    map.write_all_at(&header.encode(), 0)?;
    let room = usize::try_from(bytes - WORDS_OFFSET).unwrap_or(usize::MAX);
    map.write_all_at(&words[..words.len().min(room)], WORDS_OFFSET)?;
    File::create(dir.join(data_name(layer.uuid)))?.set_len(size.bytes())
}

/// Tries an input; `false` if it is not one for this target.
#[must_use]
pub fn run(data: &[u8]) -> bool {
    let Some((first, rest)) = data.split_first_chunk::<3>() else {
        return false;
    };
    let length = usize::from(u16::from_le_bytes([first[1], first[2]]));
    let (text, words) = rest.split_at(length.min(rest.len()));
    let text = if first[0] & 1 == 0 {
        sign_root(text)
    } else {
        text.to_vec()
    };
    let dir = scratch();
    std::fs::write(dir.path().join("image.json"), &text).expect("the root is written");
    File::create(dir.path().join(LOCK_FILE)).expect("a lock");
    if let Ok(root) = Root::decode(&text) {
        let again = Root::decode(&root.encode().expect("a root that was read can be written"));
        assert_eq!(again.expect("its own").layers, root.layers);
        for layer in root.layers.iter().take(LAYERS) {
            make_files(dir.path(), root.uuid, layer, words).expect("a layer's files");
        }
    }
    look_at(dir.path());
    true
}
