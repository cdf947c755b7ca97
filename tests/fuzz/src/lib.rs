// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What comes from outside, and programs of operations, as a fuzzer makes them up.
//!
//! A target takes any bytes and does with them what the product does; it panics if something is wrong. `fuzz/` has a fuzzer find
//! bytes for each; the corpus there is tried by this crate's tests.

pub mod control;
pub mod frames;
pub mod image_directory;
pub mod map_file;
pub mod operations;
pub mod stream;
pub mod support;
