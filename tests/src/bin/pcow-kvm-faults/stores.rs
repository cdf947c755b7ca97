// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loads and stores at random places, of all processors at once, beside each other in the same pages.

use std::collections::HashMap;

use pcow_tests::files::checksums;
use pcow_tests::micro_vm::Vcpu;
use pcow_tests::random::Random;

use crate::content::{Content, expect_same};
use crate::images::{Holdings, Sectors, TestImage};
use crate::session::{Options, Session, WITH_BOUNCES, WITHOUT_BOUNCES};
use crate::{PROCESSORS, Setting};

/// Bytes that one processor loads or stores at once. Of each page every processor has one sector of its own, and all load
/// from the rest.
const SECTOR: u64 = 512;
const PAGE: u64 = 4096;
/// Budgets that are exceeded many times over, so that mappings and read copies come and go.
const SMALL_BUDGETS: &[&str] = &["--max-mappings=64", "--cache-size=2M"];

pub fn stores_of_four_processors_are_exact_with_bounces(setting: &Setting) {
    stores_are_exact(setting, WITH_BOUNCES);
}

pub fn stores_of_four_processors_are_exact_without_bounces(setting: &Setting) {
    stores_are_exact(setting, WITHOUT_BOUNCES);
}

fn stores_are_exact(setting: &Setting, how: Options<'_>) {
    let image = TestImage::mixed(setting.effort.mixed_bytes);
    let base = checksums(&image.base(), &[".data", ".map"]);
    let small = Options {
        backend: SMALL_BUDGETS,
        ..how
    };
    let mut session = Session::start(&image, small);
    let (bytes, operations) = (image.bytes, setting.effort.operations);
    let stored = session
        .machine
        .run(move |vcpu| Toucher::new(vcpu, bytes).work(operations));
    let repeated = session.machine.repeated_entries();
    let counts = session.end();
    let stored: Sectors = stored.into_iter().flatten().collect();
    image.expect_on_disk(&stored);
    println!("  {:?}", Holdings::of(&image));
    assert_eq!(checksums(&image.base(), &[".data", ".map"]), base);
    assert!(counts.session.unmaps > 0, "{counts:?}");
    assert_eq!(counts.session.evictions > 0, how.bounce, "{counts:?}");
    assert_eq!(counts.unknown.bounced > 0, how.bounce, "{counts:?}");
    assert_eq!(
        counts.unknown.copied_on_touch == 0,
        how.bounce,
        "{counts:?}"
    );
    // A store that meets a moment ends KVM_RUN with EFAULT and is repeated.
    assert_eq!(repeated > 0, how.bounce);
}

/// One processor's work.
#[derive(Debug)]
struct Toucher<'a> {
    vcpu: &'a mut Vcpu,
    pages: u64,
    random: Random,
    stored: Sectors,
}

impl<'a> Toucher<'a> {
    fn new(vcpu: &'a mut Vcpu, bytes: u64) -> Self {
        let random = Random::new(u64::try_from(vcpu.number()).unwrap() + 1);
        Self {
            vcpu,
            pages: bytes / PAGE,
            random,
            stored: HashMap::new(),
        }
    }

    fn work(mut self, operations: u64) -> Sectors {
        for _ in 0..operations {
            let page = self.random.below(self.pages) * PAGE;
            if self.random.below(3) == 0 {
                self.store(page);
            } else {
                self.load(page);
            }
        }
        self.stored
    }

    /// Stores into a part of the own sector of `page`.
    fn store(&mut self, page: u64) {
        let sector = page + u64::try_from(self.vcpu.number()).unwrap() * SECTOR;
        let words = 1 + self.random.below(8);
        let at = self.random.below(SECTOR / 8 - words + 1) * 8;
        let words = (0..words).flat_map(|_| self.random.next_word().to_le_bytes());
        let new: Vec<u8> = words.collect();
        self.vcpu.store(sector + at, &new);
        let stored = self.stored.entry(sector).or_insert_with(|| initial(sector));
        let at = usize::try_from(at).unwrap();
        stored[at..at + new.len()].copy_from_slice(&new);
    }

    /// Looks at the own sector of `page`, or at one that nobody changes.
    fn load(&mut self, page: u64) {
        let number = u64::try_from(self.vcpu.number()).unwrap();
        let shared = u64::try_from(PROCESSORS).unwrap()..PAGE / SECTOR;
        let choice = shared.start + self.random.below(shared.end - shared.start);
        let choice = [number, choice][usize::try_from(self.random.below(2)).unwrap()];
        let sector = page + choice * SECTOR;
        let mut found = vec![0; usize::try_from(SECTOR).unwrap()];
        self.vcpu.load(sector, &mut found);
        match self.stored.get(&sector) {
            Some(wanted) => expect_same(sector, &found, wanted),
            None => Content::Mixed.expect(sector, &found),
        }
    }
}

/// A sector before anybody has stored into it.
fn initial(sector: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SECTOR).unwrap()];
    Content::Mixed.fill(sector, &mut bytes);
    bytes
}
