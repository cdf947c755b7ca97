// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flushes of a guest with a virtio-pmem device: they reach the disk where the image is in the page cache, or fail.

use std::path::Path;

use pcow_format::medium::real::RealDirectory;
use pcow_format::{Environment, Image};
use pcow_tests::backend::Backend;
use pcow_tests::guest::Guest;
use pcow_tests::loop_mount::LoopMount;
use pcow_tests::qemu::Qemu;
use pcow_tests::scratch::Scratch;
use rustix::process::Signal;
use uuid::Uuid;

pub const MIB: u64 = 1 << 20;
pub const CLUSTER: u64 = 64 << 10;
/// The backend does not flush by itself.
pub const NO_INTERVAL: &[&str] = &["--flush-interval", "0"];

/// What [`STORE`] stores, over and over.
const RECORD: &[u8] = b"stored by the guest\n";
const RECORDS_AT: u64 = 250 * MIB;
/// Fills a cluster at [`RECORDS_AT`], and flushes nothing.
pub const STORE: &str = "\
yes 'stored by the guest' | dd of=/dev/pmem0 bs=64K count=1 seek=4000 iflag=fullblock oflag=direct 2>/dev/null
";

/// What an image holds where [`STORE`] stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    Zeros,
    Records,
}

impl Held {
    pub fn by(image: &Image) -> Self {
        let mut bytes = vec![0; usize::try_from(CLUSTER).unwrap()];
        image.read(RECORDS_AT, &mut bytes).unwrap();
        if bytes.iter().all(|byte| *byte == 0) {
            return Self::Zeros;
        }
        assert!(bytes.iter().eq(RECORD.iter().cycle().take(bytes.len())));
        Self::Records
    }
}

/// Adds the memory of `backend` as a virtio-pmem device.
pub fn with_pmem(backend: &Backend) -> Qemu {
    Qemu::new()
        .chardev(backend.socket())
        .args(&["-object", "memory-backend-pcow,id=pm,chardev=c0"])
        .args(&["-device", "virtio-pmem-pci,memdev=pm,id=vp"])
}

/// The image as another boot of the machine finds it: what was not flushed is gone.
pub fn open_in_another_boot(path: &Path) -> Image {
    let environment = Environment {
        boot: Uuid::from_u128(1),
        ..Environment::for_image(path, &[]).unwrap()
    };
    let directory = RealDirectory::open(path).unwrap();
    Image::load(directory, environment).unwrap()
}

#[test]
fn what_a_guest_has_flushed_outlives_a_power_loss_and_the_rest_does_not() {
    let scratch = Scratch::new();
    let image = scratch.image("image", 256 * MIB, CLUSTER);
    let mut backend = Backend::start(&image, NO_INTERVAL);
    let script = format!(
        "
mkfs.ext4 -q -b 4096 -E lazy_itable_init=0 /dev/pmem0
mount /dev/pmem0 /mnt
dd if=/dev/urandom of=/mnt/file bs=1M count=8 conv=fsync 2>/dev/null
echo \"sum: $(md5sum </mnt/file)\"
umount /mnt
sync
{STORE}
echo stored
read -r line
"
    );
    let mut guest = Guest::boot(with_pmem(&backend), &script);
    guest.wait_for("stored\n");
    let console = guest.qemu().serial();
    // First the backend, which would flush when its frontend leaves.
    backend.signal(Signal::KILL);
    backend.wait();
    drop(guest);
    let in_this_boot = Image::open(&image, &[]).unwrap();
    assert_eq!(Held::by(&in_this_boot), Held::Records);
    drop(in_this_boot);
    let after = open_in_another_boot(&image);
    assert!(after.recovery().discarded_clusters > 0, "all was flushed");
    assert_eq!(Held::by(&after), Held::Zeros);
    drop(after);

    let backend = Backend::start(&image, NO_INTERVAL);
    let again = "
mount /dev/pmem0 /mnt
echo \"sum: $(md5sum </mnt/file)\"
";
    let report = Guest::run(with_pmem(&backend), again);
    let sum = console.lines().find_map(|l| l.strip_prefix("sum: "));
    assert_eq!(Some(report.value("sum")), sum);
}

/// The disk fails as disks do: a loop device whose file finds no space.
#[test]
fn a_flush_that_fails_fails_in_the_guest() {
    let disk = LoopMount::ext4_on_tmpfs(512, 64);
    let images = Scratch::below(&disk.path());
    let image = images.image("image", 256 * MIB, CLUSTER);
    let backend = Backend::start(&image, NO_INTERVAL);
    let script = "
dd if=/dev/urandom of=/dev/pmem0 bs=1M count=8 conv=fsync 2>/dev/null
echo flushed
read -r line
if dd if=/dev/urandom of=/dev/pmem0 bs=1M count=8 seek=8 conv=fsync; then
    echo 'the flush succeeds'
    exit 1
fi
if dd if=/dev/urandom of=/dev/pmem0 bs=1M count=1 conv=fsync; then
    echo 'the next flush succeeds'
    exit 1
fi
";
    let mut guest = Guest::boot(with_pmem(&backend), script);
    guest.wait_for("flushed\n");
    disk.take_space_of_device();
    guest.qemu().send_line("go");
    guest.finish();
    backend.wait_for_log("cannot flush layer");
}
