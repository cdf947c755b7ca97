// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sizes as users write and read them.

use std::fmt;

use pcow_format::{ClusterSize, MAX_VIRTUAL_BYTES, SIZE_STEP_BYTES, VirtualSize};

/// Largest allocation unit: 1 GiB.
const MAX_UNIT_BYTES: u64 = 1 << 30;
const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

/// A number of bytes; shown in the largest binary unit that is not over it, with at most one decimal.
#[derive(Debug, Clone, Copy)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((unit, bits)) = UNITS.iter().find(|(_, bits)| self.0 >> bits > 0) else {
            return write!(f, "{} bytes", self.0);
        };
        let (whole, rest) = (self.0 >> bits, self.0 & ((1 << bits) - 1));
        match (u128::from(rest) * 10) >> bits {
            0 => write!(f, "{whole} {unit}iB"),
            tenth => write!(f, "{whole}.{tenth} {unit}iB"),
        }
    }
}

/// A number of bytes, or a number with K, M, G or T (binary, also written `KiB` and so on).
///
/// # Errors
/// A sentence for the user if the text is something else.
pub fn bytes(text: &str) -> Result<u64, String> {
    let upper = text.to_ascii_uppercase();
    let short = upper.strip_suffix("IB").unwrap_or(&upper);
    let with_unit = UNITS
        .iter()
        .find_map(|(unit, bits)| Some((short.strip_suffix(unit)?, *bits)));
    let (digits, bits) = match with_unit {
        Some(parts) => parts,
        None => (upper.as_str(), 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        let what = "is not a size: give bytes, or a number with K, M, G or T, such as 64K or 128G";
        return Err(format!("'{text}' {what}"));
    }
    let number = digits.parse::<u64>().ok();
    number
        .and_then(|n| n.checked_mul(1 << bits))
        .ok_or_else(|| format!("'{text}' is more than any image can have"))
}

/// A size that a disk can have.
///
/// # Errors
/// A sentence for the user that names the nearest possible sizes.
pub fn virtual_size(bytes: u64) -> Result<VirtualSize, String> {
    VirtualSize::new(bytes).map_err(|_| {
        let nearest = nearest_sizes(bytes);
        format!("a disk of {bytes} bytes is not possible: sizes are multiples of 2M; {nearest}")
    })
}

fn nearest_sizes(bytes: u64) -> String {
    let mib = |bytes: u64| format!("{}M", bytes >> 20);
    let below = bytes / SIZE_STEP_BYTES * SIZE_STEP_BYTES;
    if bytes > MAX_VIRTUAL_BYTES {
        format!("the largest is {}", mib(MAX_VIRTUAL_BYTES))
    } else if below == 0 {
        format!("the smallest is {}", mib(SIZE_STEP_BYTES))
    } else {
        let above = below + SIZE_STEP_BYTES;
        format!("the nearest are {} and {}", mib(below), mib(above))
    }
}

/// A size that clusters can have.
///
/// # Errors
/// A sentence for the user.
pub fn cluster(text: &str) -> Result<ClusterSize, String> {
    ClusterSize::new(bytes(text)?).map_err(|e| e.to_string())
}

/// A number of bytes that may be allocated at a time; that it is not under the cluster size is checked elsewhere.
///
/// # Errors
/// A sentence for the user.
pub fn allocation_unit(text: &str) -> Result<u64, String> {
    let unit = bytes(text)?;
    if unit.is_power_of_two() && unit <= MAX_UNIT_BYTES {
        return Ok(unit);
    }
    Err(format!(
        "an allocation unit of {unit} bytes is not possible: it must be a power of two up to 1G"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_binary_and_plain_numbers_are_bytes() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("64K"), Ok(65_536));
        assert_eq!(bytes("128g"), Ok(128 << 30));
        assert_eq!(bytes("8TiB"), Ok(8 << 40));
        for wrong in [
            "",
            "K",
            "1.5G",
            "-1",
            "+1",
            "0x10",
            "5X",
            "1iB",
            "17179869184T",
        ] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_size_between_the_steps_is_refused_with_its_neighbours() {
        let refusal = |bytes| virtual_size(bytes).unwrap_err();
        assert!(refusal((5 << 20) + 1).ends_with("the nearest are 4M and 6M"));
        assert!(refusal(0).ends_with("the smallest is 2M"));
        assert!(refusal(1 << 20).ends_with("the smallest is 2M"));
        assert!(refusal(8 << 40).ends_with("the largest is 8388606M"));
        assert!(refusal(u64::MAX).ends_with("the largest is 8388606M"));
        assert_eq!(virtual_size(4 << 20).unwrap().bytes(), 4 << 20);
    }

    #[test]
    fn sizes_are_shown_in_the_unit_that_fits() {
        let text = |bytes| Bytes(bytes).to_string();
        assert_eq!(text(512), "512 bytes");
        assert_eq!(text(65_536), "64 KiB");
        assert_eq!(text((17 << 20) / 10), "1.6 MiB");
        assert_eq!(text(128 << 30), "128 GiB");
        assert_eq!(text(u64::MAX), "16777215.9 TiB");
    }
}
