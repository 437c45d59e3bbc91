//! Load for the benchmarks that run the agent: processes in cgroups shaped like those of VMs,
//! under a name of our own, in the hierarchy of the `cpu` controller and, on hybrid hosts, at
//! the same path in the v2 hierarchy and in that of `blkio`, as libvirt does it.

use crate::demo::{cgroups, interrupt};
use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A folder of VM-shaped cgroups; removed when dropped, after the processes in it.
pub struct Cgroups {
    /// The parent of all of them, first in the hierarchy of the `cpu` controller.
    roots: Vec<PathBuf>,
    name: String,
}

impl Cgroups {
    /// Makes the parent, `formtune-bench-PID`.
    ///
    /// # Errors
    /// When no hierarchy carries the `cpu` controller, or it cannot be made.
    pub fn new() -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let name = format!("formtune-bench-{}", std::process::id());
        let v2 = root.join("cgroup.controllers").exists();
        let hierarchies = if v2 {
            vec![root.to_owned()]
        } else {
            let v1 = ["cpu", "cpu,cpuacct"].map(|controllers| root.join(controllers));
            let cpu = v1.into_iter().find(|path| path.is_dir());
            let mut all = vec![cpu.context("no hierarchy carries the cpu controller")?];
            let others = ["unified", "blkio"].map(|name| root.join(name));
            all.extend(others.into_iter().filter(|path| path.is_dir()));
            all
        };
        let new = Self { roots: hierarchies.iter().map(|path| path.join(&name)).collect(), name };
        if v2 {
            enable(root)?;
        }
        for path in &new.roots {
            fs::create_dir(path).with_context(|| format!("failed to make {}", path.display()))?;
            cgroups::raise(path)?;
        }
        if v2 {
            enable(&new.roots[0])?;
        }
        Ok(new)
    }

    /// The parent, in the hierarchy of the `cpu` controller.
    pub fn cpu(&self) -> &Path {
        &self.roots[0]
    }

    /// For the `cgroups` key of formtune's configuration.
    pub fn pattern(&self) -> String {
        format!("{}/qemu-*-{{name}}.libvirt-qemu", self.name)
    }

    /// The same, for the VM with this number only.
    pub fn pattern_of(&self, number: usize) -> String {
        format!("{}/qemu-{number}-{{name}}.libvirt-qemu", self.name)
    }

    /// Makes the cgroup of one VM, with `vcpu0` below it, which is where its load goes.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn vm(&self, number: usize, name: &str) -> Result<VmCgroup> {
        let folder = format!("qemu-{number}-{name}.libvirt-qemu");
        let paths: Vec<_> = self.roots.iter().map(|root| root.join(&folder)).collect();
        for path in &paths {
            let leaf = path.join("vcpu0");
            fs::create_dir_all(&leaf)
                .with_context(|| format!("failed to make {}", leaf.display()))?;
        }
        let knob = ["cpu.shares", "cpu.weight"].map(|name| paths[0].join(name));
        let knob = knob.into_iter().find(|path| path.exists());
        let knob = knob.with_context(|| format!("no CPU knob in {}", paths[0].display()))?;
        Ok(VmCgroup { paths, knob })
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for path in &self.roots {
            if let Err(error) = remove(path) {
                eprintln!("failed to remove {}: {error}", path.display());
            }
        }
    }
}

/// The cgroup of one VM.
pub struct VmCgroup {
    paths: Vec<PathBuf>,
    knob: PathBuf,
}

impl VmCgroup {
    /// Its weight, as the kernel has it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn weight(&self) -> Result<u64> {
        let text = fs::read_to_string(&self.knob)
            .with_context(|| format!("failed to read {}", self.knob.display()))?;
        text.trim().parse().with_context(|| format!("{} holds {text:?}", self.knob.display()))
    }

    /// Where to write a process's id to move it into `vcpu0`, in the `cpu` hierarchy.
    pub fn procs(&self) -> PathBuf {
        self.paths[0].join("vcpu0/cgroup.procs")
    }

    /// The same in the hierarchy to which block I/O is charged: the last, or the only one.
    pub fn procs_of_io(&self) -> PathBuf {
        self.paths[self.paths.len() - 1].join("vcpu0/cgroup.procs")
    }

    /// Starts the guest program in it, as a plain process.
    ///
    /// # Errors
    /// When it cannot be started or moved.
    pub fn spawn(
        &self,
        program: &Path,
        settings: &[(&str, &str)],
        cpu: Option<usize>,
    ) -> Result<Load> {
        let mut cpus = CpuSet::new();
        if let Some(cpu) = cpu {
            cpus.set(cpu)?;
        }
        let mut command = Command::new(program);
        command
            .env_clear()
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0);
        // SAFETY: only makes system calls.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                if cpu.is_some() {
                    sched_setaffinity(Pid::from_raw(0), &cpus)?;
                }
                Ok(())
            })
        };
        let mut child =
            command.spawn().with_context(|| format!("failed to start {}", program.display()))?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let output = child.stdout.take().context("no pipe")?;
        let into = Arc::clone(&lines);
        // Ends by itself at the end of the pipe.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                into.lock().expect("nobody panics while holding it").push(line);
            }
        });
        let load = Load { child, lines };
        for path in &self.paths {
            let procs = path.join("vcpu0/cgroup.procs");
            fs::write(&procs, load.child.id().to_string())
                .with_context(|| format!("failed to write {}", procs.display()))?;
        }
        Ok(load)
    }
}

/// A running guest program; killed when dropped.
pub struct Load {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Load {
    /// Stops it with SIGSTOP.
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

    /// The lines it printed from the given one on.
    pub fn lines_from(&self, first: usize) -> Vec<String> {
        let lines = self.lines.lock().expect("nobody panics while holding it");
        lines.get(first..).unwrap_or_default().to_vec()
    }

    /// Waits until it has printed something.
    ///
    /// # Errors
    /// When it does not within half a minute.
    pub fn wait_for_line(&mut self) -> Result<()> {
        interrupt::until(Duration::from_secs(30), "the load's first line", || {
            if let Some(status) = self.child.try_wait()? {
                bail!("the load ended with {status}");
            }
            Ok((!self.lines_from(0).is_empty()).then_some(()))
        })
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), signal)
            .with_context(|| format!("failed to send {signal} to the load"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // Gone already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The controllers of v2, for the cgroups below this one.
fn enable(path: &Path) -> Result<()> {
    fs::write(path.join("cgroup.subtree_control"), "+cpu +io")
        .with_context(|| format!("no controllers cpu and io in {}", path.display()))
}

/// Removes a cgroup and those below it. A process that was just killed leaves its cgroup a
/// moment later, hence the patience.
fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    for _ in 0..100 {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
    fs::remove_dir(path)
}
