// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A backend that is lost and comes back, under a guest that must notice no more than a pause.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pcow_tests::backend::Backend;
use pcow_tests::files::allocated_bytes;
use pcow_tests::guest::Guest;
use pcow_tests::pattern;
use pcow_tests::qemu::{PATIENCE, Qemu};
use pcow_tests::qmp::Qmp;
use pcow_tests::scratch::Scratch;
use pcow_tests::waiting::wait_until;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

/// No more arguments than a backend needs.
const NONE: &[&str] = &[];

/// How often the backend is killed under a filesystem; `PCOW_GUEST_KILLS` for the long form.
fn kills() -> u64 {
    let count = std::env::var("PCOW_GUEST_KILLS");
    count.map_or(5, |count| count.parse().unwrap())
}

/// Writes and checks files on a DAX filesystem, round after round, and says so. Each lies in memory that nobody has
/// touched. After every second round, the first one and the last one too, it waits for a line. The last 16 are checked
/// again after the filesystem was mounted anew.
fn filesystem_load(rounds: u64) -> String {
    format!(
        "
ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem
mkfs.ext4 -q -b 4096 /dev/pmem0
mount -o dax /dev/pmem0 /mnt
i=0
while [ $i -lt {rounds} ]; do
    guest_io store /mnt/file$i 0 8M $i
    guest_io verify /mnt/file$i 0 8M $i
    echo round $i
    i=$((i + 1))
    if [ $((i % 2)) = 1 ]; then read -r line; fi
done
umount /mnt
mount -o dax /dev/pmem0 /mnt
while [ $i -gt 0 ] && [ $i -gt $(({rounds} - 16)) ]; do
    i=$((i - 1))
    guest_io verify /mnt/file$i 0 8M $i
done
umount /mnt
"
    )
}

#[test]
fn a_filesystem_whose_backend_is_killed_over_and_over_keeps_every_byte() {
    let scratch = Scratch::new();
    let rounds = 2 * kills() + 1;
    let size = (256 * MIB + rounds * 8 * MIB).next_multiple_of(128 * MIB);
    let image = scratch.image("image", size, CLUSTER);
    let mut backend = Backend::start(&image, NONE);
    let script = filesystem_load(rounds);
    let mut guest = Guest::boot(Qemu::new().pcow(&backend), &script);
    for kill in 0..kills() {
        guest.wait_for(&format!("round {}\n", 2 * kill));
        // In the midst of a file, so that it is missed at once.
        let before = allocated_bytes(&image);
        guest.qemu().send_line("go on");
        wait_until("the next file grows", PATIENCE, || {
            allocated_bytes(&image) >= before + MIB
        });
        backend.kill();
        backend.restart(&image, NONE);
    }
    // It has to be there for that, so it waits once more.
    let met = Met::all(&mut guest);
    guest.qemu().send_line("go on");
    guest.finish();
    backend.wait_for_log("frontend detached");
    assert!(backend.terminate().success(), "{:#?}", backend.log());
    let again = format!(
        "
mount -o dax /dev/pmem0 /mnt
guest_io verify /mnt/file{last} 0 8M {last}
umount /mnt
",
        last = rounds - 1,
    );
    Guest::run_on(&image, Qemu::new(), &again);
    println!("{met}");
    assert!(met.waited * 2 >= met.kills, "{met}");
}

/// What the kills of a backend have met, as QEMU tells.
#[derive(Debug, Default)]
struct Met {
    kills: u64,
    /// Those at which an access waited for the next backend.
    waited: u64,
    /// The longest time that one did, in ms.
    longest: u64,
}

impl Met {
    /// Waits until a backend serves after the last kill.
    fn all(guest: &mut Guest) -> Self {
        let mut met = Self::default();
        wait_until("a backend serves after the last kill", PATIENCE, || {
            met = Self::so_far(&guest.qemu().messages());
            met.kills == kills()
        });
        met
    }

    fn so_far(messages: &str) -> Self {
        let mut met = Self::default();
        for line in messages.lines() {
            let Some((_, rest)) = line.split_once("an access has waited for ") else {
                continue;
            };
            let waited = rest.split(' ').next().unwrap().parse().unwrap();
            met.kills += 1;
            met.waited += u64::from(waited > 0);
            met.longest = met.longest.max(waited);
        }
        met
    }
}

impl std::fmt::Display for Met {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} kills under a guest, {} of them with an access that waited, {} ms at most",
            self.kills, self.waited, self.longest
        )
    }
}

/// A guest whose persistent memory is one device, that touches what nobody has touched before when it is told to.
const TOUCH: &str = "
[ -e /dev/dax0.0 ] || ndctl create-namespace -f -e namespace0.0 -m devdax -M mem
guest_io store /dev/dax0.0 0 2M 3
echo ready
read -r line
echo going
guest_io store /dev/dax0.0 64M 2M 1
guest_io verify /dev/dax0.0 64M 2M 1
echo gone
read -r line
";

/// A guest that will touch what nobody has touched before.
struct Ready {
    guest: Guest,
    backend: Backend,
    image: PathBuf,
    _scratch: Scratch,
}

impl Ready {
    fn new(object: &str) -> Self {
        let scratch = Scratch::new();
        let image = scratch.image("image", 256 * MIB, CLUSTER);
        let backend = Backend::start(&image, NONE);
        let machine = Qemu::new()
            .chardev(backend.socket())
            .args(&[
                "-object",
                &format!("memory-backend-pcow,id=pm,chardev=c0{object}"),
            ])
            .args(&["-device", "nvdimm,id=nv,memdev=pm"]);
        let mut guest = Guest::boot(machine, TOUCH);
        guest.wait_for("ready\n");
        Self {
            guest,
            backend,
            image,
            _scratch: scratch,
        }
    }
}

/// A guest whose only vCPU waits for memory, because its backend was killed.
struct Waiting {
    guest: Guest,
    backend: Backend,
    image: PathBuf,
    _scratch: Scratch,
}

impl Waiting {
    fn new(object: &str) -> Self {
        let Ready {
            mut guest,
            mut backend,
            image,
            _scratch,
        } = Ready::new(object);
        backend.kill();
        guest
            .qemu()
            .wait_for_message("the session with the backend has ended");
        guest.qemu().send_line("go");
        guest.wait_for("going\n");
        guest
            .qemu()
            .wait_for_message("an access waits for a backend");
        Self {
            guest,
            backend,
            image,
            _scratch,
        }
    }

    fn goes_on_with_a_backend(mut self) {
        self.backend.restart(&self.image, NONE);
        self.ends_well();
    }

    /// What waited has gone on, and read what it had stored.
    fn ends_well(mut self) {
        self.guest.wait_for("gone\n");
        self.guest.qemu().send_line("end");
        self.guest.finish();
    }
}

fn property(qmp: &mut Qmp, name: &str) -> Value {
    let get = json!({ "path": "/objects/pm", "property": name });
    qmp.execute("qom-get", &get).unwrap()
}

fn status(qmp: &mut Qmp) -> Value {
    qmp.command("query-status")["status"].take()
}

fn monitor_line(qmp: &mut Qmp, line: &str) -> String {
    let said = qmp.execute("human-monitor-command", &json!({ "command-line": line }));
    said.unwrap().as_str().unwrap().to_owned()
}

#[test]
fn the_monitor_says_what_waits_and_refuses_what_cannot_be() {
    let mut waiting = Waiting::new("");
    let mut qmp = waiting.guest.qemu().qmp();
    assert_eq!(status(&mut qmp), json!("running"));
    assert_eq!(property(&mut qmp, "attached"), json!(false));
    assert!(property(&mut qmp, "detached-ms").as_u64() > Some(0));
    wait_until("the access has waited", PATIENCE, || {
        property(&mut qmp, "waiting-ms").as_u64() > Some(0)
    });
    let error = property(&mut qmp, "last-error");
    assert!(
        error.as_str().unwrap().contains("cannot connect"),
        "{error}"
    );
    for command in [
        "info mtree",
        "info memory-devices",
        "info memdev",
        "info cpus",
    ] {
        assert!(!monitor_line(&mut qmp, command).is_empty());
    }
    let said = monitor_line(&mut qmp, "savevm state");
    assert!(
        said.contains("memory-backend-pcow cannot be migrated"),
        "{said}"
    );
    let said = qmp
        .execute("object-del", &json!({ "id": "pm" }))
        .unwrap_err();
    assert!(said.contains("in use"), "{said}");
    let said = qmp.execute("device_del", &json!({ "id": "nv" }));
    let said = said.unwrap_err();
    assert!(said.contains("unplug is not supported"), "{said}");
    waiting.goes_on_with_a_backend();
}

/// The next event of the memory, and for how long there has been no backend and an access has waited, in ms.
fn change(qmp: &mut Qmp) -> (String, u64, u64) {
    let data = qmp.wait_for_event("MEMORY_BACKEND_PCOW_CHANGE");
    assert_eq!(data["id"], "pm");
    assert_eq!(data["qom-path"], "/objects/pm");
    let ms = |name: &str| data[name].as_u64().unwrap();
    let change = data["change"].as_str().unwrap().to_owned();
    (change, ms("detached-ms"), ms("waiting-ms"))
}

#[test]
fn events_and_properties_say_that_memory_waits_and_for_how_long() {
    let mut ready = Ready::new("");
    let mut qmp = ready.guest.qemu().qmp();
    for (name, value) in [
        ("attached", json!(true)),
        ("attachments", json!(1)),
        ("detached-ms", json!(0)),
        ("waiting-ms", json!(0)),
        ("last-error", json!("")),
    ] {
        assert_eq!(property(&mut qmp, name), value, "{name}");
    }
    let killed = Instant::now();
    ready.backend.kill();
    let (what, _, waiting) = change(&mut qmp);
    assert_eq!((what.as_str(), waiting), ("detached", 0));
    assert_eq!(property(&mut qmp, "waiting-ms"), json!(0), "nobody waits");
    ready.guest.qemu().send_line("go");
    assert_eq!(change(&mut qmp).0, "waiting");
    // Both clocks run, at the pace of time.
    let ms = |qmp: &mut Qmp, name: &str| property(qmp, name).as_u64().unwrap();
    let (seen, began) = (ms(&mut qmp, "waiting-ms"), Instant::now());
    wait_until("it waits for longer", PATIENCE, || {
        ms(&mut qmp, "waiting-ms") > seen + 500
    });
    assert!(began.elapsed() >= Duration::from_millis(500));
    let (detached, waiting) = (ms(&mut qmp, "detached-ms"), ms(&mut qmp, "waiting-ms"));
    assert!(detached >= waiting - 1, "{detached} and {waiting} ms");
    assert!(u128::from(waiting) <= killed.elapsed().as_millis());
    ready.backend.restart(&ready.image, NONE);
    let (what, late_detached, late_waiting) = change(&mut qmp);
    assert_eq!(what, "attached");
    assert!(late_detached >= detached && late_waiting >= waiting);
    assert!(u128::from(late_detached) <= killed.elapsed().as_millis() + 1);
    for (name, value) in [
        ("attached", json!(true)),
        ("attachments", json!(2)),
        ("detached-ms", json!(0)),
        ("waiting-ms", json!(0)),
    ] {
        assert_eq!(property(&mut qmp, name), value, "{name}");
    }
    ready.guest.wait_for("gone\n");
    ready.guest.qemu().send_line("end");
    ready.guest.finish();
}

#[test]
fn a_machine_whose_vcpu_waits_can_be_stopped_and_continued() {
    let mut waiting = Waiting::new("");
    let mut qmp = waiting.guest.qemu().qmp();
    qmp.command("stop");
    assert_eq!(status(&mut qmp), json!("paused"));
    waiting.backend.restart(&waiting.image, NONE);
    wait_until("a backend serves", PATIENCE, || {
        property(&mut qmp, "attached") == json!(true)
    });
    assert!(!waiting.guest.qemu().serial().contains("gone"));
    qmp.command("cont");
    waiting.ends_well();
}

#[test]
fn a_reset_is_put_off_until_the_vcpu_has_its_memory() {
    let mut waiting = Waiting::new("");
    let mut qmp = waiting.guest.qemu().qmp();
    qmp.execute("set-action", &json!({ "reboot": "reset" }))
        .unwrap();
    qmp.command("system_reset");
    waiting
        .guest
        .qemu()
        .wait_for_message("the reset is put off");
    assert_eq!(status(&mut qmp), json!("running"));
    waiting.backend.restart(&waiting.image, NONE);
    wait_until("the guest has booted again", PATIENCE, || {
        waiting.guest.qemu().serial().matches("ready\n").count() == 2
    });
}

#[test]
fn qemu_quits_while_a_vcpu_waits_and_the_image_is_as_it_was() {
    let mut waiting = Waiting::new("");
    waiting.guest.qemu().qmp().command("quit");
    assert!(waiting.guest.qemu().wait().success());
    Guest::run_on(
        &waiting.image,
        Qemu::new(),
        "guest_io verify /dev/dax0.0 0 2M 3",
    );
}

#[test]
fn a_limit_turns_waiting_into_a_stopped_machine_that_can_be_continued() {
    let mut waiting = Waiting::new(",wait-timeout=1000");
    let mut qmp = waiting.guest.qemu().qmp();
    wait_until("the machine is stopped", PATIENCE, || {
        status(&mut qmp) == json!("io-error")
    });
    waiting
        .guest
        .qemu()
        .wait_for_message("the virtual machine is stopped");
    waiting.backend.restart(&waiting.image, NONE);
    wait_until("a backend serves", PATIENCE, || {
        property(&mut qmp, "attached") == json!(true)
    });
    qmp.command("cont");
    waiting.ends_well();
}

/// A guest whose processors wait cannot power off, whatever its kernel tries: one that none of them waits in can.
#[test]
fn a_guest_that_touches_only_what_is_mapped_powers_off_without_a_backend() {
    let scratch = Scratch::new();
    let image = scratch.image("image", 256 * MIB, CLUSTER);
    let mut backend = Backend::start(&image, NONE);
    let script = "
ndctl create-namespace -f -e namespace0.0 -m devdax -M mem
guest_io store /dev/dax0.0 0 2M 3
echo ready
read -r line
guest_io verify /dev/dax0.0 0 2M 3
";
    let mut guest = Guest::boot(Qemu::new().pcow(&backend), script);
    guest.wait_for("ready\n");
    backend.kill();
    guest
        .qemu()
        .wait_for_message("the session with the backend has ended");
    guest.qemu().send_line("end");
    guest.finish();
    Guest::run_on(&image, Qemu::new(), "guest_io verify /dev/dax0.0 0 2M 3");
}

/// A disk of 8 MiB with the pattern of `seed`.
fn disk(scratch: &Scratch, seed: u64) -> PathBuf {
    let path = scratch.path("disk");
    let mut bytes = vec![0; usize::try_from(8 * MIB).unwrap()];
    pattern::fill(seed, 0, &mut bytes);
    fs::write(&path, bytes).unwrap();
    path
}

/// Reads a disk into persistent memory that nobody has touched, when it is told to.
const READ_DISK: &str = "
modprobe -a virtio_pci virtio_blk
ndctl create-namespace -f -e namespace0.0 -m devdax -M mem
echo ready
read -r line
guest_io read /dev/dax0.0 0 8M /dev/vda
guest_io verify /dev/dax0.0 0 8M 7
";

/// With `aio=native`, the main loop itself has the kernel find the pages, and waits for them with the big lock.
#[test]
fn a_backend_that_was_killed_is_replaced_while_the_main_loop_waits_for_it() {
    let scratch = Scratch::new();
    let image = scratch.image("image", 256 * MIB, CLUSTER);
    let mut backend = Backend::start(&image, NONE);
    let machine = Qemu::new().disk(&disk(&scratch, 7), "aio=native,cache=none");
    let mut guest = Guest::boot(machine.pcow(&backend), READ_DISK);
    guest.wait_for("ready\n");
    backend.kill();
    guest.qemu().send_line("go");
    wait_until("the main loop waits", PATIENCE, || {
        guest.qemu().main_loop_waits_for_memory()
    });
    guest
        .qemu()
        .wait_for_message("an access waits for a backend");
    backend.restart(&image, NONE);
    guest.finish();
}

/// The request cannot complete, and no thread can be called away from it.
#[test]
fn qemu_quits_while_a_disk_is_read_into_memory_that_nobody_serves() {
    let scratch = Scratch::new();
    let image = scratch.image("image", 256 * MIB, CLUSTER);
    let mut backend = Backend::start(&image, NONE);
    let machine = Qemu::new().disk(&disk(&scratch, 7), "aio=threads");
    let mut guest = Guest::boot(machine.pcow(&backend), READ_DISK);
    guest.wait_for("ready\n");
    backend.kill();
    guest.qemu().send_line("go");
    guest
        .qemu()
        .wait_for_message("an access waits for a backend");
    guest.qemu().qmp().command("quit");
    assert!(guest.qemu().wait().success());
    assert!(guest.qemu().messages().contains("is given up"));
}

fn copy(image: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(image).arg(to).status();
    assert!(copied.unwrap().success());
}

#[test]
fn a_copy_of_the_image_is_refused_and_the_image_itself_then_accepted() {
    let Waiting {
        mut guest,
        backend,
        image,
        _scratch,
    } = Waiting::new("");
    let other = image.with_extension("copy");
    copy(&image, &other);
    let mut impostor = Backend::start_at(backend.socket(), &other, NONE);
    guest
        .qemu()
        .wait_for_message("it serves a copy of the image");
    impostor.kill();
    let mut qmp = guest.qemu().qmp();
    assert!(property(&mut qmp, "waiting-ms").as_u64() > Some(0));
    let mut right = Backend::start_at(backend.socket(), &image, NONE);
    guest.wait_for("gone\n");
    guest.qemu().send_line("end");
    guest.finish();
    assert!(right.terminate().success(), "{:#?}", right.log());
}
