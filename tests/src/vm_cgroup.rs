//! A cgroup shaped like a VM's, in the hierarchy that carries the `cpu` controller, and
//! processes to put into it.

use formtune_agent::sense::cgroup::Hierarchies;
use formtune_agent::vm::CgroupVersion;
use formtune_core::units::VmId;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LEAVES: [&str; 2] = ["vcpu0", "emulator"];

/// Makes directories as libvirt does for a VM on a host with systemd: `libvirt/vcpu0` and
/// `libvirt/emulator` below `path`, four cgroups in all.
///
/// # Errors
/// Those of `mkdir`.
pub fn make_tree(path: &Path) -> io::Result<()> {
    LEAVES.iter().try_for_each(|leaf| fs::create_dir_all(path.join("libvirt").join(leaf)))
}

/// Removes what [`make_tree`] made, and waits for processes in it that are ending.
///
/// # Errors
/// Those of `rmdir`.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let inner = path.join("libvirt");
    LEAVES.map(|leaf| inner.join(leaf)).iter().chain([&inner, &path.into()]).try_for_each(remove)
}

/// Removes a cgroup with all that are below it, as far as they have no processes.
pub fn remove_with_all_below(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_with_all_below(&entry.path());
        }
    }
    // Gone already is fine, and one that is in use is found by whoever looks for it.
    let _ = remove(&path.into());
}

/// Removes a cgroup; a process that has just ended leaves it a moment later.
fn remove(path: &PathBuf) -> io::Result<()> {
    for _ in 0..100 {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(20));
            }
            done => return done,
        }
    }
    fs::remove_dir(path)
}

/// `formtune-test-PID-NAME/NAME/{vcpu0,emulator}`; removed when dropped.
pub struct VmCgroup {
    name: String,
    path: PathBuf,
}

impl VmCgroup {
    /// Makes it.
    ///
    /// # Panics
    /// If it cannot be made: these tests need root.
    pub fn new(name: &str) -> Self {
        let hierarchies = Hierarchies::find(Path::new("/sys/fs/cgroup")).unwrap();
        let parent = hierarchies.cpu.join(parent(name));
        let path = parent.join(name);
        for leaf in LEAVES {
            fs::create_dir_all(path.join(leaf)).unwrap();
        }
        if hierarchies.version == CgroupVersion::V2 {
            for group in [&hierarchies.cpu, &parent] {
                fs::write(group.join("cgroup.subtree_control"), "+cpu").unwrap();
            }
        }
        Self { name: name.into(), path }
    }

    /// The pattern that names this VM and no other.
    pub fn pattern(&self) -> String {
        format!("{}/{{name}}", parent(&self.name))
    }

    /// Lets it have the CPUs for so long of each period, both in microseconds.
    ///
    /// # Panics
    /// If that cannot be written.
    pub fn limit_cpu(&self, quota: u32, period: u32) {
        let write = |file, value: String| fs::write(self.path.join(file), value).unwrap();
        match Hierarchies::find(Path::new("/sys/fs/cgroup")).unwrap().version {
            CgroupVersion::V1 => {
                write("cpu.cfs_period_us", period.to_string());
                write("cpu.cfs_quota_us", quota.to_string());
            }
            CgroupVersion::V2 => write("cpu.max", format!("{quota} {period}")),
        }
    }

    /// What the VM is called.
    pub fn id(&self) -> VmId {
        VmId::from(self.name.clone())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn parent(name: &str) -> String {
    format!("formtune-test-{}-{name}", std::process::id())
}

impl Drop for VmCgroup {
    fn drop(&mut self) {
        let parent = self.path.parent().map(Path::to_owned).unwrap_or_default();
        let below = LEAVES.map(|leaf| self.path.join(leaf));
        for path in below.iter().chain([&self.path, &parent]) {
            // Gone already is fine.
            let _ = remove(path);
        }
    }
}

/// A process of one thread in a group of a VM; killed when dropped.
pub struct Member(Pid);

impl Member {
    /// As [`Member::start_in`], in `leaf` of `group`.
    ///
    /// # Panics
    /// As that.
    pub fn start(group: &VmCgroup, leaf: &str, cpu: Option<usize>, body: impl FnOnce()) -> Self {
        Self::start_in(&group.path.join(leaf), cpu, body)
    }

    /// Forks, moves the child into `cgroup`, pins it, and lets it run `body`, which must be
    /// content with system calls: the test has other threads.
    ///
    /// # Panics
    /// If any of that fails.
    pub fn start_in(cgroup: &Path, cpu: Option<usize>, body: impl FnOnce()) -> Self {
        // SAFETY: the child only makes system calls (see above) and never returns.
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => Self(child),
            ForkResult::Child => {
                let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
                // Until it is where it belongs.
                let _ = kill(Pid::this(), Signal::SIGSTOP);
                body();
                // SAFETY: ends the process without running what the parent has at exit.
                unsafe { nix::libc::_exit(0) }
            }
        };
        // Stopped, not ended.
        waitpid(child.0, Some(WaitPidFlag::WUNTRACED)).unwrap();
        fs::write(cgroup.join("cgroup.procs"), child.0.to_string()).unwrap();
        if let Some(cpu) = cpu {
            let mut cpus = CpuSet::new();
            cpus.set(cpu).unwrap();
            sched_setaffinity(child.0, &cpus).unwrap();
        }
        kill(child.0, Signal::SIGCONT).unwrap();
        child
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.as_raw().cast_unsigned()
    }

    /// The same, for system calls.
    pub fn pid(&self) -> Pid {
        self.0
    }

    /// `run_delay` in nanoseconds and `pcount`, from `/proc/PID/schedstat`
    /// (Documentation/scheduler/sched-stats.rst).
    ///
    /// # Panics
    /// If it has ended.
    pub fn schedstat(&self) -> (u64, u64) {
        let text = fs::read_to_string(format!("/proc/{0}/task/{0}/schedstat", self.0)).unwrap();
        let fields: Vec<u64> = text.split_whitespace().map(|v| v.parse().unwrap()).collect();
        (fields[1], fields[2])
    }

    /// Takes it off its CPU; returns when it is.
    ///
    /// # Panics
    /// If it has ended.
    pub fn stop(&self) {
        kill(self.0, Signal::SIGSTOP).unwrap();
        waitpid(self.0, Some(WaitPidFlag::WUNTRACED)).unwrap();
    }

    /// Lets it go on after [`Member::stop`].
    ///
    /// # Panics
    /// If it has ended.
    pub fn go_on(&self) {
        kill(self.0, Signal::SIGCONT).unwrap();
    }

    /// Waits until it ends by itself.
    ///
    /// # Panics
    /// If it cannot be waited for.
    pub fn join(self) {
        waitpid(self.0, None).unwrap();
        std::mem::forget(self);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Gone already is fine.
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}
