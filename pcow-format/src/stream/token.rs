// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a receiver says to a sender so that it sends the rest: one word without spaces.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use super::UNIT_BYTES;
use crate::error::{Error, ErrorKind};

/// How far a stream was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// UUID of the snapshot.
    pub snapshot: Uuid,
    /// UUID of the one that the stream continues.
    pub from: Option<Uuid>,
    /// The first byte of the disk that is to be sent.
    pub start: u64,
}

/// In place of a UUID in a full stream.
const FULL: &str = "full";

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = self.from.map_or(FULL.to_owned(), |u| u.to_string());
        let text = format!("{}.{from}.{:x}", self.snapshot, self.start);
        write!(f, "{text}.{:08x}", crc32c::crc32c(text.as_bytes()))
    }
}

impl FromStr for Token {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parts: Vec<_> = text.splitn(5, '.').collect();
        let parsed = || {
            let [snapshot, from, start, _] = parts[..] else {
                return None;
            };
            let from = (from != FULL).then(|| Uuid::parse_str(from)).transpose();
            Some(Self {
                snapshot: Uuid::parse_str(snapshot).ok()?,
                from: from.ok()?,
                start: u64::from_str_radix(start, 16).ok()?,
            })
        };
        // The checksum and the one form that each token has: a word that was cut off or mistyped is none.
        parsed()
            .filter(|token| token.to_string() == text && token.start.is_multiple_of(UNIT_BYTES))
            .ok_or_else(|| {
                let what = "this is not what 'receive --token' has printed";
                Error::new(ErrorKind::InvalidArgument, what)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_and_a_word_that_is_changed_or_cut_is_none() {
        for from in [None, Some(Uuid::from_u128(2))] {
            let token = Token {
                snapshot: Uuid::from_u128(1),
                from,
                start: 0x2000,
            };
            let text = token.to_string();
            assert_eq!(text.parse::<Token>().unwrap(), token);
            for at in 0..text.len() {
                assert!(text[..at].parse::<Token>().is_err());
                let mut other = text.clone().into_bytes();
                other[at] = if other[at] == b'0' { b'1' } else { b'0' };
                let other = String::from_utf8(other).unwrap();
                assert!(other.parse::<Token>().is_err(), "{other}");
            }
        }
    }
}
