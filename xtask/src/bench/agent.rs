//! What the agent costs: CPU time and resident memory over a minute, with three real VMs and
//! with a hundred and a thousand idle VM-shaped cgroups.
//!
//! CPU is the total over the minute and memory the peak within it. A median of stretches
//! would hide an agent that is quiet for half a minute and busy for a moment. Of the idle ones
//! the first minute is told apart: the agent takes them all for new, and looks for cgroups and
//! devices that may still appear.

use super::load::Cgroups;
use crate::demo::agent::{self, Agent};
use crate::demo::cgroups::Partition;
use crate::demo::domain::{Domain, Guest};
use crate::demo::libvirtd::Libvirtd;
use crate::demo::{image, interrupt};
use crate::figure::Figure;
use crate::setup::{self, Purpose};
use crate::{progress, sh};
use anyhow::{Context, Result, bail};
use formtune_core::units::Nanos;
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);
/// Start-up and finding the VMs is not what is measured.
const WARM_UP: Duration = Duration::from_secs(5);
/// Stretches of the minute, for an interval only: the spread between them.
const STRETCHES: u32 = 12;

/// Measures all figures, every sensor on.
///
/// # Errors
/// When the load cannot be set up or the agent fails.
pub fn run() -> Result<Vec<Figure>> {
    setup::ensure(&[Purpose::Build, Purpose::Bench, Purpose::Demo])?;
    interrupt::catch()?;
    let program = agent::build()?;
    let mut figures = three_vms(&program)?;
    figures.extend(idle_vms(&program, 100, "ours <= 1", "ours <= 48")?);
    figures.extend(idle_vms(&program, 1_000, "ours <= 2", "ours <= 48")?);
    Ok(figures)
}

/// A periodic guest and two that spin, as in the demo, in enforce.
fn three_vms(program: &Path) -> Result<Vec<Figure>> {
    let folder = sh::target().join("demo");
    fs::create_dir_all(&folder)?;
    let _only_one = crate::demo::lock(&folder)?;
    let image = image::prepare(&folder)?;
    let _partition = Partition::make()?;
    let libvirtd = Rc::new(Libvirtd::start(&folder.join("libvirt"))?);
    let cpu = std::thread::available_parallelism()?.get() - 1;
    let mut guests = Vec::new();
    for (name, settings) in [
        ("bench-victim", "role=victim period_us=10000 work_us=1000"),
        ("bench-noisy-1", "role=neighbour"),
        ("bench-noisy-2", "role=neighbour"),
    ] {
        let console = folder.join(format!("{name}.log"));
        guests.push(Domain::start(&libvirtd, &image, &Guest { name, cpu, settings }, console)?);
    }
    let settings = format!(
        "listen = 'off'\nlibvirt = '{}'\ncgroups = ['{}']\nmode.cpu_weight = 'enforce'\n\
         [classes.latency]\npriority = 'high'\nslo = {{ threshold = '1ms' }}\n\
         [classes.default]\nslo = 'off'\nfloor_ratio = 1.0\nceiling_ratio = 1.0\n\
         [classes.batch]\npriority = 'low'\nslo = 'off'\nfloor_ratio = 0.02\n\
         [[rules]]\nvms = ['bench-victim']\nclass = 'latency'\n\
         [[rules]]\nvms = ['bench-noisy-*']\nclass = 'batch'\n",
        libvirtd.uri(),
        Partition::PATTERN,
    );
    let [usage] = usage("3 VMs", program, &folder.join("bench"), &settings, 3)?;
    drop(guests);
    Ok(usage.figures("3_vms", Some("ours <= 0.5"), Some("ours <= 32")))
}

/// Idle ones: a process that sleeps for ever in each cgroup.
fn idle_vms(program: &Path, vms: usize, cpu: &str, rss: &str) -> Result<Vec<Figure>> {
    let guest = image::guest_program()?;
    let folder = tempfile::Builder::new().prefix("bench-").tempdir()?;
    let cgroups = Cgroups::new()?;
    let mut step = progress::Step::start(format!("making {vms} idle cgroups"));
    let mut loads = Vec::new();
    for number in 1..=vms {
        let vm = cgroups.vm(number, &format!("idle-{number}"))?;
        loads.push(vm.spawn(&guest, &[("role", "idle")], None)?);
        interrupt::check()?;
        step.tick();
    }
    step.end("done");
    let settings = format!(
        "listen = 'off'\nlibvirt = 'off'\ncgroups = ['{}']\nmax_vms = 1024\n\
         mode.cpu_weight = 'enforce'\n",
        cgroups.pattern()
    );
    let label = format!("{vms} idle cgroups");
    let [first, later] = usage(&label, program, folder.path(), &settings, vms)?;
    drop(loads);
    let mut figures = first.figures(&format!("{vms}_new_vms"), None, None);
    figures.extend(later.figures(&format!("{vms}_vms"), Some(cpu), Some(rss)));
    Ok(figures)
}

/// What a minute cost.
struct Usage {
    /// Over all of it, per cent of one core.
    cpu_pct: f64,
    /// Per stretch; they are of one length but for the clock's grain, so `cpu_pct` is their
    /// mean.
    cpu_pct_of_stretches: Vec<f64>,
    /// Peak.
    rss_mib: f64,
}

impl Usage {
    fn figures(&self, load: &str, cpu: Option<&str>, rss: Option<&str>) -> Vec<Figure> {
        let name = |what: &str| format!("agent.{what}_{load}");
        let stretches = &self.cpu_pct_of_stretches;
        vec![
            Figure::total(&name("cpu"), "% of core", self.cpu_pct, stretches, cpu),
            Figure::total(&name("rss"), "MiB", self.rss_mib, &[], rss),
        ]
    }
}

/// Starts an agent, measures it for one minute after the other, and stops it.
fn usage<const MINUTES: usize>(
    label: &str,
    program: &Path,
    folder: &Path,
    settings: &str,
    vms: usize,
) -> Result<[Usage; MINUTES]> {
    let agent = progress::during("starting formtune", |tick| {
        Agent::start(program, folder, settings, tick)
    })?;
    let mut minutes = Vec::new();
    for number in 1..=MINUTES {
        minutes.push(measure(&format!("{label}: minute {number}"), &agent, vms)?);
    }
    progress::during("stopping formtune", |tick| agent.stop(tick))?;
    minutes.try_into().ok().context("as many as were measured")
}

fn measure(label: &str, agent: &Agent, vms: usize) -> Result<Usage> {
    let mut step = progress::Step::start(format!("agent with {label}"));
    interrupt::wait(WARM_UP, || step.tick())?;
    let seen = vms_seen(agent)?;
    if seen < vms {
        bail!("formtune sees {seen} of {vms} VMs");
    }
    reset_peak(agent.pid())?;
    let begin = Moment::now(agent.pid())?;
    let mut cpu_pct_of_stretches = Vec::new();
    let mut last = begin;
    for _ in 0..STRETCHES {
        interrupt::wait(MINUTE / STRETCHES, || step.tick())?;
        let now = Moment::now(agent.pid())?;
        cpu_pct_of_stretches.push(now.cpu_pct_since(last));
        last = now;
    }
    let cpu_pct = last.cpu_pct_since(begin);
    step.end("done");
    Ok(Usage { cpu_pct, cpu_pct_of_stretches, rss_mib: peak_rss_mib(agent.pid())? })
}

/// VMs whose run-queue waits it measures.
fn vms_seen(agent: &Agent) -> Result<usize> {
    let metrics = agent.get("/metrics")?;
    let count = |line: &&str| line.starts_with("formtune_vm_runqueue_latency_seconds_count{");
    Ok(metrics.lines().filter(count).count())
}

/// How late it is, and what the agent has used until then.
#[derive(Clone, Copy)]
struct Moment {
    at: Nanos,
    cpu: Duration,
}

impl Moment {
    /// The process's CPU clock counts all of its threads, those that ended included, in
    /// nanoseconds.
    fn now(pid: u32) -> Result<Self> {
        let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()));
        let cpu = clock.and_then(ClockId::now).context("formtune is gone")?;
        Ok(Self { at: agent::monotonic()?, cpu: cpu.into() })
    }

    fn cpu_pct_since(self, from: Self) -> f64 {
        let used = self.cpu.saturating_sub(from.cpu).as_nanos() as f64;
        used / self.at.since(from.at).0 as f64 * 100.0
    }
}

/// Has the kernel note the peak of resident memory from now on (`clear_refs`, proc(5)):
/// what starting took is not what is measured.
fn reset_peak(pid: u32) -> Result<()> {
    let path = format!("/proc/{pid}/clear_refs");
    fs::write(&path, "5").with_context(|| format!("failed to write {path}"))
}

fn peak_rss_mib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("formtune is gone")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().context("VmHWM")?;
    Ok(kib / 1024.0)
}
