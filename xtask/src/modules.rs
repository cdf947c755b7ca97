// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kernel modules: which files a list of modules needs, with all they depend on.
//!
//! Reads what depmod(8) writes; copies nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A module that an initramfs loads at start.
#[derive(Debug, Clone, Copy)]
pub struct Module {
    /// Its name, with underscores.
    pub name: &'static str,
    /// Whether a kernel may lack it, because newer ones have it built in without saying so.
    pub optional: bool,
}

/// A module that every kernel must have, built in or not.
pub const fn module(name: &'static str) -> Module {
    Module {
        name,
        optional: false,
    }
}

/// A module that newer kernels may lack.
pub const fn optional(name: &'static str) -> Module {
    Module {
        name,
        optional: true,
    }
}

/// The modules of one kernel.
#[derive(Debug)]
pub struct KernelModules {
    /// File of each module and the files it depends on, relative to the kernel's folder.
    files: BTreeMap<String, Vec<PathBuf>>,
    built_in: BTreeSet<String>,
}

/// What is to be copied, and what is to be loaded in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Module files relative to the kernel's folder.
    pub files: BTreeSet<PathBuf>,
    /// Names of modules that are not built in.
    pub names: Vec<&'static str>,
}

impl KernelModules {
    /// Reads `modules.dep` and `modules.builtin` of the folder `lib/modules/<release>`.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn read(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(Error::file("read", &path))
        };
        Ok(Self::parse(
            &read("modules.dep")?,
            &read("modules.builtin")?,
        ))
    }

    fn parse(dependencies: &str, built_in: &str) -> Self {
        Self {
            files: dependencies.lines().filter_map(parse_dependency).collect(),
            built_in: built_in.lines().map(module_name).collect(),
        }
    }

    /// Selects `modules` and everything they depend on.
    ///
    /// # Errors
    /// The kernel has no such module, and it is not an optional one.
    pub fn select(&self, modules: &[Module]) -> Result<Selection> {
        let mut selection = Selection::default();
        for module in modules {
            if let Some(files) = self.files.get(module.name) {
                selection.files.extend(files.iter().cloned());
                selection.names.push(module.name);
            } else if !module.optional && !self.built_in.contains(module.name) {
                return Err(Error::Unusable(format!(
                    "the kernel has no module {}",
                    module.name
                )));
            }
        }
        Ok(selection)
    }
}

/// Parses `path: path path ...`; the list is complete, not only the direct dependencies.
fn parse_dependency(line: &str) -> Option<(String, Vec<PathBuf>)> {
    let (own, others) = line.split_once(':')?;
    let files = std::iter::once(own)
        .chain(others.split_whitespace())
        .map(PathBuf::from)
        .collect();
    Some((module_name(own), files))
}

/// `kernel/drivers/dax/device_dax.ko.xz` is the module `device_dax`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let stem = file.split('.').next().unwrap_or(file);
    stem.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::{KernelModules, module, optional};
    use std::path::PathBuf;

    fn kernel() -> KernelModules {
        KernelModules::parse(
            "kernel/a-b.ko.xz: kernel/c.ko kernel/d.ko\nkernel/c.ko:\nkernel/d.ko: kernel/c.ko\n",
            "kernel/built-in.ko\n",
        )
    }

    #[test]
    fn a_selection_has_all_dependencies_and_loads_nothing_built_in() {
        let modules = [module("a_b"), module("built_in")];
        let selection = kernel().select(&modules).unwrap();
        let files = ["kernel/a-b.ko.xz", "kernel/c.ko", "kernel/d.ko"];
        assert_eq!(selection.files, files.map(PathBuf::from).into());
        assert_eq!(selection.names, ["a_b"]);
    }

    #[test]
    fn only_an_optional_module_may_be_missing() {
        assert!(kernel().select(&[optional("none")]).is_ok());
        assert!(kernel().select(&[module("none")]).is_err());
    }
}
