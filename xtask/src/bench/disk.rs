//! A loop device with direct I/O on a file in memory, as a fast disk.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Both go when dropped.
pub struct LoopDevice(
    PathBuf,
    #[expect(dead_code, reason = "removed when dropped")] tempfile::TempDir,
);

impl LoopDevice {
    /// Makes it, 256 MiB, all of it written.
    ///
    /// # Errors
    /// Without root or `losetup`.
    pub fn new() -> Result<Self> {
        let folder = tempfile::tempdir_in("/dev/shm")?;
        let file = folder.path().join("disk");
        fs::write(&file, vec![1; 256 << 20])?;
        let out = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size", "4096"])
            .arg(&file)
            .output()
            .context("failed to start losetup")?;
        ensure!(out.status.success(), "losetup: {}", String::from_utf8_lossy(&out.stderr));
        Ok(Self(String::from_utf8(out.stdout)?.trim().into(), folder))
    }

    /// e.g. `/dev/loop0`.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A device that is left is seen in `losetup --list`.
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
