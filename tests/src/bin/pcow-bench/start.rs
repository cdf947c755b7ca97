// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long a backend takes from its start until it listens, and until it has served a first load.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pcow_format::MAX_VIRTUAL_BYTES;
use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::memory::Memory;
use pcow_tests::program;
use pcow_tests::scratch::Scratch;

use crate::place::Place;
use crate::stats::text;
use crate::{CLUSTER, Effort};

/// Milliseconds.
struct Start {
    listening: f64,
    served: f64,
}

/// Prints a table.
pub fn report(place: &Place, effort: &Effort) {
    let scratch = Scratch::below(&place.dir);
    let small = scratch.image("small", 1 << 30, CLUSTER);
    let large = scratch.image("large", MAX_VIRTUAL_BYTES, CLUSTER);
    let mut starts = [Vec::new(), Vec::new()];
    for _ in 0..effort.starts {
        starts[0].push(start(&small));
        starts[1].push(start(&large));
    }
    println!(
        "| start on {} | listening, ms | first load served, ms |",
        place.filesystem
    );
    println!("|---|---|---|");
    for (name, starts) in ["1 GiB", "8 TiB − 2 MiB"].iter().zip(&starts) {
        let listening = text(starts.iter().map(|s| s.listening).collect(), 1);
        let served = text(starts.iter().map(|s| s.served).collect(), 1);
        println!("| {name} | {listening} | {served} |");
    }
}

fn start(image: &Path) -> Start {
    let socket = image.with_extension("sock");
    let begin = Instant::now();
    let mut backend = Command::new(program("pcow-backend"))
        .arg("--socket")
        .arg(&socket)
        .arg("--image")
        .arg(image)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let stream = loop {
        if let Ok(stream) = UnixStream::connect(&socket) {
            break stream;
        }
        assert!(backend.try_wait().unwrap().is_none(), "the backend ended");
        std::thread::sleep(Duration::from_micros(100));
    };
    let listening = begin.elapsed();
    let frontend = Frontend::from_stream(stream, &FrontendOptions::default()).unwrap();
    assert_eq!(Memory::new(frontend.region()).load(0), 0);
    let served = begin.elapsed();
    drop(frontend);
    backend.kill().unwrap();
    backend.wait().unwrap();
    Start {
        listening: listening.as_secs_f64() * 1e3,
        served: served.as_secs_f64() * 1e3,
    }
}
