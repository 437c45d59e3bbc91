//! Block devices with a load of known size, for the tests of block I/O latency.

use crate::vm_cgroup::VmCgroup;
use formtune_agent::sense::cgroup::Hierarchies;
use formtune_common::block::Counters;
use serde::Deserialize;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

/// A loop device with direct I/O on a file of its own; both are removed when dropped.
pub struct LoopDevice {
    path: PathBuf,
    _folder: tempfile::TempDir,
    /// The kernel keeps a loop device's settings when its file is taken away.
    found: Mutex<Vec<(String, String)>>,
}

impl LoopDevice {
    /// Makes it, 64 MiB, all of it written, with statistics and without merging.
    ///
    /// # Panics
    /// If it cannot be made: these tests need root and `losetup`.
    pub fn new() -> Self {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("target");
        fs::create_dir_all(&target).unwrap();
        let folder = tempfile::tempdir_in(target).unwrap();
        let file = folder.path().join("disk");
        fs::write(&file, vec![1; 64 << 20]).unwrap();
        let out = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on"])
            .arg(&file)
            .output()
            .unwrap();
        assert!(out.status.success(), "losetup: {}", String::from_utf8_lossy(&out.stderr));
        let path = String::from_utf8(out.stdout).unwrap().trim().into();
        let device = Self { path, _folder: folder, found: Mutex::default() };
        device.set("nomerges", "2");
        device.set("iostats", "1");
        device
    }

    /// e.g. `/dev/loop0`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// e.g. `loop0`.
    pub fn name(&self) -> &str {
        self.path.file_name().unwrap().to_str().unwrap()
    }

    /// What the kernel itself says of its reads: how many, and the sum of their times from
    /// queued to done in milliseconds (Documentation/block/stat.rst). Since boot, whatever
    /// file was behind it.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn reads(&self) -> (u64, u64) {
        let stat = self.stat();
        (stat[0], stat[3])
    }

    /// How many reads the kernel merged into others, likewise.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn merged_reads(&self) -> u64 {
        self.stat()[1]
    }

    fn stat(&self) -> Vec<u64> {
        let text = fs::read_to_string(format!("/sys/block/{}/stat", self.name())).unwrap();
        text.split_whitespace().map(|v| v.parse().unwrap()).collect()
    }

    /// One whose requests carry no times.
    ///
    /// # Panics
    /// As [`Self::new`] and [`Self::set`].
    pub fn without_times() -> Self {
        let device = Self::new();
        device.set("iostats", "0");
        device.set("wbt_lat_usec", "0");
        device
    }

    /// Writes a setting of its queue; what was found comes back at the end.
    ///
    /// # Panics
    /// If the kernel does not take it.
    pub fn set(&self, setting: &str, value: &str) {
        let path = format!("/sys/block/{}/queue/{setting}", self.name());
        let found = fs::read_to_string(&path).unwrap_or_default().trim().to_owned();
        fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
        self.found.lock().unwrap().push((path, found));
    }
}

impl Default for LoopDevice {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let found = self.found.get_mut().map(std::mem::take).unwrap_or_default();
        for (path, found) in found.into_iter().rev() {
            let _ = fs::write(path, found);
        }
        let detached = Command::new("losetup").arg("--detach").arg(&self.path).status();
        debug_assert!(detached.is_ok_and(|status| status.success()));
    }
}

/// Whose the times of the requests are that were counted between two states of the counters, none
/// of them by a map: for the README's table of kernels.
pub fn times(before: &Counters, after: &Counters) -> &'static str {
    match (after.no_queued > before.no_queued, after.no_issued > before.no_issued) {
        (false, false) => "the kernel's",
        (true, false) => "noted when queued",
        (false, true) => "noted when issued",
        (true, true) => "noted",
    }
}

/// A VM's cgroup, also in the hierarchy to which block I/O is charged.
pub struct BlockVm {
    /// The one in the hierarchy of `cpu`.
    pub group: VmCgroup,
    block: PathBuf,
}

impl BlockVm {
    /// Makes both.
    ///
    /// # Panics
    /// If they cannot be made: these tests need root.
    pub fn new(name: &str) -> Self {
        let group = VmCgroup::new(name);
        let hierarchies = Hierarchies::find(Path::new("/sys/fs/cgroup")).unwrap();
        let root = hierarchies.block.expect("a hierarchy with the io controller");
        let block = root.join(group.path().strip_prefix(&hierarchies.cpu).unwrap());
        fs::create_dir_all(&block).unwrap();
        Self { group, block }
    }

    /// Where to write the id of a process whose block I/O is to be this VM's.
    pub fn procs(&self) -> PathBuf {
        self.block.join("cgroup.procs")
    }
}

impl Drop for BlockVm {
    fn drop(&mut self) {
        let parent = self.block.parent().map(Path::to_owned).unwrap_or_default();
        for path in [&self.block, &parent] {
            // A process that has just ended leaves its cgroup a moment later.
            for _ in 0..100 {
                match fs::remove_dir(path) {
                    Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    _ => break,
                }
            }
        }
    }
}

/// What fio says that it did.
#[derive(Clone, Debug, Deserialize)]
pub struct Job {
    /// Reads.
    pub read: Direction,
    /// Writes.
    pub write: Direction,
    /// Calls of `fsync`.
    pub sync: Syncs,
}

/// Reads or writes.
#[derive(Clone, Debug, Deserialize)]
pub struct Direction {
    /// How many.
    pub total_ios: u64,
    /// From submission to completion.
    pub clat_ns: Latency,
}

/// Calls of `fsync`.
#[derive(Clone, Debug, Deserialize)]
pub struct Syncs {
    /// How many.
    pub total_ios: u64,
}

/// Times.
#[derive(Clone, Debug, Deserialize)]
pub struct Latency {
    /// Nanoseconds.
    pub mean: f64,
}

/// Runs fio with direct I/O on a device, as a process of `procs` (a `cgroup.procs`; `None`:
/// where this process is).
///
/// # Panics
/// If it fails.
pub fn fio(device: &LoopDevice, procs: Option<PathBuf>, args: &[&str]) -> Job {
    #[derive(Deserialize)]
    struct Report {
        jobs: [Job; 1],
    }
    let mut command = Command::new("fio");
    command
        .args(["--name=test", "--direct=1", "--thread", "--output-format=json"])
        .arg(format!("--filename={}", device.path().display()))
        .args(args)
        .stdin(Stdio::null());
    // SAFETY: system calls only; the path was allocated before.
    unsafe {
        command.pre_exec(move || match &procs {
            Some(procs) => fs::write(procs, "0"),
            None => Ok(()),
        })
    };
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "fio: {text}{}", String::from_utf8_lossy(&out.stderr));
    let report: Report = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let [job] = report.jobs;
    job
}
