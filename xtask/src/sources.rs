// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds in the host's own apt sources where it gets Debian from.
//!
//! Reads both forms that apt knows (sources.list(5)): one-line entries and deb822 stanzas. Looks
//! only for the archive that carries the host's release; knows no mirror by name.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A Debian archive as the host is configured to use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    uris: String,
    /// The value of `Signed-By`: a key file, fingerprints, or a whole key, lines and all.
    signed_by: Option<String>,
}

/// One entry or stanza.
#[derive(Debug, Default)]
struct Entry {
    types: String,
    uris: String,
    suites: String,
    components: String,
    signed_by: Option<String>,
    disabled: bool,
}

impl Archive {
    /// Finds the archive from which the host gets the release `codename`.
    ///
    /// # Errors
    /// No source of the host carries it.
    pub fn of_host(codename: &str) -> Result<Self> {
        let files = source_files(Path::new("/etc/apt"))?;
        files
            .iter()
            .filter_map(|path| Some((path, fs::read_to_string(path).ok()?)))
            .find_map(|(path, text)| find(&parse(path, &text), codename))
            .ok_or_else(|| {
                Error::Unusable(format!(
                    "no apt source of this machine carries \"{codename} main\" of Debian; \
                     Debian 12 or 13 is needed"
                ))
            })
    }

    /// Writes a deb822 stanza for `suite` of this archive; `types` is `deb` or `deb-src`.
    pub fn stanza(&self, types: &str, suite: &str) -> String {
        let mut text = format!(
            "Types: {types}\nURIs: {}\nSuites: {suite}\nComponents: main\n",
            self.uris
        );
        if let Some(signed_by) = &self.signed_by {
            text.push_str(&format!("Signed-By: {signed_by}\n"));
        }
        text
    }
}

/// Reads the host's release name from os-release(5).
///
/// # Errors
/// The file cannot be read or names no release.
pub fn host_codename() -> Result<String> {
    let path = Path::new("/etc/os-release");
    let text = fs::read_to_string(path).map_err(Error::file("read", path))?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|value| value.trim_matches('"').to_string())
        .ok_or_else(|| Error::Unusable("/etc/os-release has no VERSION_CODENAME".into()))
}

/// Lists the files that sources.list(5) names, in apt's order.
fn source_files(etc_apt: &Path) -> Result<Vec<PathBuf>> {
    let parts = etc_apt.join("sources.list.d");
    let mut files = Vec::new();
    if let Ok(folder) = fs::read_dir(&parts) {
        for entry in folder {
            files.push(entry.map_err(Error::file("read", &parts))?.path());
        }
    }
    files.retain(|path| has_extension(path, "list") || has_extension(path, "sources"));
    files.sort();
    files.insert(0, etc_apt.join("sources.list"));
    Ok(files)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

fn parse(path: &Path, text: &str) -> Vec<Entry> {
    if has_extension(path, "sources") {
        parse_stanzas(text)
    } else {
        text.lines().filter_map(parse_line).collect()
    }
}

fn find(entries: &[Entry], codename: &str) -> Option<Archive> {
    entries
        .iter()
        .find(|entry| entry.carries(codename))
        .map(|entry| Archive {
            uris: entry.uris.clone(),
            signed_by: entry.signed_by.clone(),
        })
}

impl Entry {
    fn carries(&self, codename: &str) -> bool {
        !self.disabled
            && has_word(&self.types, "deb")
            && has_word(&self.suites, codename)
            && has_word(&self.components, "main")
    }

    fn set(&mut self, field: &str, value: &str) {
        match field.to_ascii_lowercase().as_str() {
            "types" => self.types = value.to_string(),
            "uris" => self.uris = value.to_string(),
            "suites" => self.suites = value.to_string(),
            "components" => self.components = value.to_string(),
            "signed-by" => self.signed_by = Some(value.to_string()),
            "enabled" => self.disabled = is_no(value),
            _ => {}
        }
    }
}

fn has_word(text: &str, word: &str) -> bool {
    text.split_whitespace().any(|found| found == word)
}

/// The words that apt takes for a negative answer.
fn is_no(value: &str) -> bool {
    matches!(
        value.to_ascii_lowercase().as_str(),
        "no" | "false" | "without" | "off" | "disable" | "0"
    )
}

fn parse_stanzas(text: &str) -> Vec<Entry> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines
        .split(|line| line.trim().is_empty())
        .filter(|stanza| !stanza.is_empty())
        .map(parse_stanza)
        .collect()
}

fn parse_stanza(lines: &[&str]) -> Entry {
    let mut entry = Entry::default();
    for (field, value) in fields(lines) {
        entry.set(&field, value.trim());
    }
    entry
}

/// Joins each field with its continuation lines, which begin with a blank.
fn fields(lines: &[&str]) -> Vec<(String, String)> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in lines {
        match (line.starts_with([' ', '\t']), fields.last_mut()) {
            (true, Some((_, value))) => value.push_str(&format!("\n{line}")),
            _ => fields.extend(
                line.split_once(':')
                    .map(|(field, value)| (field.to_string(), value.to_string())),
            ),
        }
    }
    fields
}

/// Parses `deb [ option=value ... ] uri suite component ...`.
fn parse_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let (types, rest) = line.split_once(char::is_whitespace)?;
    let (options, rest) = split_options(rest.trim())?;
    let mut words = rest.split_whitespace();
    Some(Entry {
        types: types.to_string(),
        uris: words.next()?.to_string(),
        suites: words.next()?.to_string(),
        components: words.collect::<Vec<_>>().join(" "),
        signed_by: signed_by_option(options),
        disabled: false,
    })
}

fn split_options(rest: &str) -> Option<(&str, &str)> {
    match rest.strip_prefix('[') {
        Some(inner) => inner.split_once(']'),
        None => Some(("", rest)),
    }
}

fn signed_by_option(options: &str) -> Option<String> {
    options
        .split_whitespace()
        .find_map(|option| option.strip_prefix("signed-by="))
        .map(str::to_string)
}

#[cfg(test)]
mod tests {
    use super::{Archive, find, parse};
    use std::path::Path;

    fn search(file: &str, text: &str) -> Option<Archive> {
        find(&parse(Path::new(file), text), "bookworm")
    }

    #[test]
    fn a_stanza_is_found_behind_other_and_disabled_ones() {
        let text = "Types: deb\nURIs: https://other.invalid/\nSuites: stable\nComponents: main\n\n\
                    Enabled: no\nTypes: deb\nURIs: https://off.invalid/\nSuites: bookworm\nComponents: main\n\n\
                    # A note\nTypes: deb deb-src\nURIs: https://mirror.invalid/debian\n\
                    Suites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: /keys/debian.gpg\n";
        let archive = search("debian.sources", text).unwrap();
        assert_eq!(
            archive.stanza("deb-src", "trixie"),
            "Types: deb-src\nURIs: https://mirror.invalid/debian\nSuites: trixie\n\
             Components: main\nSigned-By: /keys/debian.gpg\n"
        );
    }

    #[test]
    fn a_key_inside_a_stanza_is_passed_on_line_by_line() {
        let text = "Types: deb\nURIs: https://mirror.invalid/debian\nSuites: bookworm\nComponents: main\n\
                    Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDMEY\n -----END PGP PUBLIC KEY BLOCK-----\n";
        let stanza = search("a.sources", text).unwrap().stanza("deb", "bookworm");
        assert!(
            stanza.contains("BLOCK-----\n .\n mDMEY\n -----END"),
            "{stanza}"
        );
    }

    #[test]
    fn a_one_line_entry_is_found_with_and_without_options() {
        let plain = "# comment\ndeb-src http://a.invalid/debian bookworm main\n\
                     deb http://b.invalid/debian bookworm main non-free # note\n";
        let archive = search("sources.list", plain).unwrap();
        assert_eq!(archive.uris, "http://b.invalid/debian");
        assert_eq!(archive.signed_by, None);

        let options =
            "deb [ arch=amd64 signed-by=/keys/d.gpg ] http://c.invalid/debian bookworm main\n";
        let archive = search("c.list", options).unwrap();
        assert_eq!(archive.signed_by.as_deref(), Some("/keys/d.gpg"));
    }

    #[test]
    fn security_and_foreign_suites_are_not_taken_for_the_release() {
        let text = "deb http://a.invalid/security bookworm-security main\n\
                    deb http://b.invalid/debian bookworm contrib\n";
        assert_eq!(search("sources.list", text), None);
    }
}
