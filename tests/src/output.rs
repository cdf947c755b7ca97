// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a child process says, collected while it runs.

use std::io::Read;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// The text that came through a pipe so far.
#[derive(Debug)]
pub struct Output {
    text: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

impl Output {
    /// Collects from `pipe` until its end.
    pub fn of(pipe: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let sink = Arc::clone(&text);
        let reader = std::thread::spawn(move || collect(pipe, &sink));
        Self { text, reader }
    }

    /// What came so far. Carriage returns are left out.
    pub fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    /// Whether the pipe has ended, and [`Output::text`] is all there is.
    pub fn is_complete(&self) -> bool {
        self.reader.is_finished()
    }
}

fn collect(mut pipe: impl Read, sink: &Mutex<String>) {
    let mut bytes = [0; 4096];
    loop {
        let got = pipe.read(&mut bytes).unwrap_or(0);
        if got == 0 {
            return;
        }
        let text = String::from_utf8_lossy(&bytes[..got]).replace('\r', "");
        sink.lock().unwrap().push_str(&text);
    }
}
