//! What a process that senses VMs holds: memory, files, inotify watches.

use crate::wait::until;
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Files that stay open for each VM.
const FILES_PER_VM: usize = 2;

/// Of one process at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    /// Resident memory, KiB.
    resident_kib: u64,
    /// Open file descriptors.
    files: usize,
    /// VMs it knows, those of other tests and of people on this machine among them.
    vms: usize,
}

impl Footprint {
    /// Of the process `pid` (`self` is the caller's), which knows `vms`.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of(pid: &str, vms: usize) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|kib| kib.trim().trim_end_matches(" kB").parse().ok());
        let files = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        Ok(Self { resident_kib: resident.context("no VmRSS")?, files, vms })
    }

    /// # Panics
    /// When it holds more than `before`, but for what VMs that came meanwhile are due.
    #[track_caller]
    pub fn has_not_grown_since(&self, before: &Self) {
        let due = FILES_PER_VM * self.vms.saturating_sub(before.vms);
        assert!(self.files <= before.files + due + 4, "files: {self:?}, before: {before:?}");
        // Less than 2 KiB for each of 1,000 VMs: a leaked row, total or reader has more.
        let grown = self.resident_kib.saturating_sub(before.resident_kib);
        assert!(grown < 2_000, "memory: {self:?}, before: {before:?}");
    }
}

/// Waits until the process `pid` watches no directory below `root` that is gone.
///
/// # Panics
/// When it goes on doing so.
#[track_caller]
pub fn no_stale_watch(pid: &str, root: &Path) {
    until(Duration::from_secs(10), "end of the watches of what is gone", || {
        let watched = watched(pid);
        assert!(!watched.is_empty(), "it watches nothing");
        let mut there = BTreeSet::new();
        inodes(root, &mut there);
        watched.is_subset(&there).then_some(())
    });
}

/// The inodes that a process watches (proc(5), `/proc/PID/fdinfo`).
fn watched(pid: &str) -> BTreeSet<u64> {
    let files = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let infos: Vec<String> = files.flat_map(|file| fs::read_to_string(file.path())).collect();
    infos
        .iter()
        .flat_map(|info| info.lines())
        .filter(|line| line.starts_with("inotify wd"))
        .filter_map(|line| line.split("ino:").nth(1)?.split(' ').next())
        .map(|inode| u64::from_str_radix(inode, 16).expect("a number in hexadecimal"))
        .collect()
}

fn inodes(folder: &Path, found: &mut BTreeSet<u64>) {
    found.extend(fs::metadata(folder).map(|metadata| metadata.ino()).ok());
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            inodes(&entry.path(), found);
        }
    }
}
