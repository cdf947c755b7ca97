// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask demo`: sets everything up, then shows step by step what pcow is for.
//!
//! Every step is a command line that can be typed as it is shown, and every claim is checked.

mod stage;

use std::env;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::arch;
use crate::cache::{self, Cache};
use crate::error::{Error, Result};
use crate::guest;
use crate::packages::{self, Step};
use crate::qemu;
use crate::run::{self, Log};

use stage::{Stage, claim};

/// Arguments of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Keep the folder with the images at the end, and say where it is
    #[arg(long)]
    keep: bool,
}

/// Sets up and shows everything.
///
/// # Errors
/// Something cannot be made, a command fails, or a claim does not hold.
pub fn command(cache: &Cache, arguments: &Arguments) -> Result<()> {
    let _lock = cache.lock("demo")?;
    let folder = cache.folder("demo")?.join("stage");
    let stage = set_up(cache, &folder)?;
    let start = Instant::now();
    let shown = show(&stage);
    let keep = arguments.keep || shown.is_err();
    if keep {
        let folder = folder.display();
        println!("\nTo go on from here: cd {folder}; PATH=$PWD/bin:$PATH");
    } else {
        cache::remove_folder(&folder)?;
    }
    shown?;
    println!(
        "\nAll of this was so; it took {}.",
        run::seconds(start.elapsed())
    );
    Ok(())
}

fn set_up(cache: &Cache, folder: &Path) -> Result<Stage> {
    let log = Log::create(&cache.folder("demo")?.join("log"))?;
    packages::ensure(&[Step::Demo, Step::Qemu, Step::Guest], &log)?;
    let mut programs = build_programs(&log)?;
    programs.push(qemu::build(cache)?);
    let guest = guest::build(cache)?;
    let files = [
        ("kernel", guest.kernel.as_path()),
        ("initramfs", guest.initramfs.as_path()),
    ];
    Stage::set(folder, &programs, &files)
}

/// Builds pcow's own programs and returns where they are: beside the folder of this program's profile.
fn build_programs(log: &Log) -> Result<Vec<PathBuf>> {
    const NAMES: [&str; 2] = ["pcow-img", "pcow-backend"];
    let mut build = run::cargo(&["build", "--release"]);
    for name in NAMES {
        build.args(["--package", name]);
    }
    log.stage("building pcow-img and pcow-backend", &mut build)?;
    let running = env::current_exe().map_err(run::start_error("xtask"))?;
    let target = running.ancestors().nth(2);
    let release = target.map(|target| target.join("release"));
    let release = release.filter(|folder| NAMES.iter().all(|name| folder.join(name).exists()));
    let Some(release) = release else {
        let what = format!("cargo did not build beside {}", running.display());
        return Err(Error::Unusable(what));
    };
    Ok(NAMES.map(|name| release.join(name)).to_vec())
}

fn show(stage: &Stage) -> Result<()> {
    println!("{}", explanation());
    image_is_thin(stage)?;
    let written = guest_writes(stage)?;
    guest_reads_again(stage, &written)?;
    clone_diverges(stage)?;
    snapshot_comes_back(stage)?;
    running_guest_is_snapshotted(stage)
}

fn explanation() -> String {
    format!(
        "\nEach line after a $ was run as it is shown. The guests are Linux in {} without KVM;\n\
         'boot.sh' starts one, and what it runs stands before END.",
        arch::QEMU_BINARY
    )
}

fn title(text: &str) {
    println!("\n{text}\n");
}

/// What `names` take on disk, in KiB; a file with two names counts once.
fn disk_usage(stage: &Stage, names: &str) -> Result<Vec<u64>> {
    let text = stage.shell(&format!("du -sk {names}"))?;
    let size = |line: &str| line.split_whitespace().next()?.parse().ok();
    Ok(text.lines().filter_map(size).collect())
}

fn image_is_thin(stage: &Stage) -> Result<()> {
    title("1. An image of 128 GiB takes next to nothing");
    stage.shell("pcow-img create vm.pcow 128G")?;
    let usage = disk_usage(stage, "vm.pcow")?;
    claim(
        "it takes less than 4 MiB on disk",
        matches!(usage[..], [kib] if kib < 4096),
    )
}

const WRITE: &str = "\
echo \"size of /dev/pmem0: $(($(cat /sys/block/pmem0/size) * 512))\"
mkfs.ext4 -q -E lazy_journal_init=1 /dev/pmem0
mount -o noinit_itable /dev/pmem0 /mnt
for i in 1 2 3 4; do dd if=/dev/urandom of=/mnt/file$i bs=1M count=4 status=none; done
echo \"checksum: $(cat /mnt/file* | sha256sum)\"
";

/// Returns the checksum of what was written.
fn guest_writes(stage: &Stage) -> Result<String> {
    title("2. A guest sees all of it as memory, makes a filesystem and writes 16 MiB");
    let answers = stage.boot("vm", WRITE)?;
    let size = answers.value("size of /dev/pmem0")?;
    claim("/dev/pmem0 has 128 GiB", size.parse() == Ok(128_u64 << 30))?;
    let usage = disk_usage(stage, "vm.pcow")?;
    claim(
        "the image has grown by what was written and the filesystem's own",
        matches!(usage[..], [kib] if (16 << 10..128 << 10).contains(&kib)),
    )?;
    Ok(answers.value("checksum")?.to_owned())
}

const READ: &str = "\
mount /dev/pmem0 /mnt
echo \"checksum: $(cat /mnt/file* | sha256sum)\"
";

fn guest_reads_again(stage: &Stage, written: &str) -> Result<()> {
    title("3. Another boot, with another backend, finds it again");
    let answers = stage.boot("vm", READ)?;
    let read = answers.value("checksum")?;
    claim("the bytes are the same", read == written)
}

const MAKE_BASE: &str = "\
mkfs.ext4 -q /dev/pmem0
mount /dev/pmem0 /mnt
dd if=/dev/urandom of=/mnt/file bs=1M count=8 status=none
echo 'version 1' > /mnt/version
";

const CHANGE_CLONE: &str = "\
mount /dev/pmem0 /mnt
echo \"base: $(cat /mnt/version)\"
echo 'version 2' > /mnt/version
echo \"clone: $(cat /mnt/version)\"
";

fn clone_diverges(stage: &Stage) -> Result<()> {
    const CHECKSUM: &str = "cat golden.pcow/* | sha256sum";
    title("4. A clone of a base goes its own way");
    stage.shell("pcow-img create golden.pcow 256M")?;
    stage.boot("golden", MAKE_BASE)?;
    stage.shell("pcow-img create --base golden.pcow clone.pcow")?;
    let before = stage.shell(CHECKSUM)?;
    let answers = stage.boot("clone", CHANGE_CLONE)?;
    let seen = (answers.value("base")?, answers.value("clone")?);
    claim(
        "the clone shows the base, and then what it wrote itself",
        seen == ("version 1", "version 2"),
    )?;
    let after = stage.shell(CHECKSUM)?;
    claim("all files of the base are as they were", before == after)?;
    let usage = disk_usage(stage, "golden.pcow clone.pcow")?;
    claim(
        "the clone takes less than the base, whose files it shares",
        matches!(usage[..], [base, clone] if clone < base),
    )
}

const UPGRADE: &str = "\
mount /dev/pmem0 /mnt
rm /mnt/file
echo 'version 3' > /mnt/version
";

const LOOK: &str = "\
mount /dev/pmem0 /mnt
echo \"shown: $(cat /mnt/version), file of $(stat -c %s /mnt/file) bytes\"
";

fn snapshot_comes_back(stage: &Stage) -> Result<()> {
    title("5. A snapshot brings back what was changed and removed");
    stage.shell("pcow-img snapshot clone.pcow before-upgrade")?;
    stage.boot("clone", UPGRADE)?;
    stage.shell("pcow-img rollback clone.pcow before-upgrade")?;
    let answers = stage.boot("clone", LOOK)?;
    claim(
        "the guest sees the state of the snapshot",
        answers.value("shown")? == "version 2, file of 8388608 bytes",
    )?;
    let list = stage.shell("pcow-img list clone.pcow")?;
    claim(
        "what the rollback replaced can be brought back, too",
        list.contains("before-rollback-"),
    )
}

const WORK: &str = "\
mount /dev/pmem0 /mnt
echo 'Monday' > /mnt/day
sync
echo \"written: $(cat /mnt/day)\"
read -r line
echo 'Tuesday' > /mnt/day
rm /mnt/file
sync
echo \"changed: $(cat /mnt/day)\"
read -r line
echo \"still: $(cat /mnt/day)\"
";

const LOOK_BACK: &str = "\
mount /dev/pmem0 /mnt
echo \"shown: $(cat /mnt/day), file of $(stat -c %s /mnt/file) bytes\"
";

fn running_guest_is_snapshotted(stage: &Stage) -> Result<()> {
    title(
        "6. A snapshot is taken of a guest that runs, and a clone of it shows the past beside it",
    );
    stage.shell("mkfifo keyboard")?;
    let mut guest = stage.boot_in_background("clone", "keyboard", WORK)?;
    guest.wait_for("written")?;
    stage.shell("pcow-img snapshot clone.pcow monday")?;
    stage.shell("echo 'go on' > keyboard")?;
    guest.wait_for("changed")?;
    stage.shell("pcow-img create --base clone.pcow@monday past.pcow")?;
    let past = stage.boot("past", LOOK_BACK)?;
    claim(
        "the clone shows what there was when the snapshot was taken",
        past.value("shown")? == "Monday, file of 8388608 bytes",
    )?;
    stage.shell("echo 'go on' > keyboard")?;
    let present = guest.finish()?;
    claim(
        "the guest has gone on, and has what it wrote afterwards",
        present.value("still")? == "Tuesday",
    )
}
