// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A private apt: its own sources, lists and downloads in a folder of ours.
//!
//! The system's apt is only read: its mirror (through [`crate::sources`]), its keys and its
//! network settings. Its sources, lists and package states are never touched, and it needs no
//! root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::arch;
use crate::cache;
use crate::error::{Error, Result};
use crate::run::{self, Log};

/// An apt configuration in a folder of its own.
#[derive(Debug)]
pub struct PrivateApt {
    folder: PathBuf,
}

impl PrivateApt {
    /// Writes a configuration in `folder` that knows only `stanza` and believes that no package
    /// is installed, so that a download brings all dependencies.
    ///
    /// # Errors
    /// A file cannot be written, or `apt-config` fails.
    pub fn create(folder: &Path, stanza: &str) -> Result<Self> {
        for name in ["parts", "state/lists/partial", "archives/partial"] {
            cache::create_folder(&folder.join(name))?;
        }
        let apt = Self {
            folder: folder.to_path_buf(),
        };
        apt.write("parts/debian.sources", stanza)?;
        apt.write("status", "")?;
        apt.write("apt.conf", &apt.configuration()?)?;
        Ok(apt)
    }

    /// Fetches the package lists.
    ///
    /// # Errors
    /// The fetch fails.
    pub fn update(&self, log: &Log) -> Result<()> {
        // Without this option a list that could not be fetched is only a warning.
        log.stage(
            "fetching package lists",
            self.command("apt-get")
                .args(["update", "--error-on=any"])
                .current_dir(&self.folder),
        )
    }

    /// Downloads the source package `name` into `folder`.
    ///
    /// # Errors
    /// The download fails.
    pub fn download_source(&self, name: &str, folder: &Path, log: &Log) -> Result<()> {
        log.stage(
            &format!("downloading the source of {name}"),
            self.command("apt-get")
                .args(["source", "--download-only", name])
                .current_dir(folder),
        )
    }

    /// Downloads `packages` and everything they depend on, and returns the files.
    ///
    /// # Errors
    /// The download fails.
    pub fn download_with_dependencies(&self, packages: &[&str], log: &Log) -> Result<Vec<PathBuf>> {
        log.stage(
            &format!("downloading {}", packages.join(" ")),
            self.command("apt-get")
                .args([
                    "install",
                    "-y",
                    "--download-only",
                    "--no-install-recommends",
                ])
                .args(packages),
        )?;
        package_files(&self.folder.join("archives"))
    }

    /// Downloads the one package `name` into `folder` and returns the file.
    ///
    /// # Errors
    /// The download fails.
    pub fn download(&self, name: &str, folder: &Path, log: &Log) -> Result<PathBuf> {
        cache::create_folder(folder)?;
        log.stage(
            &format!("downloading {name}"),
            self.command("apt-get")
                .args(["download", name])
                .current_dir(folder),
        )?;
        package_files(folder)?
            .into_iter()
            .find(|path| file_name(path).starts_with(&format!("{name}_")))
            .ok_or_else(|| Error::Unusable(format!("apt-get brought no file of {name}")))
    }

    /// Names the packages that `name` directly depends on.
    ///
    /// # Errors
    /// The package is not known.
    pub fn dependencies(&self, name: &str) -> Result<Vec<String>> {
        let text = run::capture(self.command("apt-cache").args(["depends", name]))?;
        Ok(text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_string)
            .collect())
    }

    /// Makes a command of apt's that reads this configuration instead of the system's.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("APT_CONFIG", self.folder.join("apt.conf"))
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C.UTF-8");
        command
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, text).map_err(Error::file("write", &path))
    }

    /// The network settings come from the system, all else is ours: the system's hooks and pins
    /// must not act here.
    fn configuration(&self) -> Result<String> {
        let system = run::capture(Command::new("apt-config").arg("dump"))?;
        let mut text: String = system
            .lines()
            .filter(|line| line.starts_with("Acquire::"))
            .map(|line| format!("{line}\n"))
            .collect();
        let folder = self.folder.display();
        let debian = arch::DEBIAN;
        text.push_str(&format!(
            "Acquire::Languages \"none\";\n\
             APT::Architecture \"{debian}\";\n\
             APT::Architectures {{ \"{debian}\"; }};\n\
             APT::Sandbox::User \"root\";\n\
             Dir::Etc::main \"/dev/null\";\n\
             Dir::Etc::parts \"/dev/null\";\n\
             Dir::Etc::sourcelist \"/dev/null\";\n\
             Dir::Etc::sourceparts \"{folder}/parts\";\n\
             Dir::Etc::preferences \"/dev/null\";\n\
             Dir::Etc::preferencesparts \"/dev/null\";\n\
             Dir::State \"{folder}/state\";\n\
             Dir::State::status \"{folder}/status\";\n\
             Dir::Cache \"{folder}\";\n"
        ));
        Ok(text)
    }
}

/// Lists the Debian packages in `folder`, sorted.
fn package_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::file("read", folder))? {
        files.push(entry.map_err(Error::file("read", folder))?.path());
    }
    files.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
    files.sort();
    Ok(files)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
