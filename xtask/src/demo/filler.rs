//! A spinner of the lowest priority that keeps a CPU busy while the neighbours do not.
//!
//! It makes "alone" comparable on a host that does other things as well: a parent cgroup that
//! is always runnable keeps the scheduler from moving a compiler to that CPU in every gap,
//! whose time slice the victim would then have to sit out. Within the parent it gives way at
//! once (`cpu.idle`, Linux 5.15, or the least weight).

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// In this order: once `cpu.idle` is set, the kernel refuses a weight.
const LOWEST: &[(&str, &str)] = &[("cpu.shares", "2"), ("cpu.weight", "1"), ("cpu.idle", "1")];

/// The running spinner; ended, and its cgroup removed, when dropped.
pub struct Filler {
    child: Child,
    folder: PathBuf,
}

impl Filler {
    /// Starts it on a CPU, in a cgroup `filler` below `parent`.
    ///
    /// # Errors
    /// When the cgroup cannot be made or the program not be started.
    pub fn start(program: &Path, parent: &Path, cpu: usize) -> Result<Self> {
        let folder = parent.join("filler");
        fs::create_dir_all(&folder)
            .with_context(|| format!("failed to make {}", folder.display()))?;
        for (file, value) in LOWEST {
            let to = folder.join(file);
            if to.exists() {
                fs::write(&to, value)
                    .with_context(|| format!("failed to write {}", to.display()))?;
            }
        }
        let mut cpus = CpuSet::new();
        cpus.set(cpu)?;
        let mut command = Command::new(program);
        command
            .env_clear()
            .envs([("role", "neighbour"), ("threads", "1")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0);
        // SAFETY: only makes system calls.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                sched_setaffinity(Pid::from_raw(0), &cpus).map_err(Into::into)
            })
        };
        let child =
            command.spawn().with_context(|| format!("failed to start {}", program.display()))?;
        let new = Self { child, folder };
        let procs = new.folder.join("cgroup.procs");
        fs::write(&procs, new.child.id().to_string())
            .with_context(|| format!("failed to write {}", procs.display()))?;
        Ok(new)
    }

    /// Stops it for a while.
    ///
    /// # Errors
    /// When it is gone.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When it is gone.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), signal)
            .with_context(|| format!("failed to send {signal} to the filler"))
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // Gone already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for _ in 0..100 {
            if fs::remove_dir(&self.folder).is_ok() || !self.folder.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
