// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults that the search found, each told and held by itself.
#![allow(missing_docs, clippy::unwrap_used)]

use pcow_format::medium::sim::{Moment, Sim};
use pcow_format::medium::{Domain, Site};
use pcow_format::repair::{Unflushed, settle_unflushed};
use pcow_format::{Cluster, ErrorKind, FLUSH_FAILED_FILE, Image, data_name};

use pcow_crash::model::{CLUSTER_BYTES, SMALL};
use pcow_crash::setting::{self, IMAGE, SCENES, Setting};
use pcow_crash::workload::other_base;

/// In no layer.
const ABSENT: u64 = 300;
/// Data in both bases.
const BASE: u64 = 2;
/// In no layer, but the active data file holds bytes of a copy that was cut off.
const LEFTOVER: u64 = 40;

const STORED: u64 = 0x5707_ed00;

/// An image under test, opened on a medium of `domain`.
fn start(domain: Domain) -> (Sim, Image, u128) {
    let plain = |s: &&setting::Scene| s.created_in == domain && s.used_in == domain;
    let setting = Setting::new(SCENES.iter().find(plain).unwrap(), None);
    let sim = setting.start.process_death();
    let image = setting::open(&sim, IMAGE, setting.boot).unwrap();
    (sim, image, setting.boot)
}

/// The process dies right after the act at `site` of what `operation` does.
fn killed_after(sim: &Sim, site: &str, operation: impl FnOnce()) -> Sim {
    sim.record();
    operation();
    let moments = sim.moments();
    let at_site = moments.iter().find(|m| m.act().site.0 == site);
    at_site.map(Moment::process_death).unwrap()
}

/// The power goes, and nothing was written back that need not be.
fn cut(sim: &Sim) -> Sim {
    let moment = sim.now();
    let choices = moment.choices();
    moment.power_cut(&choices, &vec![0; choices.len()])
}

/// Stores a word on DAX and makes it durable, as a guest does.
fn store_durably(image: &Image, cluster: u64) {
    image
        .make_writable(Cluster(cluster).only(), &mut Vec::new())
        .unwrap();
    let file = image.active().data_file();
    let offset = cluster * CLUSTER_BYTES;
    file.store_word(Site("guest.store"), offset, STORED)
        .unwrap();
    file.write_back(Site("guest.write_back"), offset).unwrap();
    file.fence(Site("guest.fence"));
}

fn load(image: &Image, offset: u64) -> u64 {
    let mut raw = [0; 8];
    image.read(offset, &mut raw).unwrap();
    u64::from_le_bytes(raw)
}

/// A process died between the rename of `image.json` and the sync of the directory. Its successor saw the new root and
/// went on in the new layer, where everything was flushed; then the power went, the rename was lost, and all of it
/// with it. Opening now syncs the directory.
#[test]
fn what_rests_on_a_root_that_a_dead_process_renamed_is_not_lost() {
    let (sim, mut image, boot) = start(Domain::Dax);
    let sim = killed_after(&sim, "root.rename", || {
        image.snapshot(Some("s")).unwrap();
    });
    store_durably(&setting::open(&sim, IMAGE, boot).unwrap(), BASE);
    let image = setting::open(&cut(&sim), IMAGE, boot + 1).unwrap();
    assert_eq!(load(&image, BASE * CLUSTER_BYTES), STORED);
}

/// On DAX a process died between the store of a word and its fence. Its successor saw *data* and mapped the cluster; a
/// guest stored into it and fenced; then the power went, the word was lost, and the cluster read as absent. Opening on
/// DAX now syncs the map.
#[test]
fn what_rests_on_a_word_that_a_dead_process_did_not_fence_is_not_lost() {
    let (sim, image, boot) = start(Domain::Dax);
    let sim = killed_after(&sim, "active.word", || store_durably(&image, ABSENT));
    store_durably(&setting::open(&sim, IMAGE, boot).unwrap(), ABSENT);
    let image = setting::open(&cut(&sim), IMAGE, boot + 1).unwrap();
    assert_eq!(load(&image, ABSENT * CLUSTER_BYTES), STORED);
}

/// On DAX a process died after it zeroed a cluster that held the rest of a copy that was cut off, and before that was
/// durable. Its successor saw zeros, took them for durable, and made the cluster data; then the power went, the zeros
/// were lost, and the old bytes showed. On DAX whoever makes a cluster data now writes its zeros itself.
#[test]
fn zeros_that_a_dead_process_did_not_sync_are_not_relied_on() {
    let (sim, image, boot) = start(Domain::Dax);
    let sim = killed_after(&sim, "active.prepare.zeros", || {
        store_durably(&image, LEFTOVER)
    });
    store_durably(&setting::open(&sim, IMAGE, boot).unwrap(), LEFTOVER);
    let image = setting::open(&cut(&sim), IMAGE, boot + 1).unwrap();
    assert_eq!(load(&image, LEFTOVER * CLUSTER_BYTES + 4096), 0);
}

/// A process died in the page cache and left a live cluster; within the same boot the filesystem was mounted with DAX.
/// A guest stored into the cluster and fenced; then the power went, and the live cluster went with the boot. Opening on
/// DAX now settles what is live.
#[test]
fn what_rests_on_a_live_cluster_that_came_to_dax_is_not_lost() {
    let (sim, image, boot) = start(Domain::PageCache);
    image
        .make_writable(Cluster(ABSENT).only(), &mut Vec::new())
        .unwrap();
    let sim = sim.with_fault(Domain::Dax, None);
    store_durably(&setting::open(&sim, IMAGE, boot).unwrap(), ABSENT);
    let image = setting::open(&cut(&sim), IMAGE, boot + 1).unwrap();
    assert_eq!(load(&image, ABSENT * CLUSTER_BYTES), STORED);
}

/// A rebase that was cut off left the files of the new base in the image's directory, where the root did not name them
/// yet, and the next attempt failed because they were there. An adoption now replaces them.
#[test]
fn a_rebase_that_was_cut_off_can_be_run_again() {
    let (sim, mut image, boot) = start(Domain::PageCache);
    let sim = killed_after(&sim, "adopt.dir.sync", || {
        image.rebase(Some(&other_base()), IMAGE).unwrap();
    });
    let mut image = setting::open(&sim, IMAGE, boot).unwrap();
    image.rebase(Some(&other_base()), IMAGE).unwrap();
    assert_eq!(image.below().depth(), 1);
}

/// A snapshot committed the new root and then failed to open what it names. It returned the error and went on with the
/// old active layer, which the root called sealed. What the root is to name is now opened first.
#[test]
fn a_snapshot_whose_layers_cannot_be_opened_changes_nothing() {
    let (sim, mut image, boot) = start(Domain::PageCache);
    let dir = sim.top().open_dir(IMAGE).unwrap();
    let active = image.root().active;
    let (name, site) = (data_name(active), Site("test"));
    dir.rename(site, &name, "elsewhere").unwrap();
    let error = image.snapshot(Some("s")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BaseMissing, "{error}");
    let stored = setting::stored(&sim, IMAGE, boot).unwrap();
    assert!(stored.root().snapshots.is_empty());
    dir.rename(site, "elsewhere", &name).unwrap();
    image.snapshot(Some("s")).unwrap();
}

/// The last sync of a commit failed. The snapshot told so and went on in the old layer, which the root on the medium now
/// called sealed: what a guest stored then changed a sealed layer, against its checksum. It now goes on in the new layer,
/// and since a power cut may take the root back, no flush succeeds any more.
#[test]
fn after_a_root_that_may_not_be_durable_no_flush_succeeds_and_no_sealed_layer_changes() {
    let (sim, mut image, boot) = start(Domain::PageCache);
    sim.fail(Site("root.dir.sync"), 5);
    let error = image.snapshot(Some("s")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FlushFailed, "{error}");
    image
        .make_writable(Cluster(BASE).only(), &mut Vec::new())
        .unwrap();
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::FlushFailed);
    drop(image);
    let refused = setting::try_open(&sim, IMAGE, boot).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::FlushFailed, "{refused}");
    let stored = setting::stored(&sim, IMAGE, boot).unwrap();
    assert_eq!(stored.root().snapshots.len(), 1);
    let report = pcow_format::check::check(&stored).unwrap();
    assert_eq!(report.corruptions, Vec::<String>::new());
}

/// A flush failed; the kernel took the pages that it could not write for written (M14), dropped them, and read them anew:
/// they showed what the medium held, which under a copy that was never written is nothing. Whoever removed the mark of the
/// failed flush then found zeros in place of the base's bytes, since the cluster was live in this very boot. What is
/// live is not trusted any more once a flush has failed.
#[test]
fn what_a_failed_flush_lost_does_not_hide_the_base() {
    let (sim, image, boot) = start(Domain::PageCache);
    let base = load(&image, BASE * CLUSTER_BYTES + 4096);
    assert_ne!(base, 0);
    image
        .make_writable(Cluster(BASE).only(), &mut Vec::new())
        .unwrap();
    sim.fail(Site("active.flush.data"), libc::EIO);
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::FlushFailed);
    drop(image);
    sim.evict(|| true);
    let dir = sim.top().open_dir(IMAGE).unwrap();
    dir.unlink(Site("user.unlink"), FLUSH_FAILED_FILE).unwrap();
    let image = setting::open(&sim, IMAGE, boot).unwrap();
    assert_eq!(load(&image, BASE * CLUSTER_BYTES + 4096), base);
}

/// After a failed flush and an orderly reboot somebody had the live clusters taken for data: what the flush had not written was
/// not on the medium, and zeros hid the base for good. They are not trusted any more once a flush has failed, whether or not
/// the mark of it is still there.
#[test]
fn clusters_that_a_failed_flush_left_are_not_taken_for_data() {
    let (sim, image, boot) = start(Domain::PageCache);
    image
        .make_writable(Cluster(BASE).only(), &mut Vec::new())
        .unwrap();
    sim.fail(Site("active.flush.data"), libc::EIO);
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::FlushFailed);
    drop(image);
    let trust = || {
        let stored = setting::stored(&sim, IMAGE, boot + 1).unwrap();
        settle_unflushed(&stored, Unflushed::Trust)
            .unwrap_err()
            .kind()
    };
    assert_eq!(trust(), ErrorKind::FlushFailed);
    let dir = sim.top().open_dir(IMAGE).unwrap();
    dir.unlink(Site("user.unlink"), FLUSH_FAILED_FILE).unwrap();
    assert_eq!(trust(), ErrorKind::FlushFailed);
}

/// The sync of the parent failed, and with it the creation; the image was there all the same, complete, under a name that a
/// power cut could take. It is removed now.
#[test]
fn a_creation_whose_name_may_not_last_leaves_nothing() {
    let (sim, image, boot) = start(Domain::PageCache);
    drop(image);
    sim.fail(Site("create.parent.sync"), libc::EIO);
    let before = sim.top().names().unwrap();
    setting::create(&SMALL, &sim, "new", None, boot).unwrap_err();
    assert_eq!(sim.top().names().unwrap(), before);
}

/// The same, and the medium refuses to take it back: the error names what is left.
#[test]
fn a_creation_that_cannot_be_taken_back_says_so() {
    let (sim, image, boot) = start(Domain::PageCache);
    drop(image);
    sim.fail(Site("create.parent.sync"), libc::EIO);
    sim.fail(Site("create.back.rename"), libc::EIO);
    let error = setting::create(&SMALL, &sim, "new", None, boot).unwrap_err();
    assert!(error.starts_with("new or new."), "{error}");
    setting::open(&sim, "new", boot).unwrap();
}
