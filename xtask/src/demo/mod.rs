//! `cargo xtask demo`: two guests hurt a third, formtune sees it, shifts CPU weight, the
//! third recovers, and every knob goes back to where it was.
//!
//! Everything runs beside whatever else the machine does: a libvirt daemon of its own, and
//! all files in `target/demo`. On the way out, also after Ctrl-C and errors, guards stop
//! guests, agent and daemon, in this order, and remove the cgroups that libvirt leaves.

pub mod agent;
pub mod cgroups;
pub mod domain;
pub mod filler;
pub mod image;
pub mod interrupt;
pub mod libvirtd;
mod phase;
mod report;

use crate::setup::{self, Purpose};
use crate::{progress, sh};
use agent::{Agent, Waits};
use anyhow::{Context, Result, bail};
use cgroups::Partition;
use domain::{Domain, Guest, Image, Knobs};
use filler::Filler;
use formtune_core::units::VmId;
use phase::Phase;
use report::{Column, Report};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// What is measured of each phase.
const MEASURE: Duration = Duration::from_secs(20);
/// What passes between the start of a phase and its measurement.
const SETTLE: Duration = Duration::from_secs(4);
/// The same after the start of enforcing: formtune has to notice, act and verify.
const SETTLE_ENFORCED: Duration = Duration::from_secs(15);

const VICTIM: &str = "demo-victim";
const NEIGHBOURS: [&str; 2] = ["demo-noisy-1", "demo-noisy-2"];

/// Arguments of `demo`.
#[derive(clap::Args)]
pub struct Args {
    /// Write the result here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Keep consoles, logs and recordings in target/demo
    #[arg(long)]
    keep_logs: bool,
}

/// Runs it: exit code 0 when the victim recovered at hardly any cost to its neighbours and
/// every knob is back, else 1.
pub fn run(args: Args) -> Result<ExitCode> {
    // Says what to install where it may not do so itself; then root is the next thing missing.
    setup::ensure(&[Purpose::Build, Purpose::Demo])?;
    if !nix::unistd::geteuid().is_root() {
        bail!("the demo must run as root: it starts guests, loads eBPF programs and sets weights");
    }
    interrupt::catch()?;
    let program = agent::build()?;
    let folder = sh::target().join("demo");
    fs::create_dir_all(&folder).with_context(|| format!("failed to make {}", folder.display()))?;
    let _only_one = lock(&folder)?;
    let image = image::prepare(&folder)?;
    let start = Instant::now();
    let report = play(&program, &folder, &image);
    if !args.keep_logs && report.as_ref().is_ok_and(Report::met) {
        remove_logs(&folder)?;
    } else {
        eprintln!("consoles, logs and recordings are in {}", folder.display());
    }
    let report = report?;
    println!("\n{}\n\n{}", report.table(), report.verdict());
    eprintln!("took {:.0} s", start.elapsed().as_secs_f64());
    if let Some(path) = args.json {
        fs::write(&path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(ExitCode::from(u8::from(!report.met())))
}

/// The three phases, and everything around them that has to be cleaned up again.
fn play(program: &Path, folder: &Path, image: &Image) -> Result<Report> {
    let partition = Partition::make()?;
    let libvirtd = Rc::new(libvirtd::Libvirtd::start(&folder.join("libvirt"))?);

    let host = Host::new()?;
    println!("{}", host.explain(image.kvm));
    let (victim, neighbours) = start_guests(&libvirtd, folder, image, &host)?;
    let neighbours: Vec<&Domain> = neighbours.iter().collect();
    let guests: Vec<&Domain> = [&victim].into_iter().chain(neighbours.iter().copied()).collect();
    let originals = knobs(&guests)?;
    let filler = Filler::start(&image.program, partition.cpu()?, host.cpu())?;

    let observe = folder.join("observe");
    let settings = host.settings(&libvirtd, &observe, "observe");
    let agent = progress::during("starting formtune, which observes", |tick| {
        Agent::start(program, &observe, &settings, tick)
    })?;
    for guest in &neighbours {
        guest.suspend()?;
    }
    settle("alone: neighbours stopped, formtune observes", SETTLE)?;
    let alone = Phase::measure("alone: measuring", MEASURE, &victim, &[])?;
    let alone_weights = weights(&guests)?;
    drop(filler);
    for guest in &neighbours {
        guest.resume()?;
    }
    settle("contended: neighbours spin, formtune observes", SETTLE)?;
    let contended = Phase::measure("contended: measuring", MEASURE, &victim, &neighbours)?;
    let contended_weights = weights(&guests)?;
    progress::during("stopping formtune", |tick| agent.stop(tick))?;

    let enforce = folder.join("enforce");
    let settings = host.settings(&libvirtd, &enforce, "enforce");
    let agent = progress::during("starting formtune, which enforces", |tick| {
        Agent::start(program, &enforce, &settings, tick)
    })?;
    settle("with formtune: neighbours spin, formtune acts", SETTLE_ENFORCED)?;
    let enforced = Phase::measure("with formtune: measuring", MEASURE, &victim, &neighbours)?;
    let enforced_weights = weights(&guests)?;
    println!("\n{}", agent.explain(VICTIM)?.trim_end());
    progress::during("stopping formtune, which restores", |tick| agent.stop(tick))?;
    let not_restored = differences(&originals, &knobs(&guests)?);

    let id = VmId::from(VICTIM);
    let waits =
        |folder: &Path, phase: &Phase| Waits::of(&recording(folder), &id, phase.from, phase.to);
    let columns = [
        Column::new("alone", &alone, &waits(&observe, &alone)?, alone_weights),
        Column::new("contended", &contended, &waits(&observe, &contended)?, contended_weights),
        Column::new("with formtune", &enforced, &waits(&enforce, &enforced)?, enforced_weights),
    ];
    Ok(Report::new(image.kvm, columns, not_restored))
}

/// How the guests are laid out on this host: all of them on its last CPU. That is the same
/// contention on a small and on a large host, and it leaves the other CPUs to everybody else.
struct Host {
    online: usize,
}

impl Host {
    fn new() -> Result<Self> {
        Ok(Self { online: std::thread::available_parallelism().context("CPUs")?.get() })
    }

    fn cpu(&self) -> usize {
        self.online - 1
    }

    fn explain(&self, kvm: bool) -> String {
        let accelerator = if kvm { "KVM" } else { "TCG, as there is no usable KVM" };
        format!(
            "Three guests ({accelerator}), one virtual CPU each, all on\n\
             CPU {} of the host and with the same weight. The victim has 1 ms of work every\n\
             10 ms; its two neighbours never sleep. So that other work of this host does not\n\
             pass for theirs, their common cgroup has ten times the default weight, and while\n\
             the neighbours are stopped (\"alone\") a spinner of the lowest priority beside\n\
             the victim keeps the scheduler from moving other tasks to that CPU.",
            self.cpu()
        )
    }

    /// The agent's configuration: who is who, and how far it may go.
    fn settings(&self, libvirtd: &libvirtd::Libvirtd, folder: &Path, mode: &str) -> String {
        // Guests that fill only one CPU never make the host as a whole look busy.
        let relax_below_busy = 0.7 / self.online as f64;
        format!(
            "listen = 'off'
libvirt = '{uri}'
cgroups = ['{pattern}']
record = '{recording}'
default_class = 'bystander'
mode.cpu_weight = '{mode}'

[cpu]
relax_below_busy = {relax_below_busy:.3}

# Guests of somebody else: measured, never touched.
[classes.bystander]
slo = 'off'
floor_ratio = 1.0
ceiling_ratio = 1.0

# 1 ms of work is due every 10 ms: waiting longer than 1 ms for a CPU hurts.
[classes.latency]
priority = 'high'
slo = {{ threshold = '1ms' }}

# May be pushed down to a fiftieth of its weight. A weight only counts where somebody else
# wants the CPU, so what the victim leaves is still all theirs.
[classes.batch]
priority = 'low'
slo = 'off'
floor_ratio = 0.02

[[rules]]
vms = ['{VICTIM}']
class = 'latency'
[[rules]]
vms = ['demo-noisy-*']
class = 'batch'
",
            uri = libvirtd.uri(),
            pattern = Partition::PATTERN,
            recording = recording(folder).display(),
        )
    }
}

fn recording(folder: &Path) -> PathBuf {
    folder.join("recording.jsonl")
}

fn start_guests(
    libvirtd: &Rc<libvirtd::Libvirtd>,
    folder: &Path,
    image: &Image,
    host: &Host,
) -> Result<(Domain, Vec<Domain>)> {
    let consoles = folder.join("console");
    fs::create_dir_all(&consoles)?;
    let mut step = progress::Step::start("booting three guests");
    let boot = |name: &str, settings| {
        let guest = Guest { name, cpu: host.cpu(), settings };
        Domain::start(libvirtd, image, &guest, consoles.join(format!("{name}.log")))
    };
    let victim = boot(VICTIM, "role=victim period_us=10000 work_us=1000 report_ms=1000")?;
    let mut neighbours = Vec::new();
    for name in NEIGHBOURS {
        neighbours.push(boot(name, "role=neighbour report_ms=1000")?);
    }
    let all: Vec<&Domain> = [&victim].into_iter().chain(&neighbours).collect();
    phase::wait_for_reports(&all, || step.tick())?;
    step.end("done");
    Ok((victim, neighbours))
}

fn settle(label: &str, length: Duration) -> Result<()> {
    let mut step = progress::Step::start(label);
    interrupt::wait(length, || step.tick())?;
    step.end("settled");
    Ok(())
}

fn knobs(guests: &[&Domain]) -> Result<Vec<(String, Knobs)>> {
    guests.iter().map(|guest| Ok((guest.name().to_owned(), guest.knobs()?))).collect()
}

fn weights(guests: &[&Domain]) -> Result<Vec<String>> {
    guests.iter().map(|guest| guest.weight()).collect()
}

/// What is not as it was, one line each.
fn differences(before: &[(String, Knobs)], after: &[(String, Knobs)]) -> Vec<String> {
    let mut lines = Vec::new();
    for ((guest, before), (_, after)) in before.iter().zip(after) {
        let (was, is) = (&before.libvirt_shares, &after.libvirt_shares);
        if was != is {
            lines.push(format!("{guest}: cpu_shares of libvirt was {was}, is {is}"));
        }
        for (path, was) in &before.files {
            let is = after.files.get(path).map_or("gone", String::as_str);
            if was != is {
                lines.push(format!("{guest}: {} was {was}, is {is}", path.display()));
            }
        }
    }
    lines
}

/// One demo or benchmark per folder: held as long as the file is open.
///
/// # Errors
/// When somebody else holds it.
pub fn lock(folder: &Path) -> Result<nix::fcntl::Flock<fs::File>> {
    let file = fs::File::create(folder.join("lock"))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(|_| {
        anyhow::anyhow!("another demo or benchmark is running in {}", folder.display())
    })
}

fn remove_logs(folder: &Path) -> Result<()> {
    for name in ["console", "observe", "enforce"] {
        let path = folder.join(name);
        fs::remove_dir_all(&path)
            .with_context(|| format!("failed to remove {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Host;

    #[test]
    fn the_explanation_fits_eighty_columns() {
        for kvm in [false, true] {
            let text = Host { online: 1_000 }.explain(kvm);
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        }
    }
}
