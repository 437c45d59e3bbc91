//! What a process holds: memory, files, inotify watches.

use anyhow::{Context, Result};
use std::fs;

/// Of one process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Resident memory, KiB.
    pub resident_kib: u64,
    /// Open file descriptors.
    pub files: usize,
    /// inotify watches, of all its descriptors.
    pub watches: usize,
}

impl Footprint {
    /// Of the process `pid`; `self` is the caller's.
    pub fn of(pid: &str) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|kib| kib.trim().trim_end_matches(" kB").parse().ok());
        let infos: Vec<String> = fs::read_dir(format!("/proc/{pid}/fdinfo"))?
            .flatten()
            // That of the folder being read is closed by now.
            .flat_map(|info| fs::read_to_string(info.path()))
            .collect();
        let lines = infos.iter().flat_map(|info| info.lines());
        Ok(Self {
            resident_kib: resident.context("no VmRSS")?,
            files: infos.len(),
            watches: lines.filter(|line| line.starts_with("inotify wd")).count(),
        })
    }
}
