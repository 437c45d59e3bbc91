//! What the run-queue probe adds to a context switch, beside an empty program on the same
//! tracepoint (the floor) and Debian's `runqlat` (the peer).
//!
//! `perf bench sched pipe`, pinned to one CPU, makes two switches per operation. In each
//! round every kind of probe is attached in turn, in an order that rotates, and between
//! them the load runs with none; the added cost is the difference within the round. Time is
//! the load's own CPU time, in which the kernel accounts what runs at a switch, so that
//! other work on the machine disturbs it less than wall-clock time.

use super::load::{Cgroups, VmCgroup};
use crate::demo::interrupt;
use crate::figure::Figure;
use crate::{progress, sh};
use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const ROUNDS: usize = 21;
/// Operations of one run, half a second or so; each is two context switches.
const OPERATIONS: u32 = 100_000;

/// What is attached, and where the load is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Floor,
    Outside,
    InVm,
    Peer,
}

const KINDS: [Kind; 4] = [Kind::Floor, Kind::Outside, Kind::InVm, Kind::Peer];

/// Measures all figures.
///
/// # Errors
/// When a program is missing or a probe cannot be attached.
pub fn run() -> Result<Vec<Figure>> {
    interrupt::catch()?;
    let holder = super::build("hold-probe")?;
    let runqlat = sh::find_program("runqlat")
        .context("no runqlat; run `cargo xtask setup` or `apt-get install libbpf-tools`")?;
    let perf = sh::find_program("perf")
        .context("no perf; run `cargo xtask setup` or `apt-get install linux-perf`")?;
    let cgroups = Cgroups::new()?;
    let vm = cgroups.vm(1, "inside")?;
    let outside = cgroups.vm(2, "outside")?;
    let pattern = cgroups.pattern_of(1);
    // The first run of everything fills caches and is not counted.
    load(&perf, &vm)?;

    let mut step = progress::Step::start(format!("bench runq: {ROUNDS} rounds"));
    let mut added: [Vec<f64>; 4] = Default::default();
    for round in 0..ROUNDS {
        // Both places are equally deep, so one stands for both while nothing is attached.
        let mut before = load(&perf, &vm)?;
        for turn in 0..KINDS.len() {
            let at = (round + turn) % KINDS.len();
            let kind = KINDS[at];
            let place = if kind == Kind::Outside { &outside } else { &vm };
            let held = match kind {
                Kind::Floor => Held::start(Command::new(&holder).arg("floor"))?,
                Kind::Outside | Kind::InVm => {
                    Held::start(Command::new(&holder).args(["runq", &pattern]))?
                }
                // Line-buffered, so that it says that it traces when it does.
                Kind::Peer => {
                    Held::start(Command::new("stdbuf").arg("-oL").arg(&runqlat).arg("3600"))?
                }
            };
            let with = load(&perf, place)?;
            let said = held.stop(kind == Kind::Peer)?;
            check(kind, &said)?;
            let after = load(&perf, &vm)?;
            added[at].push(with - (before + after) / 2.0);
            before = after;
            interrupt::check()?;
            step.tick();
        }
    }
    step.end("done");
    let [floor, outside, in_vm, peer] = &added;
    let figure = |name, ours: &[f64], target| {
        Figure::measured(name, "ns/switch", ours, Some(peer), Some(floor), Some(target))
    };
    Ok(vec![
        figure("runq.in_vm", in_vm, "ratio_to_peer <= 0.25"),
        figure("runq.outside", outside, "ratio_to_peer <= 0.15"),
        figure("runq.in_vm_to_floor", in_vm, "ratio_to_floor <= 3"),
    ])
}

/// Nanoseconds of CPU time per context switch of the load, run in `vcpu0` of `place`.
fn load(perf: &Path, place: &VmCgroup) -> Result<f64> {
    let procs = place.procs();
    let mut cpus = CpuSet::new();
    cpus.set(std::thread::available_parallelism()?.get() - 1)?;
    let mut command = Command::new(perf);
    command
        .args(["bench", "sched", "pipe", "-l", &OPERATIONS.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: system calls only; the path was allocated before.
    unsafe {
        command.pre_exec(move || {
            sched_setaffinity(Pid::from_raw(0), &cpus)?;
            fs::write(&procs, "0")
        })
    };
    let cpu_ns = || -> Result<f64> {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
        let [user, system] = [usage.user_time(), usage.system_time()];
        let us = (user.tv_sec() + system.tv_sec()) * 1_000_000 + user.tv_usec() + system.tv_usec();
        Ok(us as f64 * 1e3)
    };
    let before = cpu_ns()?;
    sh::run(&mut command)?;
    Ok((cpu_ns()? - before) / f64::from(2 * OPERATIONS))
}

/// That the load was where it was meant to be: a figure of something else is worse than none.
fn check(kind: Kind, said: &str) -> Result<()> {
    let counted: Option<u32> =
        said.lines().find_map(|line| line.strip_prefix("counted ")?.parse().ok());
    match (kind, counted) {
        (Kind::InVm, Some(counted)) if counted < OPERATIONS => {
            bail!("the probe counted {counted} switches of {}", 2 * OPERATIONS)
        }
        (Kind::Outside, Some(counted)) if counted > 0 => {
            bail!("the probe counted {counted} switches of a load outside every VM")
        }
        (Kind::InVm | Kind::Outside, None) => bail!("the holder of the probe did not report"),
        _ => Ok(()),
    }
}

/// A program that holds a probe attached.
pub(super) struct Held {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Held {
    /// Starts it and waits for its first line, which it prints once attached.
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start {}", sh::line(command)))?;
        let mut output = BufReader::new(child.stdout.take().context("no pipe")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        if line.is_empty() {
            let status = child.wait()?;
            bail!("{} ended with {status}", sh::line(command));
        }
        Ok(Self { child, output })
    }

    /// Stops it; returns what else it said.
    pub(super) fn stop(mut self, by_signal: bool) -> Result<String> {
        drop(self.child.stdin.take());
        if by_signal {
            let pid = Pid::from_raw(self.child.id() as i32);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT)?;
        }
        let mut said = String::new();
        self.output.read_to_string(&mut said)?;
        self.child.wait()?;
        // The kernel frees the program after a grace period.
        std::thread::sleep(Duration::from_millis(50));
        Ok(said)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Gone already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
