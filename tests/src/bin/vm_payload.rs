//! Runs as a static program inside machines with other kernels and a real cgroup v2
//! (`cargo xtask test --only vm`): the probe loads and attributes a known load, weights take
//! effect, the agent closes its loop and puts everything back.

use anyhow::{Context, Result, ensure};
use formtune_agent::act::Act;
use formtune_agent::sense::{Sense, SenseConfig};
use formtune_agent::vm::Vm;
use formtune_core::plan::{Knob, OutcomeResult, Reason, Setpoint};
use formtune_core::policy::Mode;
use formtune_core::units::{Nanos, VmId, Weight};
use formtune_tests::payload::{Agent, CONTENDED, Checks, Passed};
use formtune_tests::retransmit;
use formtune_tests::vm_block::{self, Seen};
use formtune_tests::vm_requests;
use formtune_tests::wait::eventually;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

const ROOT: &str = "/sys/fs/cgroup";
const AGENT: &str = "/payload/formtune";
const STATE: &str = "/run/formtune";

/// systemd's layout, with its escapes, for the two that compete.
const VICTIM: &str = r"machine.slice/machine-qemu\x2d1\x2dweb\x2d1.scope/libvirt/vcpu0";
const NEIGHBOUR: &str = r"machine.slice/machine-qemu\x2d2\x2dbatch\x2d1.scope/libvirt/vcpu0";
/// The layout without systemd, for one that does nothing.
const IDLE: &str = "machine/qemu-3-idle.libvirt-qemu/vcpu0";
/// Their names, sorted.
const VMS: [&str; 3] = ["batch-1", "idle", "web-1"];
/// No VM at all.
const OUTSIDE: &str = "system.slice/cron.service";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {}
        ["spin"] => loop {
            std::hint::spin_loop();
        },
        ["fill"] => fill(),
        [vm_block::LOAD, ..] => return ended(vm_block::main(&arguments[1..])),
        [vm_requests::CROWD | vm_requests::COMMANDS, ..] => {
            return ended(vm_requests::main(&arguments));
        }
        ref words => {
            return ended(retransmit::role(words).with_context(|| format!("{words:?}")));
        }
    }
    let mut checks = Checks::default();
    let load = Load::start();
    checks.run("loads", || {
        load.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        let mut sense = open_sense()?;
        let reading = sense.sample(now()?);
        ensure!(reading.host.blind.is_none(), "blind: {:?}", reading.host.blind);
        Ok(format!("{:?}", sense.health()))
    });
    checks.run("attributes", || attributes(load.as_ref().map_err(|e| anyhow::anyhow!("{e:#}"))?));
    checks.run("retransmit", || {
        let mut sense = open_sense()?;
        let detail = retransmit::check(&mut sense, &"idle".into(), &make_group(IDLE)?, now)?;
        let figure = format!("yes, {}", sense.tcp_health().guest.method.name());
        Ok(Passed { detail, figure: Some(figure) })
    });
    checks.run("pressure", pressure);
    let mut without = None;
    checks.run("block", || {
        let Seen { detail, times: [with, noted] } = block()?;
        without = Some(noted);
        Ok(Passed { detail, figure: Some(format!("yes, virtio {with}")) })
    });
    checks.run("block without times", || {
        let times = without.context("not reached")?;
        let figure = Some(format!("without `iostats` {times}"));
        Ok(Passed { detail: format!("times are {times}"), figure })
    });
    checks.run("acts", acts);
    let mut agent = None;
    checks.run("closes the loop", || {
        let (started, set) = closes_the_loop()?;
        agent = Some(started);
        Ok(set)
    });
    checks.run("restores after SIGKILL", || {
        let mut killed = agent.take().context("formtune does not run")?;
        killed.signal(Signal::SIGKILL)?;
        killed.wait()?;
        let left = weights()?;
        ensure!(changed()?, "weights were back before the restart");
        let _agent = start("shadow")?;
        originals()?;
        Ok(format!("{left:?} after SIGKILL, {:?} after the restart", weights()?))
    });
    checks.run("restores on stop", || {
        let (mut agent, set) = closes_the_loop()?;
        agent.signal(Signal::SIGTERM)?;
        let status = agent.wait()?;
        ensure!(status.success(), "formtune ended with {status}; {}", agent.log_tail());
        originals()?;
        Ok(format!("{set}; afterwards {:?}", weights()?))
    });
    checks.exit_code()
}

/// The end of a process with a task of its own.
fn ended(task: Result<()>) -> ExitCode {
    match task {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Spinning processes in VM-shaped cgroups; ended when dropped.
struct Load {
    victim: Child,
    neighbour: Child,
    outside: Vec<Child>,
}

impl Load {
    /// Victim and neighbour share CPU 0; two processes of no VM share CPU 1.
    fn start() -> Result<Self> {
        make_group(IDLE)?;
        let victim = spin(VICTIM, 0)?;
        let neighbour = spin(NEIGHBOUR, 0)?;
        Ok(Self { victim, neighbour, outside: vec![spin(OUTSIDE, 1)?, spin(OUTSIDE, 1)?] })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in [&mut self.victim, &mut self.neighbour].into_iter().chain(&mut self.outside) {
            // The machine is about to be switched off anyway.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Makes a cgroup with the cpu controller on at every level above it.
fn make_group(path: &str) -> Result<PathBuf> {
    let mut group = PathBuf::from(ROOT);
    for component in Path::new(path).components() {
        let control = group.join("cgroup.subtree_control");
        fs::write(&control, "+cpu")
            .with_context(|| format!("failed to write {}", control.display()))?;
        group.push(component);
        if !group.exists() {
            fs::create_dir(&group)?;
        }
    }
    Ok(group)
}

fn spin(group: &str, cpu: usize) -> Result<Child> {
    let group = make_group(group)?;
    let child = Command::new("/proc/self/exe").arg("spin").stdin(Stdio::null()).spawn()?;
    let pid = Pid::from_raw(child.id().cast_signed());
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(pid, &cpus)?;
    fs::write(group.join("cgroup.procs"), pid.to_string())?;
    Ok(child)
}

fn now() -> Result<Nanos> {
    Ok(Nanos(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos() as u64))
}

/// The kernel's own account of a process's waits, nanoseconds (`sched_info.run_delay`).
fn run_delay(process: &Child) -> Result<u64> {
    let path = format!("/proc/{}/schedstat", process.id());
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    text.split_whitespace().nth(1).context("no run_delay")?.parse().context("run_delay")
}

/// Probes loaded and exactly the three VMs found, as promised within a second.
fn open_sense() -> Result<Sense> {
    let mut sense = Sense::open(&SenseConfig::default(), None)?;
    let found = eventually(Duration::from_secs(1), "complete inventory", || {
        sense.sample(now()?);
        Ok(sense.vms().keys().map(ToString::to_string).eq(VMS).then_some(()))
    });
    found.with_context(|| format!("VMs found: {:?}", sense.vms().keys()))?;
    Ok(sense)
}

/// Waits of the victim, the neighbour and the idle VM.
struct Waits {
    /// The kernel's sums of victim and neighbour, nanoseconds, just before and just after.
    kernel: [[u64; 2]; 2],
    /// What the probe counted: waits and nanoseconds.
    probe: [(u64, u64); 3],
}

impl Waits {
    /// The kernel is asked twice, as time passes between two questions, and a lot of it where
    /// the machine is emulated on a busy one.
    fn read(sense: &mut Sense, load: &Load) -> Result<Self> {
        let kernel =
            || -> Result<[u64; 2]> { Ok([run_delay(&load.victim)?, run_delay(&load.neighbour)?]) };
        let before = kernel()?;
        sense.sample(now()?);
        let mut probe = [(0, 0); 3];
        for (to, vm) in probe.iter_mut().zip(["web-1", "batch-1", "idle"]) {
            let totals = sense.runq(&vm.into()).with_context(|| format!("{vm} is not measured"))?;
            *to = (totals.count, totals.wait_ns);
        }
        Ok(Self { kernel: [before, kernel()?], probe })
    }
}

/// What the probe counts for a VM over 3 s is what the kernel says of its only process; the
/// idle VM has nothing, though two processes outside of any VM wait all the time.
fn attributes(load: &Load) -> Result<String> {
    let mut sense = open_sense()?;
    let before = Waits::read(&mut sense, load)?;
    std::thread::sleep(Duration::from_secs(3));
    let after = Waits::read(&mut sense, load)?;
    let mut lines = Vec::new();
    for (index, vm) in ["web-1", "batch-1"].into_iter().enumerate() {
        let waits = after.probe[index].0 - before.probe[index].0;
        let ours = (after.probe[index].1 - before.probe[index].1) as f64 / 1e6;
        let least = after.kernel[0][index].saturating_sub(before.kernel[1][index]) as f64 / 1e6;
        let most = (after.kernel[1][index] - before.kernel[0][index]) as f64 / 1e6;
        lines.push(format!("{vm} {waits} waits, {ours:.0} ms, kernel {least:.0} to {most:.0} ms"));
        ensure!(most > 500.0, "the load did not wait: {lines:?}");
        ensure!(least * 0.95 <= ours && ours <= most * 1.05, "{lines:?}");
    }
    let idle = after.probe[2].1 - before.probe[2].1;
    ensure!(idle == 0, "the idle VM waited {idle} ns");
    Ok(lines.join("; "))
}

/// Takes memory, a page at a time, until killed.
fn fill() -> ! {
    // Standard input ends when it has been moved to where it belongs.
    let _ = std::io::stdin().read_line(&mut String::new());
    let mut pages = Vec::new();
    loop {
        pages.push(vec![1u8; 4096]);
    }
}

/// The victim stalls for want of CPU; with a process above its `memory.high` it is counted.
fn pressure() -> Result<String> {
    // From the root down to the slice, so that the scope has the files.
    for group in Path::new(VICTIM).ancestors().skip(3).collect::<Vec<_>>().into_iter().rev() {
        let control = Path::new(ROOT).join(group).join("cgroup.subtree_control");
        fs::write(&control, "+memory")
            .with_context(|| format!("failed to write {}", control.display()))?;
    }
    let high = file(VICTIM, "memory.high");
    fs::write(&high, (8 << 20).to_string())?;
    let mut filling = Command::new("/proc/self/exe").arg("fill").stdin(Stdio::piped()).spawn()?;
    let procs = Path::new(ROOT).join(VICTIM).join("cgroup.procs");
    fs::write(procs, filling.id().to_string())?;
    drop(filling.stdin.take());
    // Opened now: which files there are is looked for seldom.
    let mut sense = open_sense()?;
    let found = eventually(Duration::from_secs(20), "cpu.pressure and memory.events", || {
        sense.sample(now()?);
        let files = sense.files(&"web-1".into()).context("web-1 is not there")?;
        let some = files.pressure.cpu.and_then(|stalls| stalls.some).map(|stall| stall.total_us);
        let events = files.memory_events;
        let there = some.is_some_and(|us| us > 0) && events.high.is_some_and(|high| high > 0);
        Ok(there.then(|| (some, events, sense.pressure().cpu)))
    });
    let last = sense.files(&"web-1".into()).copied();
    filling.kill()?;
    filling.wait()?;
    fs::write(&high, "max")?;
    let (some, events, node) = found.with_context(|| format!("last read {last:?}"))?;
    let node = node.and_then(|stalls| stalls.some).context("no /proc/pressure/cpu")?;
    Ok(format!("cpu some {some:?} µs, node {} µs, {events:?}", node.total_us))
}

/// Block requests of the victim are counted one by one. The idle VM, for whose cgroup the
/// io controller is not on, is not measured.
fn block() -> Result<Seen> {
    let slice = Path::new(ROOT).join("machine.slice");
    for group in [Path::new(ROOT), &slice] {
        fs::write(group.join("cgroup.subtree_control"), "+io")?;
    }
    let mut sense = open_sense()?;
    let cgroup = |name: &str| -> Result<PathBuf> {
        Ok(sense.vms().get(&VmId::from(name)).context("no such VM")?.cgroup.clone())
    };
    let (victim, idle) = (cgroup("web-1")?, cgroup("idle")?);
    ensure!(sense.block().totals(&idle).is_none(), "the idle VM is measured");
    let procs = |path: &str| Path::new(ROOT).join(path).join("cgroup.procs");
    vm_block::check(&mut sense, &victim, &procs(VICTIM), &procs(OUTSIDE), now)
}

fn file(path: &str, name: &str) -> PathBuf {
    // The scope: two levels above its vcpu0.
    let vcpu = Path::new(ROOT).join(path);
    vcpu.ancestors().nth(2).expect("a scope holds libvirt/vcpu0").join(name)
}

/// Victim's and neighbour's weight.
fn weights() -> Result<[u32; 2]> {
    let read = |path: &str| -> Result<u32> {
        Ok(fs::read_to_string(file(path, "cpu.weight"))?.trim().parse()?)
    };
    Ok([read(VICTIM)?, read(NEIGHBOUR)?])
}

fn changed() -> Result<bool> {
    Ok(weights()? != [100, 100])
}

fn originals() -> Result<()> {
    eventually(Duration::from_secs(15), "return of the originals", || {
        Ok((!changed()?).then_some(()))
    })
}

/// CPU time of a VM, microseconds.
fn usage(path: &str) -> Result<u64> {
    let text = fs::read_to_string(file(path, "cpu.stat"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("usage_usec "))
        .context("no usage_usec")?
        .parse()
        .context("usage_usec")
}

/// Weights 400 and 100, written by `act`, give CPU time in about that ratio; then back.
fn acts() -> Result<Passed> {
    const EXPECTED: std::ops::RangeInclusive<f64> = 2.0..=8.0;
    let sense = open_sense()?;
    let vm = |name: &str| -> Result<Arc<Vm>> {
        sense.vms().get(&VmId::from(name)).cloned().with_context(|| format!("no vm {name}"))
    };
    let (mut act, _) = Act::open(Path::new("/run/formtune-act"), None)?;
    let setpoint = Setpoint {
        vm: "web-1".into(),
        knob: Knob::CpuWeight,
        from: Weight::try_from(100)?,
        to: Weight::try_from(400)?,
        mode: Mode::Enforce,
        victim: Some("web-1".into()),
        reason: Reason::NotMeasured,
    };
    let outcome = act.execute(&*vm("web-1")?, &setpoint, 1);
    ensure!(matches!(outcome.result, OutcomeResult::Applied { .. }), "{outcome:?}");
    ensure!(weights()? == [400, 100], "weights are {:?}", weights()?);
    // The scheduler needs a moment to even out what went before.
    std::thread::sleep(Duration::from_millis(500));
    // While the host of this machine has other work, the machine's CPU stands still, and a
    // slice of the victim's or the neighbour's is as long as that; so it is looked at for longer.
    let mut ratio = 0.0;
    for _ in 0..4 {
        let before = [usage(VICTIM)?, usage(NEIGHBOUR)?];
        std::thread::sleep(Duration::from_secs(3));
        let after = [usage(VICTIM)?, usage(NEIGHBOUR)?];
        ratio = (after[0] - before[0]) as f64 / (after[1] - before[1]) as f64;
        if EXPECTED.contains(&ratio) {
            break;
        }
    }
    let report = act.restore_all();
    ensure!(!changed()?, "weights are {:?} after restoring: {report:?}", weights()?);
    ensure!(EXPECTED.contains(&ratio), "CPU time in ratio {ratio:.2} at 400:100");
    Ok(Passed {
        detail: format!("CPU time in ratio {ratio:.2} at 400:100"),
        figure: Some(format!("{ratio:.2}")),
    })
}

fn start(mode: &str) -> Result<Agent> {
    Agent::start(
        Path::new(AGENT),
        Path::new(STATE),
        &format!("libvirt = \"off\"\n[mode]\ncpu_weight = \"{mode}\"\n{CONTENDED}"),
    )
}

/// Starts the agent and waits for a changed weight.
fn closes_the_loop() -> Result<(Agent, String)> {
    ensure!(!changed()?, "weights are {:?} before the start", weights()?);
    let agent = start("enforce")?;
    let set = eventually(Duration::from_secs(60), "changed weight", || {
        let weights = weights()?;
        Ok((weights != [100, 100]).then_some(weights))
    })
    .with_context(|| agent.log_tail())?;
    let decided = eventually(Duration::from_secs(10), "decision in /v1/decisions", || {
        let decisions = agent.get("/v1/decisions")?;
        Ok(["\"lower\"", "\"raise\""].into_iter().find(|action| decisions.contains(action)))
    })?;
    Ok((agent, format!("decided {decided}, weights {set:?}")))
}
