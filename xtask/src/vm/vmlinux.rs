//! From Debian's compressed kernel image (bzImage) to the ELF file inside.
//!
//! QEMU boots an ELF kernel directly (PVH), which saves a test machine the decompression.

use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

/// The compressed kernel inside a bzImage and the program that unpacks it.
///
/// Kernel documentation, `arch/x86/boot.rst`: `setup_sects` at 0x1f1, `payload_offset` at
/// 0x248 and `payload_length` at 0x24c, counted from the end of the set-up sectors.
fn payload(image: &[u8]) -> Result<(&'static str, &[u8])> {
    let u32_at = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize)
    };
    ensure!(image.get(0x202..0x206) == Some(b"HdrS".as_slice()), "not a Linux kernel image");
    let sectors = match image.get(0x1f1) {
        Some(0) => 4,
        Some(&n) => usize::from(n),
        None => bail!("too short for a kernel image"),
    };
    let start = (sectors + 1) * 512 + u32_at(0x248).context("too short for a kernel image")?;
    let length = u32_at(0x24c).context("too short for a kernel image")?;
    let bytes = image.get(start..start + length).context("its payload lies outside the file")?;
    // The unpacked size follows, which the programs would take for garbage.
    let stripped = &bytes[..length.saturating_sub(4)];
    match bytes {
        [0x02, 0x21, 0x4c, 0x18, ..] => Ok(("lz4", stripped)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(("zstd", stripped)),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Ok(("xz", stripped)),
        [a, b, c, d, ..] => bail!("unknown compression {a:02x} {b:02x} {c:02x} {d:02x}"),
        _ => bail!("its payload is empty"),
    }
}

/// Unpacks the kernel `image` to the ELF file `to`.
///
/// # Errors
/// When the image is damaged or lz4, zstd or xz is missing.
pub fn extract(image: &Path, to: &Path) -> Result<()> {
    let name = || format!("failed to unpack {}", image.display());
    let bytes = fs::read(image).with_context(name)?;
    let (program, packed) = payload(&bytes).with_context(name)?;
    let partial = to.with_extension("partial");
    let packed_file = to.with_extension("packed");
    fs::write(&packed_file, packed)?;
    let out = File::create(&partial)?;
    let status = Command::new(program)
        .arg("-dc")
        .stdin(File::open(&packed_file)?)
        .stdout(out)
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("failed to start {program}"))?;
    fs::remove_file(&packed_file)?;
    let head = fs::read(&partial)?;
    ensure!(head.starts_with(b"\x7fELF"), "{}: {program} ended with {status}", name());
    fs::rename(&partial, to).with_context(name)
}

#[cfg(test)]
mod tests {
    use super::payload;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 16;
        image[0x24c] = payload.len() as u8;
        image.extend_from_slice(&[0; 16]);
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn payload_is_found_behind_the_set_up_sectors() {
        let image = image(b"\x28\xb5\x2f\xfdkernelSIZE");
        assert_eq!(payload(&image).unwrap(), ("zstd", b"\x28\xb5\x2f\xfdkernel".as_slice()));
    }

    #[test]
    fn damaged_images_are_errors() {
        assert!(payload(b"MZ").is_err());
        assert!(payload(&image(b"what is this")).is_err());
        let mut short = image(b"\x28\xb5\x2f\xfdkernelSIZE");
        short.truncate(short.len() - 5);
        assert!(payload(&short).is_err());
    }
}
