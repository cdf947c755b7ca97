// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU's monitor protocol, as far as tests need it.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::waiting::wait_until;

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    /// Events that nobody has waited for yet.
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to the monitor at `path`; it has to answer each command within `patience`.
    pub fn connect(path: &Path, patience: Duration) -> Self {
        // The socket has its name before it listens.
        let mut connected = None;
        wait_until("the monitor listens", patience, || {
            connected = UnixStream::connect(path).ok();
            connected.is_some()
        });
        let stream = connected.unwrap();
        stream.set_read_timeout(Some(patience)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut qmp = Self {
            stream,
            lines,
            events: VecDeque::new(),
        };
        assert!(qmp.receive().get("QMP").is_some());
        qmp.command("qmp_capabilities");
        qmp
    }

    /// Runs a command without arguments that has to succeed.
    pub fn command(&mut self, name: &str) -> Value {
        self.execute(name, &json!({})).unwrap()
    }

    /// Runs a command.
    ///
    /// # Errors
    /// The description of the error that QEMU answered with.
    pub fn execute(&mut self, name: &str, arguments: &Value) -> Result<Value, String> {
        let command = json!({ "execute": name, "arguments": arguments });
        writeln!(self.stream, "{command}").unwrap();
        loop {
            let mut answer = self.receive();
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap().to_owned());
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            self.events.push_back(answer);
        }
    }

    /// Waits for the next event called `name` and returns its data. Others are passed over.
    pub fn wait_for_event(&mut self, name: &str) -> Value {
        loop {
            let next = self.events.pop_front();
            let mut event = next.unwrap_or_else(|| self.receive());
            if event["event"] == name {
                return event["data"].take();
            }
        }
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("no answer: '{line}': {e}"))
    }
}
