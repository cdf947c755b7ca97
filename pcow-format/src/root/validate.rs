// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must hold in a root: everything that can be checked without another file.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::{Kind, Layer, MAX_DEPTH, MAX_LAYERS, Root, check_name, corrupt, too_deep};
use crate::error::Result;

impl Root {
    /// Checks everything that can be checked without another file.
    pub(super) fn validate(&self) -> Result<()> {
        if self.layers.len() > MAX_LAYERS {
            return Err(corrupt(&format!("more than {MAX_LAYERS} layers")));
        }
        let mut seen = HashSet::new();
        for layer in &self.layers {
            if !seen.insert(layer.uuid) {
                return Err(corrupt(&format!("layer {} is there twice", layer.uuid)));
            }
            layer.validate()?;
        }
        self.validate_active()?;
        self.validate_snapshots()?;
        for top in self.layers.iter().map(|l| l.parent) {
            if top.is_some_and(|t| !seen.contains(&t)) {
                return Err(corrupt("a layer's parent is not in the layer table"));
            }
        }
        self.validate_depths()
    }

    /// No chain of parents, from whatever layer, is a loop or too long. Each layer is visited once.
    fn validate_depths(&self) -> Result<()> {
        let parents: HashMap<_, _> = self.layers.iter().map(|l| (l.uuid, l.parent)).collect();
        let mut depths: HashMap<Uuid, usize> = HashMap::new();
        for layer in &self.layers {
            let mut path = Vec::new();
            let mut next = Some(layer.uuid);
            while let Some(uuid) = next.filter(|u| !depths.contains_key(u)) {
                path.push(uuid);
                if path.len() > MAX_DEPTH {
                    return Err(too_deep());
                }
                next = parents.get(&uuid).copied().flatten();
            }
            let below = next.map_or(0, |u| depths[&u]);
            for (i, uuid) in path.iter().rev().enumerate() {
                depths.insert(*uuid, below + i + 1);
            }
            if depths[&layer.uuid] > MAX_DEPTH {
                return Err(too_deep());
            }
        }
        Ok(())
    }

    fn validate_active(&self) -> Result<()> {
        let active = self.active_layer()?;
        if active.sealed || active.kind != Kind::Own {
            return Err(corrupt("the active layer is sealed or not the image's own"));
        }
        if self
            .layers
            .iter()
            .any(|l| !l.sealed && l.uuid != self.active)
        {
            return Err(corrupt("a layer that is not active is not sealed"));
        }
        let unit = self.allocation_unit;
        if !unit.is_power_of_two() || unit < active.cluster_size || unit > 1 << 30 {
            return Err(corrupt("the allocation unit is out of its range"));
        }
        Ok(())
    }

    fn validate_snapshots(&self) -> Result<()> {
        let mut names = HashSet::new();
        let mut uuids = HashSet::new();
        let mut last = 0;
        let sealed: HashSet<_> = self
            .layers
            .iter()
            .filter(|l| l.sealed)
            .map(|l| l.uuid)
            .collect();
        for s in &self.snapshots {
            check_name(&s.name).map_err(|e| corrupt("a snapshot's name").caused_by(e))?;
            let is_new = names.insert(&s.name) && uuids.insert(s.uuid);
            if !is_new || s.number <= last || s.number >= self.next_snapshot {
                return Err(corrupt("a snapshot's UUID, name or number is not unique"));
            }
            if !sealed.contains(&s.layer) {
                return Err(corrupt("a snapshot's layer is missing or not sealed"));
            }
            last = s.number;
        }
        Ok(())
    }
}

impl Layer {
    fn validate(&self) -> Result<()> {
        self.cluster()?;
        self.size()?;
        if self.clip > self.virtual_size || !self.clip.is_multiple_of(self.cluster_size) {
            return Err(corrupt("a layer's clip is out of its range"));
        }
        match &self.kind {
            Kind::Own => Ok(()),
            Kind::Reference { directory } if directory.is_absolute() && self.sealed => Ok(()),
            Kind::Raw { path, .. }
                if path.is_absolute() && self.sealed && self.parent.is_none() =>
            {
                Ok(())
            }
            _ => Err(corrupt("a base's path is not absolute, or it has a parent")),
        }
    }
}
