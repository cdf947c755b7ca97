// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The smallest frontend: attaches to a backend, loads a word from the image's memory, stores one, makes it durable.
//!
//! A virtual machine monitor does the same and then gives the region to its guest as a memory slot.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use vm_memory::Bytes;

/// Load and store a word of a served image.
#[derive(Debug, Parser)]
struct Arguments {
    /// The backend's socket.
    socket: PathBuf,
    /// Offset of the word in bytes.
    #[arg(default_value_t = 0)]
    offset: usize,
    /// What to store there; nothing is stored without it.
    value: Option<u64>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("attach: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let frontend = Frontend::connect(&arguments.socket, &FrontendOptions::default())?;
    let memory = frontend.region().volatile_slice();
    println!("image {}: {} bytes", frontend.image_uuid(), memory.len());
    // The first touch of a place is answered by the backend; later ones go to memory.
    let old: u64 = memory.read_obj(arguments.offset)?;
    println!("word at {:#x}: {old:#x}", arguments.offset);
    if let Some(value) = arguments.value {
        if frontend.is_read_only() {
            return Err("the image is served read-only".into());
        }
        memory.write_obj(value, arguments.offset)?;
        frontend.flush()?;
        println!("stored {value:#x}, durable");
    }
    Ok(())
}
