// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest uses an image across boots, and the image grows by what a raw sparse file grows by.

use std::path::PathBuf;

use pcow_tests::files::{allocated_bytes, create_sparse, dig_holes};
use pcow_tests::guest::{Guest, Report};
use pcow_tests::qemu::Qemu;
use pcow_tests::scratch::Scratch;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const CLUSTER: u64 = 64 << 10;

/// What an empty image may take, whatever its size.
const MOST_WHEN_EMPTY: u64 = 4 * MIB;

/// The same guest's work on an image and on a raw sparse file.
struct Comparison {
    image: PathBuf,
    raw: PathBuf,
    size: u64,
    /// What the image took before.
    empty: u64,
}

impl Comparison {
    fn new(scratch: &Scratch, size: u64) -> Self {
        let image = scratch.image("image", size, CLUSTER);
        let raw = scratch.path("raw");
        create_sparse(&raw, size);
        let empty = allocated_bytes(&image);
        assert!(empty < MOST_WHEN_EMPTY, "{empty} bytes taken when empty");
        Self {
            image,
            raw,
            size,
            empty,
        }
    }

    /// Boots a guest with `script` on both, at once.
    fn run(&self, script: &str) -> Report {
        std::thread::scope(|scope| {
            scope.spawn(|| Guest::run(Qemu::new().raw_nvdimm(&self.raw, self.size), script));
            Guest::run_on(&self.image, Qemu::new(), script)
        })
    }

    /// The image may have grown by a quarter more than the raw file, as it allocates in larger units, and by 8 MiB.
    fn assert_grown_alike(&self) {
        let image = allocated_bytes(&self.image) - self.empty;
        // A host may allocate a raw file in pieces of up to 2 MiB, too, as it caches it; that is not to excuse the image.
        dig_holes(&self.raw);
        let raw = allocated_bytes(&self.raw);
        println!("grown by {image} bytes, a raw sparse file by {raw}");
        assert!(raw > 0);
        assert!(image <= raw + raw / 4 + 8 * MIB, "{image} against {raw}");
    }
}

/// Files of many sizes; all of them can be told by one checksum.
const WRITE_FILES: &str = r#"
mkdir /mnt/files
for file in 1 2 3 4; do dd if=/dev/urandom of=/mnt/files/$file bs=1M count=4 2>/dev/null; done
for file in $(seq 10 99); do head -c $((file * 100)) /dev/urandom > /mnt/files/$file; done
"#;
const CHECKSUM: &str = r#"
echo "files: $(cd /mnt/files && sha256sum * | sha256sum)"
umount /mnt
"#;

#[test]
fn a_guest_finds_its_files_again_on_a_128_gib_image_that_started_below_4_mib() {
    let size = 128 * GIB;
    let scratch = Scratch::new();
    let both = Comparison::new(&scratch, size);
    // What else lazy initialisation would write depends on time.
    let make = r#"
echo "size: $(($(cat /sys/block/pmem0/size) * 512))"
mkfs.ext4 -q -E lazy_journal_init=1 /dev/pmem0
mount -o noinit_itable /dev/pmem0 /mnt
"#;
    let first = both.run(&format!("{make}{WRITE_FILES}{CHECKSUM}"));
    assert_eq!(first.value("size"), size.to_string());
    both.assert_grown_alike();
    let mount = "mount -o noinit_itable /dev/pmem0 /mnt\n";
    let second = both.run(&format!("{mount}{CHECKSUM}"));
    assert_eq!(second.value("files"), first.value("files"));
    both.assert_grown_alike();
}

/// Stores to the last MiB leave a hole before it.
const STORE: &str = r#"
guest_io store /mnt/mapped 0 8M 1
guest_io store /mnt/mapped 100M 1M 2
"#;
const VERIFY: &str = r#"
guest_io verify /mnt/mapped 0 8M 1
guest_io verify /mnt/mapped 100M 1M 2
echo "mapped: $(sha256sum < /mnt/mapped)"
echo "mounted: $(grep /mnt /proc/mounts)"
"#;

#[test]
fn a_guest_finds_again_what_it_stored_through_dax_mappings() {
    let scratch = Scratch::new();
    let both = Comparison::new(&scratch, 4 * GIB);
    let make = "
ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem
mkfs.ext4 -q -b 4096 -E lazy_journal_init=1 /dev/pmem0
";
    let mount = "mount -o dax,noinit_itable /dev/pmem0 /mnt\n";
    let first = both.run(&format!(
        "{make}{mount}{WRITE_FILES}{STORE}{VERIFY}{CHECKSUM}"
    ));
    assert!(first.value("mounted").contains(",dax=always"));
    both.assert_grown_alike();
    let second = both.run(&format!("{mount}{VERIFY}{CHECKSUM}"));
    assert_eq!(second.value("mapped"), first.value("mapped"));
    assert_eq!(second.value("files"), first.value("files"));
    both.assert_grown_alike();
}
