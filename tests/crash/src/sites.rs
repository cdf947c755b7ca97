// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The call sites of the format, from its source.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Every site that the format's source names, outside of its tests.
pub fn all() -> BTreeSet<&'static str> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../pcow-format/src");
    let mut sites = BTreeSet::new();
    collect(&source, &mut sites);
    sites
}

fn collect(folder: &Path, sites: &mut BTreeSet<&'static str>) {
    let entries = fs::read_dir(folder).expect("the source of the format is beside this");
    for entry in entries {
        let path = entry.expect("a readable folder").path();
        if path.ends_with("medium") {
            // The seam itself makes no calls.
        } else if path.is_dir() {
            collect(&path, sites);
        } else {
            let text = fs::read_to_string(&path).expect("a source file");
            let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or("");
            let named = text.split("Site(\"").skip(1);
            let names = named.filter_map(|rest| rest.split('"').next());
            // Once in the life of a program, and few.
            sites.extend(names.map(|name| &*name.to_owned().leak()));
        }
    }
}

/// Calls of the guest and of the user: not the format's.
pub fn is_of_others(site: &str) -> bool {
    site.starts_with("guest.") || site.starts_with("user.")
}
