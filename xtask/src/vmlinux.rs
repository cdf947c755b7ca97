// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes the kernel out of a bzImage, which else unpacks itself at every boot: under emulation that
//! is the longest part of one. QEMU boots the result by its PVH entry.
//!
//! Offsets are those of the kernel's documentation, `arch/x86/boot.rst`, "The Real-Mode Kernel Header".

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, Result};
use crate::run;

const SECTOR: usize = 512;
const SETUP_SECTS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// How a payload begins that is compressed by xz. Behind the end is the size, in four bytes.
const XZ_MAGIC: &[u8] = b"\xfd7zXZ\0";
const SIZE_BYTES: usize = 4;

/// Firmware that this way to boot needs, besides what every machine does.
pub const FIRMWARE: &str = "/usr/share/qemu/pvh.bin";

/// Writes the kernel of `image` to `kernel`. One that is not compressed by xz is left as it is.
///
/// # Errors
/// A file cannot be read or written, or `xz` fails.
pub fn extract(image: &Path, kernel: &Path) -> Result<()> {
    let bytes = fs::read(image).map_err(Error::file("read", image))?;
    let Some(stream) = xz_stream(&bytes) else {
        return fs::write(kernel, bytes).map_err(Error::file("write", kernel));
    };
    let packed: PathBuf = kernel.with_extension("xz");
    fs::write(&packed, stream).map_err(Error::file("write", &packed))?;
    let output = File::create(kernel).map_err(Error::file("create", kernel))?;
    let input = File::open(&packed).map_err(Error::file("open", &packed))?;
    let status = Command::new("xz")
        .arg("-dc")
        .stdin(Stdio::from(input))
        .stdout(output)
        .status()
        .map_err(run::start_error("xz"))?;
    if !status.success() {
        return Err(Error::Program {
            program: "xz".into(),
            status,
            output: String::new(),
        });
    }
    fs::remove_file(&packed).map_err(Error::file("remove", &packed))
}

/// The compressed kernel in a bzImage.
fn xz_stream(image: &[u8]) -> Option<&[u8]> {
    let sectors = usize::from(*image.get(SETUP_SECTS)?);
    let code = (sectors + 1) * SECTOR;
    let start = code.checked_add(number(image, PAYLOAD_OFFSET)?)?;
    let end = start.checked_add(number(image, PAYLOAD_LENGTH)?)?;
    let payload = image.get(start..end.checked_sub(SIZE_BYTES)?)?;
    payload.starts_with(XZ_MAGIC).then_some(payload)
}

fn number(image: &[u8], at: usize) -> Option<usize> {
    let bytes = image.get(at..at + 4)?;
    usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
}

#[cfg(test)]
mod tests {
    use super::{PAYLOAD_LENGTH, PAYLOAD_OFFSET, SETUP_SECTS, XZ_MAGIC, xz_stream};

    /// One sector of setup; the payload follows at once.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTS] = 1;
        let length = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend(payload);
        image
    }

    #[test]
    fn only_what_xz_has_packed_is_found_without_the_size_behind_it() {
        let payload = [XZ_MAGIC, b"kernel", &[6, 0, 0, 0]].concat();
        let stream = [XZ_MAGIC, b"kernel"].concat();
        assert_eq!(xz_stream(&image(&payload)), Some(&stream[..]));
        assert_eq!(xz_stream(&image(b"another format")), None);
        assert_eq!(xz_stream(&image(&payload)[..1030]), None);
        assert_eq!(xz_stream(b""), None);
        let mut outside = image(&payload);
        outside[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(xz_stream(&outside), None);
    }
}
