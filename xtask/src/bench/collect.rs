//! `cargo xtask bench collect`: CPU time of reading every histogram of 1,000 VMs, by how many
//! of them had events since the reading before. All sensors are loaded; the events are
//! wake-ups, one per VM and reading at least, as that is what every running VM has.
//!
//! `collect.everything_1000` is a reading with all that is due once a second besides: the CPU
//! time of all VMs, and pressure and memory events of those whose turn it is.

use super::load::{Cgroups, Load};
use crate::demo::{image, interrupt};
use crate::figure::Figure;
use crate::setup::{self, Purpose};
use crate::{progress, sh};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

const VMS: usize = 1_000;
/// VMs that have events.
const ACTIVE: [usize; 4] = [0, 100, 500, VMS];
/// Readings per number of VMs in one round.
const READINGS: usize = 3;
const ROUNDS: usize = 15;
/// Several readings: those stopped or started have settled.
const SETTLE: Duration = Duration::from_millis(500);

/// Measures all figures.
///
/// # Errors
/// When the load cannot be set up or the sensors not be loaded.
pub fn run() -> Result<Vec<Figure>> {
    setup::ensure(&[Purpose::Build, Purpose::Bench])?;
    interrupt::catch()?;
    let holder = build()?;
    let guest = image::guest_program()?;
    let cgroups = Cgroups::new()?;
    let mut step = progress::Step::start(format!("starting {VMS} periodic tasks"));
    let settings =
        [("role", "victim"), ("period_us", "100000"), ("work_us", "1"), ("report_ms", "600000")];
    let mut loads = Vec::new();
    for number in 1..=VMS {
        let vm = cgroups.vm(number, &format!("busy-{number:04}"))?;
        loads.push(vm.spawn(&guest, &settings, None)?);
        interrupt::check()?;
        step.tick();
    }
    step.end("done");
    let mut reader = Reader::start(&holder, &cgroups.pattern())?;
    let mut step = progress::Step::start(format!("bench collect: {ROUNDS} rounds"));
    let mut ms: [Vec<f64>; ACTIVE.len()] = Default::default();
    let mut everything = Vec::new();
    // The first round allocates what is kept, and is not counted.
    for round in 0..=ROUNDS {
        let mut running = 0;
        for load in &loads {
            load.pause()?;
        }
        for (at, active) in ACTIVE.into_iter().enumerate() {
            resume(&loads[running..active])?;
            running = active;
            interrupt::wait(SETTLE, || step.tick())?;
            // Once for what was left over.
            reader.read(Which::Everything)?;
            for _ in 0..READINGS {
                interrupt::wait(Duration::from_millis(250), || step.tick())?;
                let (took_ms, seen) = reader.read(Which::Histograms)?;
                // A few more or less: tasks wake up late on a busy host.
                if seen.abs_diff(active) > VMS / 20 {
                    bail!("{seen} VMs had events where {active} were to have some");
                }
                if round > 0 {
                    ms[at].push(took_ms);
                }
            }
        }
        // All run now.
        for _ in 0..READINGS {
            interrupt::wait(Duration::from_millis(250), || step.tick())?;
            let (took_ms, _) = reader.read(Which::Everything)?;
            if round > 0 {
                everything.push(took_ms);
            }
        }
        for load in &loads {
            load.resume()?;
        }
    }
    step.end("done");
    drop(reader);
    drop(loads);
    let figure = |at: usize, target: Option<&str>| {
        let name = format!("collect.active_{}", ACTIVE[at]);
        Figure::measured(&name, "ms CPU", &ms[at], None, Some(&ms[0]), target)
    };
    let all = Figure::measured("collect.everything_1000", "ms CPU", &everything, None, None, None);
    Ok(vec![figure(0, None), figure(1, None), figure(2, None), figure(3, Some("ours <= 3")), all])
}

fn resume(loads: &[Load]) -> Result<()> {
    loads.iter().try_for_each(Load::resume)
}

/// The reader, optimised as the agent is when released.
fn build() -> Result<PathBuf> {
    progress::run(
        "building the reader",
        "bench-collect-build",
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(sh::root())
            .args(["build", "--locked", "--release", "--package", "formtune-tests"])
            .args(["--bin", "hold-probe"]),
    )?;
    Ok(sh::target().join("release/hold-probe"))
}

/// What a reading reads.
#[derive(Clone, Copy)]
enum Which {
    Histograms,
    Everything,
}

/// `hold-probe collect`, running.
struct Reader {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Reader {
    fn start(program: &PathBuf, pattern: &str) -> Result<Self> {
        let mut child = Command::new(program)
            .args(["collect", pattern])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start {}", program.display()))?;
        let orders = child.stdin.take().context("no pipe")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe")?);
        let mut new = Self { child, orders, answers };
        let ready = new.line()?;
        if ready != "ready" {
            bail!("the reader says {ready:?}");
        }
        Ok(new)
    }

    /// Milliseconds of CPU time that one reading took, and how many VMs had events.
    fn read(&mut self, which: Which) -> Result<(f64, usize)> {
        self.orders.write_all(match which {
            Which::Histograms => b"histograms\n",
            Which::Everything => b"all\n",
        })?;
        let line = self.line()?;
        let (ns, seen) = line.split_once(' ').with_context(|| format!("{line:?}"))?;
        Ok((ns.parse::<f64>()? / 1e6, seen.parse()?))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the reader ended");
        }
        Ok(line.trim().to_owned())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Gone already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
