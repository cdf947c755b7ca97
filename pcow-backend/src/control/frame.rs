// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Cuts a stream of bytes into JSON objects. Clients of QMP need not end a message with a newline, so the end of an object
//! is found by its brackets. Pure; every size is bounded before anything is kept.

/// Longest message, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// Deepest nesting of brackets.
pub const MAX_DEPTH: usize = 16;

/// Why the stream cannot be followed any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Something stands where an object must begin.
    #[error("a message must be a JSON object")]
    NoObject,
    /// More than [`MAX_MESSAGE_BYTES`].
    #[error("a message may have at most {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    /// More than [`MAX_DEPTH`].
    #[error("a message may be nested at most {MAX_DEPTH} deep")]
    TooDeep,
}

/// A message on its way.
#[derive(Debug, Default)]
pub struct Frames {
    message: Vec<u8>,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Frames {
    /// Takes the next byte; returns a message if it ends one. Whether it is valid JSON is for the parser.
    ///
    /// # Errors
    /// The stream is lost: where the next message begins is not known.
    pub fn push(&mut self, byte: u8) -> Result<Option<Vec<u8>>, FrameError> {
        if self.message.is_empty() {
            match byte {
                b'{' => {}
                b' ' | b'\t' | b'\r' | b'\n' => return Ok(None),
                _ => return Err(FrameError::NoObject),
            }
        }
        if self.message.len() == MAX_MESSAGE_BYTES {
            return Err(FrameError::TooLong);
        }
        self.message.push(byte);
        if self.in_string {
            self.push_in_string(byte);
            return Ok(None);
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' if self.depth == MAX_DEPTH => return Err(FrameError::TooDeep),
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        Ok((self.depth == 0).then(|| std::mem::take(&mut self.message)))
    }

    fn push_in_string(&mut self, byte: u8) {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = true,
            b'"' => self.in_string = false,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Result<Vec<String>, FrameError> {
        let mut frames = Frames::default();
        let mut messages = Vec::new();
        for byte in text.bytes() {
            if let Some(message) = frames.push(byte)? {
                messages.push(String::from_utf8(message).unwrap());
            }
        }
        Ok(messages)
    }

    #[test]
    fn messages_end_with_their_object_whether_or_not_a_newline_follows() {
        let text = "{\"a\":1}{\"b\":\"}\\\"{\"}\r\n {\"c\":[{}]}{\"unfinished\"";
        let expected = ["{\"a\":1}", "{\"b\":\"}\\\"{\"}", "{\"c\":[{}]}"];
        assert_eq!(cut(text).unwrap(), expected);
    }

    #[test]
    fn a_message_is_bounded_in_length_and_depth_and_must_be_an_object() {
        assert_eq!(cut("[]"), Err(FrameError::NoObject));
        assert_eq!(cut("}"), Err(FrameError::NoObject));
        let deepest = "{\"a\":".repeat(MAX_DEPTH) + "1" + &"}".repeat(MAX_DEPTH);
        assert_eq!(cut(&deepest).unwrap().len(), 1);
        assert_eq!(cut(&format!("{{\"a\":{deepest}")), Err(FrameError::TooDeep));
        let fill = "x".repeat(MAX_MESSAGE_BYTES);
        assert_eq!(cut(&format!("{{\"{fill}")), Err(FrameError::TooLong));
    }
}
