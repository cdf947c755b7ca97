// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Both ends of the control socket: requests that a backend reads, and what a client takes for a backend's answers.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::sync::OnceLock;
use std::time::Duration;

use pcow_protocol::control::Client;

#[path = "../../../pcow-backend/src/control/frame.rs"]
#[allow(
    dead_code,
    reason = "a module of the backend, of which only what reads messages is tried"
)]
mod frame;
#[path = "../../../pcow-backend/src/control/request.rs"]
#[allow(
    dead_code,
    reason = "a module of the backend, of which only what reads messages is tried"
)]
mod request;

static SOCKET: OnceLock<(tempfile::TempDir, UnixListener)> = OnceLock::new();

/// How long a client waits for what never comes.
const PATIENCE: Duration = Duration::from_millis(20);

fn as_backend(data: &[u8]) {
    let mut frames = frame::Frames::default();
    for byte in data {
        match frames.push(*byte) {
            Ok(Some(message)) => answer(&message),
            Ok(None) => {}
            Err(_) => return,
        }
    }
}

fn answer(message: &[u8]) {
    let (result, id) = match request::Request::parse(message) {
        Ok(mut request) => {
            let _ = request.arguments.text("name");
            let _ = request.arguments.needed("snapshot");
            let _ = (
                request.arguments.number("n"),
                request.arguments.list("enable"),
            );
            let command = request.command.into();
            (request.arguments.finish().map(|()| command), request.id)
        }
        Err((refusal, id)) => (Err(refusal), id),
    };
    let text = request::answer(result, id).to_string();
    assert!(!text.contains('\n'), "one line");
    let _: serde_json::Value = serde_json::from_str(&text).expect("JSON");
}

fn as_client(data: &[u8]) {
    let (dir, listener) = SOCKET.get_or_init(|| {
        let dir = crate::support::scratch();
        let listener = UnixListener::bind(dir.path().join("control.sock")).expect("a socket");
        listener.set_nonblocking(true).expect("does not wait");
        (dir, listener)
    });
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            if let Ok(Some(mut client)) = Client::connect(dir.path(), None) {
                let _ = client.execute("x", serde_json::json!({}), PATIENCE);
                let _ = client.next_event(PATIENCE);
            }
        });
        while !client.is_finished() {
            if let Ok((mut peer, _)) = listener.accept() {
                let _ = peer.write_all(data);
            }
            std::thread::yield_now();
        }
    });
}

/// Tries an input; `false` if it is not one for this target.
#[must_use]
pub fn run(data: &[u8]) -> bool {
    match data.split_first() {
        Some((first, data)) if first & 1 == 0 => as_backend(data),
        Some((_, data)) => as_client(data),
        None => return false,
    }
    true
}
