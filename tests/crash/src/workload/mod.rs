// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A workload under way: images open on a simulated filesystem, and what they must show at every act.

mod bases;
mod guest;
mod offline;
mod operations;
mod stream;
mod tree;

use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;

use pcow_format::Image;
use pcow_format::medium::sim::{Moment, Sim};
use uuid::Uuid;

pub use bases::{clone_of_closed, other_base};
pub use guest::{store_word, write_back};
pub use operations::{OPERATIONS, Operation};
pub use stream::receive_again;
pub use tree::put_newest_back;

use crate::digest::Digest;
use crate::model::{Contents, Model, Place, check_equal};
use crate::random::Random;
use crate::setting::{self, Setting, text};

/// A piece of an operation: while it runs the image shows any of `possible`, afterwards the last of them.
#[derive(Debug)]
struct Transition {
    acts: Range<usize>,
    possible: Vec<Model>,
    older: Option<Arc<OlderRoot>>,
}

/// An older root is in place, or may be.
#[derive(Debug)]
pub struct OlderRoot {
    /// The text of the newest one.
    pub newest: Vec<u8>,
    /// The layers of the image's own that it names and the older one does not.
    pub unnamed: Vec<Uuid>,
    /// What the image has shown after each piece of an operation.
    pub past: Vec<Contents>,
    /// Whether the layer that is active under the older root is on another one since.
    pub moved: Option<Moved>,
}

/// A layer is on another one now.
#[derive(Debug)]
pub struct Moved {
    /// What a base shows that it left; `None` if what it was on was a snapshot, which the image has shown.
    pub left: Option<Contents>,
}

/// What the images must show after a crash.
#[derive(Debug, Clone)]
pub struct Expected {
    /// The image that was worked on.
    pub image: &'static str,
    /// It shows one of these.
    pub possible: Vec<Model>,
    /// The other image, if there is one, shows this.
    pub other: Option<(&'static str, Model)>,
    /// First somebody opens the image as it is, and puts the newest root back.
    pub older: Option<Arc<OlderRoot>>,
}

impl Expected {
    /// One of `possible` instead, without an older root.
    pub(crate) fn with_possible(&self, possible: Vec<Model>) -> Self {
        Self {
            possible,
            older: None,
            ..self.clone()
        }
    }

    /// A digest of all of it: the same medium may be right before a promise and wrong after it.
    pub fn digest(&self) -> u64 {
        let mut digest = Digest::default();
        (self.image, self.older.is_some()).hash(&mut digest);
        let models = self.possible.iter();
        models.for_each(|m| m.hash_expectation(&mut digest));
        if let Some((name, model)) = &self.other {
            name.hash(&mut digest);
            model.hash_expectation(&mut digest);
        }
        digest.finish()
    }
}

/// A moment of an operation, with what a crash then may leave.
#[derive(Debug, Clone)]
pub struct Point {
    /// The moment.
    pub moment: Moment,
    /// What must be there.
    pub expected: Expected,
}

/// One of the images that are worked on.
#[derive(Debug)]
struct Slot {
    name: &'static str,
    image: Option<Arc<Image>>,
    model: Model,
    /// Words stored and not written back since.
    unflushed: Vec<Place>,
    /// What it has shown after each piece of an operation.
    past: Vec<Contents>,
    /// Texts that its root has had.
    roots: Vec<Vec<u8>>,
    /// What its active layer was on before each rebase.
    bases: Vec<LeftBase>,
}

/// What a layer was on before a rebase.
#[derive(Debug)]
struct LeftBase {
    layer: Uuid,
    parent: Option<Uuid>,
    contents: Contents,
}

/// A workload under way.
#[derive(Debug)]
pub struct Run<'a> {
    setting: &'a Setting,
    /// The filesystem.
    pub sim: Sim,
    /// Number of the present boot.
    pub boot: u128,
    slots: Vec<Slot>,
    /// Which of them is worked on.
    at: usize,
    transitions: Vec<Transition>,
    /// The filesystem before the acts of the last operation.
    before: Option<Moment>,
    stores: u64,
    clones: usize,
    renames: usize,
    random: Random,
    /// Set while an older root is in place.
    older: Option<Arc<OlderRoot>>,
    /// Nothing can follow.
    ended: bool,
}

impl<'a> Run<'a> {
    /// Opens the images of `setting`.
    pub fn new(setting: &'a Setting, seed: u64) -> Result<Self, String> {
        let mut run = Self {
            setting,
            sim: setting.start.process_death(),
            boot: setting.boot,
            slots: Vec::new(),
            at: 0,
            transitions: Vec::new(),
            before: None,
            stores: 0,
            clones: 0,
            renames: 0,
            random: Random(seed),
            older: None,
            ended: false,
        };
        run.begin();
        for (name, model) in setting.scene.images().iter().zip(&setting.models) {
            let image = setting::open(&run.sim, name, setting.boot)?;
            run.slots.push(Slot {
                name,
                past: vec![model.disk.now().clone()],
                roots: vec![tree::root_text(&image)?],
                bases: Vec::new(),
                image: Some(Arc::new(image)),
                model: model.clone(),
                unflushed: Vec::new(),
            });
        }
        Ok(run)
    }

    /// Performs an operation, recording its acts, and looks at the image afterwards; `false` if it cannot be done.
    pub fn perform(&mut self, operation: &Operation) -> Result<bool, String> {
        self.begin();
        if self.ended || !(operation.run)(self)? {
            let name = operation.name;
            return match self.sim.recorded() {
                0 => Ok(false),
                _ => Err(format!(
                    "{name} is said to be impossible, and did something"
                )),
            };
        }
        let plan = self.setting.plan();
        let slot = &mut self.slots[self.at];
        let image = slot.image.as_ref().ok_or("closed between operations")?;
        let found = setting::read_tracked(plan, |at, buf| image.read(at, buf))?;
        check_equal("the running image", &found, slot.model.disk.now())?;
        slot.past.push(found);
        let root = tree::root_text(image)?;
        if slot.roots.last() != Some(&root) {
            slot.roots.push(root);
        }
        Ok(true)
    }

    /// Records from here on.
    fn begin(&mut self) {
        self.transitions.clear();
        self.before = Some(self.sim.now());
        self.sim.record();
    }

    /// The filesystem before the acts of the last operation.
    pub fn before(&self) -> Option<&Moment> {
        self.before.as_ref()
    }

    /// The points at which the last operation may be cut off. Ends the recording.
    pub fn points(&mut self) -> Vec<Point> {
        let numbered = self.sim.moments().into_iter().enumerate();
        let point = |(i, moment)| Point {
            moment,
            expected: self.expected(i),
        };
        numbered.map(point).collect()
    }

    /// What must be there after the last operation.
    pub fn expected_at_the_end(&self) -> Expected {
        self.expecting(vec![self.slot().model.clone()])
    }

    fn expected(&self, act: usize) -> Expected {
        let during = self.transitions.iter().find(|t| t.acts.contains(&act));
        let mut expected = self.expecting(match during {
            None => vec![self.slot().model.clone()],
            Some(t) if act + 1 == t.acts.end => t.possible.last().cloned().into_iter().collect(),
            Some(t) => t.possible.clone(),
        });
        expected.older = during.and_then(|t| t.older.clone());
        expected
    }

    fn expecting(&self, possible: Vec<Model>) -> Expected {
        let others = self.slots.iter().enumerate().find(|(i, _)| *i != self.at);
        Expected {
            image: self.slot().name,
            possible,
            other: others.map(|(_, slot)| (slot.name, slot.model.clone())),
            older: None,
        }
    }

    fn slot(&self) -> &Slot {
        &self.slots[self.at]
    }

    fn slot_mut(&mut self) -> &mut Slot {
        &mut self.slots[self.at]
    }

    fn model(&self) -> &Model {
        &self.slot().model
    }

    fn image(&self) -> &Arc<Image> {
        let image = self.slot().image.as_ref();
        image.expect("open between operations")
    }

    /// Performs a piece of an operation that leads over `steps` to the last of them.
    fn transition<T>(
        &mut self,
        steps: &[Model],
        piece: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        let start = self.sim.recorded();
        let result = piece(self)?;
        let mut possible = vec![self.model().clone()];
        possible.extend_from_slice(steps);
        self.transitions.push(Transition {
            acts: start..self.sim.recorded(),
            possible,
            older: self.older.clone(),
        });
        if let Some(last) = steps.last() {
            let slot = self.slot_mut();
            slot.model = last.clone();
            slot.past.push(last.disk.now().clone());
        }
        Ok(result)
    }

    /// Performs a piece of an operation that changes nothing that can be seen.
    fn unseen<T>(
        &mut self,
        piece: impl FnOnce(&Image) -> pcow_format::Result<T>,
    ) -> Result<T, String> {
        self.transition(&[], |run| piece(run.image()).map_err(text))
    }

    /// Whether the active layer holds nothing, so that what it shows needs no snapshot.
    fn is_untouched(&self) -> Result<bool, String> {
        self.image().active().is_empty().map_err(text)
    }
}
