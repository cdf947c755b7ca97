// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tool as users run it: the real program, on images on the real filesystem.
#![allow(missing_docs, clippy::unwrap_used)]

mod changing;
mod content;
mod converting;
mod creating;
mod deep;
mod examples;
mod harness;
mod limits_of_files;
mod refusing;
mod repairing;
mod showing;
mod sizes;
mod spellings;
mod streaming;
