// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A series of patches, and its application to a source tree.
//!
//! Patches are applied in a staging folder that holds only the files they touch; files whose
//! content differs are then copied over. A failing patch therefore leaves the tree as it was,
//! and a file that did not change keeps its time, so that it is not compiled again.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use crate::cache;
use crate::error::{Error, Result};
use crate::run;

/// Files of a tree, relative to it.
pub type Files = BTreeSet<PathBuf>;

/// One patch file.
#[derive(Debug)]
struct Patch {
    path: PathBuf,
    text: Vec<u8>,
}

/// Patches in the order of their folders, and of their names in each.
#[derive(Debug)]
pub struct Series {
    patches: Vec<Patch>,
}

impl Series {
    /// Reads all `*.patch` files of `folders`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn read(folders: &[PathBuf]) -> Result<Self> {
        let mut patches = Vec::new();
        for folder in folders {
            for path in patches_in(folder)? {
                patches.push(Patch::read(path)?);
            }
        }
        Ok(Self { patches })
    }

    /// The patches' contents, in order.
    pub fn contents(&self) -> impl Iterator<Item = &[u8]> {
        self.patches.iter().map(|patch| patch.text.as_slice())
    }

    /// The files that the series changes, makes or removes.
    ///
    /// # Errors
    /// A patch names a file outside of the tree.
    pub fn files(&self) -> Result<Files> {
        let mut files = Files::new();
        for patch in &self.patches {
            files.extend(patch.files()?);
        }
        Ok(files)
    }

    /// Says whether `tree` already has the series: its last patch can be taken back.
    pub fn is_applied(&self, tree: &Path) -> bool {
        self.patches.last().is_none_or(|last| {
            run::succeeds(
                last.command(tree)
                    .args(["--reverse", "--force", "--dry-run"]),
            )
        })
    }

    /// Makes `tree` what `pristine` is with the series applied, given that it differs from
    /// `pristine` in no other files than those of the series and `changed_before`. `staging` is
    /// overwritten.
    ///
    /// # Errors
    /// A patch does not apply: the tree is as it was. Or a file cannot be read or written.
    pub fn apply(
        &self,
        pristine: &Path,
        tree: &Path,
        staging: &Path,
        changed_before: &Files,
    ) -> Result<()> {
        let files: Files = self.files()?.union(changed_before).cloned().collect();
        cache::remove_folder(staging)?;
        cache::create_folder(staging)?;
        for file in &files {
            copy_if_different(&pristine.join(file), &staging.join(file))?;
        }
        for patch in &self.patches {
            patch.apply(staging)?;
        }
        for file in &files {
            copy_if_different(&staging.join(file), &tree.join(file))?;
        }
        Ok(())
    }
}

impl Patch {
    fn read(path: PathBuf) -> Result<Self> {
        let text = fs::read(&path).map_err(Error::file("read", &path))?;
        Ok(Self { path, text })
    }

    fn command(&self, tree: &Path) -> Command {
        let mut command = Command::new("patch");
        command
            .args(["-p1", "--no-backup-if-mismatch", "--reject-file=-", "-d"])
            .arg(tree)
            .arg("-i")
            .arg(&self.path);
        command
    }

    fn apply(&self, tree: &Path) -> Result<()> {
        let mut command = self.command(tree);
        let output = command
            .arg("--forward")
            .arg("--batch")
            .output()
            .map_err(run::start_error("patch"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::Unusable(format!(
            "{} does not apply:\n{}",
            self.path.display(),
            String::from_utf8_lossy(&output.stdout).trim_end()
        )))
    }

    fn files(&self) -> Result<Files> {
        let text = String::from_utf8_lossy(&self.text);
        let names: Files = text.lines().filter_map(header_file).collect();
        let outside = names.iter().find(|name| !stays_inside(name));
        match outside {
            Some(name) => Err(Error::Unusable(format!(
                "{} names a file outside of the tree: {}",
                self.path.display(),
                name.display()
            ))),
            None => Ok(names),
        }
    }
}

/// The patch files of a folder, in the order of their names.
fn patches_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::file("read", folder))? {
        paths.push(entry.map_err(Error::file("read", folder))?.path());
    }
    paths.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "patch")
    });
    paths.sort();
    Ok(paths)
}

/// The file that a header line of a patch names, without the first folder (`-p1`).
fn header_file(line: &str) -> Option<PathBuf> {
    let name = line
        .strip_prefix("--- a/")
        .or_else(|| line.strip_prefix("+++ b/"))
        .or_else(|| line.strip_prefix("rename from "))
        .or_else(|| line.strip_prefix("rename to "))?;
    let name = name.split('\t').next().unwrap_or(name);
    Some(PathBuf::from(name.trim_end()))
}

fn stays_inside(path: &Path) -> bool {
    path.components()
        .all(|component| matches!(component, Component::Normal(_)))
}

/// Makes `to` have the content of `from`, or not exist if `from` does not.
fn copy_if_different(from: &Path, to: &Path) -> Result<()> {
    if !from.exists() {
        return if to.exists() {
            fs::remove_file(to).map_err(Error::file("remove", to))
        } else {
            Ok(())
        };
    }
    if same_content(from, to)? {
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        cache::create_folder(folder)?;
    }
    fs::copy(from, to).map_err(Error::file("write", to))?;
    Ok(())
}

fn same_content(from: &Path, to: &Path) -> Result<bool> {
    if !to.exists() {
        return Ok(false);
    }
    let wanted = fs::read(from).map_err(Error::file("read", from))?;
    let present = fs::read(to).map_err(Error::file("read", to))?;
    Ok(wanted == present)
}

#[cfg(test)]
mod tests {
    use super::{Files, Series};
    use std::fs;
    use std::path::{Path, PathBuf};
    use tempfile::TempDir;

    const CHANGE: &str = "--- a/one\n+++ b/one\n@@ -1 +1 @@\n-first\n+changed\n";
    const NEW: &str = "--- /dev/null\n+++ b/sub/new\n@@ -0,0 +1 @@\n+born\n";
    const WRONG: &str = "--- a/two\n+++ b/two\n@@ -1 +1 @@\n-not there\n+changed\n";
    const OUTSIDE: &str = "--- a/../one\n+++ b/../one\n@@ -1 +1 @@\n-first\n+changed\n";

    struct Place(TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            for tree in ["pristine", "tree"] {
                fs::create_dir(place.path(tree)).unwrap();
                fs::write(place.path(tree).join("one"), "first\n").unwrap();
                fs::write(place.path(tree).join("two"), "second\n").unwrap();
            }
            place
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn series(&self, patches: &[&str]) -> Series {
            let folder = self.path("patches");
            fs::remove_dir_all(&folder).ok();
            fs::create_dir(&folder).unwrap();
            for (number, text) in patches.iter().enumerate() {
                fs::write(folder.join(format!("{number:04}.patch")), text).unwrap();
            }
            Series::read(&[folder]).unwrap()
        }

        fn apply(&self, series: &Series, before: &Files) -> super::Result<()> {
            let (pristine, tree) = (self.path("pristine"), self.path("tree"));
            series.apply(&pristine, &tree, &self.path("staging"), before)
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.path("tree").join(name)).unwrap()
        }
    }

    fn modified(path: &Path) -> std::time::SystemTime {
        fs::metadata(path).unwrap().modified().unwrap()
    }

    #[test]
    fn applying_twice_leaves_the_times_of_all_files_alone() {
        let place = Place::new();
        let series = place.series(&[CHANGE, NEW]);
        assert!(!series.is_applied(&place.path("tree")));
        place.apply(&series, &Files::new()).unwrap();
        let time = modified(&place.path("tree/one"));
        assert!(series.is_applied(&place.path("tree")));
        place.apply(&series, &series.files().unwrap()).unwrap();
        assert_eq!(place.read("one"), "changed\n");
        assert_eq!(place.read("sub/new"), "born\n");
        assert_eq!(modified(&place.path("tree/one")), time);
    }

    #[test]
    fn a_patch_that_left_the_series_is_taken_back() {
        let place = Place::new();
        let series = place.series(&[CHANGE, NEW]);
        place.apply(&series, &Files::new()).unwrap();
        let before = series.files().unwrap();
        place.apply(&place.series(&[]), &before).unwrap();
        assert_eq!(place.read("one"), "first\n");
        assert!(!place.path("tree/sub/new").exists());
    }

    #[test]
    fn a_patch_that_does_not_apply_is_named_and_leaves_the_tree_as_it_was() {
        let place = Place::new();
        let series = place.series(&[CHANGE, WRONG]);
        let error = place.apply(&series, &Files::new()).unwrap_err().to_string();
        assert!(error.contains("0001.patch does not apply"), "{error}");
        assert_eq!(place.read("one"), "first\n");
    }

    #[test]
    fn a_patch_outside_of_the_tree_is_refused() {
        let place = Place::new();
        let error = place.series(&[OUTSIDE]).files().unwrap_err().to_string();
        assert!(error.contains("outside of the tree"), "{error}");
    }
}
