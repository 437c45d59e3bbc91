//! Files of procfs and cgroupfs: reading them, and the forms they share.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The value of a line `key value`.
pub fn key(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Up to `limit` bytes from the start of a file of procfs or cgroupfs, which is made anew
/// for each read at offset 0.
///
/// # Errors
/// Those of `pread`.
pub fn read_at_start(file: &File, limit: usize) -> io::Result<String> {
    let mut buffer = vec![0; limit.min(4096)];
    let mut filled = 0;
    loop {
        match file.read_at(&mut buffer[filled..], filled as u64)? {
            0 => break,
            n => filled += n,
        }
        if filled == limit {
            break;
        }
        if filled == buffer.len() {
            buffer.resize((buffer.len() * 2).min(limit), 0);
        }
    }
    buffer.truncate(filled);
    Ok(String::from_utf8_lossy(&buffer).into_owned())
}
