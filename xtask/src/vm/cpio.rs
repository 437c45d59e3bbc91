//! The archive format "newc" that the kernel unpacks as its initramfs.

use std::io::{self, Write};

/// Writes members of one archive, in order; folders must come before what lies in them.
pub struct Writer<W: Write> {
    to: W,
    written: u64,
    inode: u32,
}

impl<W: Write> Writer<W> {
    /// Starts an archive.
    pub fn new(to: W) -> Self {
        Self { to, written: 0, inode: 0 }
    }

    /// A folder, mode 755.
    pub fn folder(&mut self, name: &str) -> io::Result<()> {
        self.member(name, 0o040_755, &[])
    }

    /// A file with these permission bits.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.member(name, 0o100_000 | permissions, content)
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<()> {
        self.member("TRAILER!!!", 0, &[])?;
        self.to.flush()
    }

    fn member(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::FileTooLarge, "4 GiB or more in an initramfs")
        })?;
        let name_size = name.len() as u32 + 1;
        // magic, then inode, mode, uid, gid, links, mtime, size, 2 × device, 2 × rdev, name, check
        let mut head = b"070701".to_vec();
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            write!(head, "{field:08X}")?;
        }
        head.extend_from_slice(name.as_bytes());
        head.push(0);
        self.put(&head)?;
        self.put(content)
    }

    /// Writes and pads to four bytes.
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.written += bytes.len() as u64;
        let padding = (4 - self.written % 4) % 4;
        self.written += padding;
        self.to.write_all(&[0; 4][..padding as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::Writer;

    #[test]
    fn members_are_aligned_and_the_trailer_ends_it() {
        let mut bytes = Vec::new();
        let mut archive = Writer::new(&mut bytes);
        archive.folder("bin").unwrap();
        archive.file("bin/a", 0o755, b"hello").unwrap();
        archive.finish().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("07070100000001000041ED"));
        let second = text.match_indices("070701").nth(1).unwrap().0;
        assert_eq!(second % 4, 0);
        assert!(text[second..].starts_with("07070100000002000081ED"));
        assert!(text.contains("TRAILER!!!"));
        assert_eq!(bytes.len() % 4, 0);
    }
}
