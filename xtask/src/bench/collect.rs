//! `cargo xtask bench collect`: CPU time of reading every histogram of 1,000 VMs (run queue,
//! block I/O, retransmissions), by how many of them had events since the reading before, and by
//! how many VMs there is room for.
//!
//! `collect.everything_1000` is a reading with all that is due once a second besides: the CPU
//! time of all VMs, and pressure and memory events of those whose turn it is.

use super::crowd::{Crowd, VMS};
use super::load::Load;
use crate::demo::interrupt;
use crate::figure::Figure;
use crate::progress;
use crate::setup::{self, Purpose};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// VMs that have events.
const ACTIVE: [usize; 4] = [0, 100, 500, VMS];
/// Room for as few and for as many VMs as there can be.
const SMALL: usize = 1_024;
const LARGE: usize = 8_192;
/// Readings per number of VMs in one round.
const READINGS: usize = 4;
const ROUNDS: usize = 15;
/// As often as the agent reads.
const PACE: Duration = Duration::from_millis(250);
/// Several readings: those stopped or started have settled.
const SETTLE: Duration = Duration::from_millis(500);

/// Measures all figures.
///
/// # Errors
/// When the load cannot be set up or the sensors not be loaded.
pub fn run() -> Result<Vec<Figure>> {
    setup::ensure(&[Purpose::Build, Purpose::Bench])?;
    interrupt::catch()?;
    let holder = super::build("hold-probe")?;
    let crowd = Crowd::start()?;
    let mut small = Reader::start(&holder, &crowd.pattern(), SMALL)?;
    let mut large = Reader::start(&holder, &crowd.pattern(), LARGE)?;
    let mut step = progress::Step::start(format!("bench collect: {ROUNDS} rounds"));
    let mut ms: [Vec<f64>; ACTIVE.len()] = Default::default();
    let (mut of_large, mut everything) = (Vec::new(), Vec::new());
    // The first round allocates what is kept, and is not counted.
    for round in 0..=ROUNDS {
        let counted = round > 0;
        let mut running = 0;
        for load in &crowd.loads {
            load.pause()?;
        }
        for (at, active) in ACTIVE.into_iter().enumerate() {
            resume(&crowd.loads[running..active])?;
            running = active;
            interrupt::wait(SETTLE, || step.tick())?;
            let both = active == 100;
            // Once for what was left over.
            small.read(Which::Everything)?;
            if both {
                large.read(Which::Everything)?;
            }
            let mut mean = [0.0; 2];
            for _ in 0..READINGS {
                interrupt::wait(PACE, || step.tick())?;
                mean[0] += small.histograms(active)? / READINGS as f64;
                if both {
                    mean[1] += large.histograms(active)? / READINGS as f64;
                }
            }
            if counted {
                ms[at].push(mean[0]);
                of_large.extend(both.then_some(mean[1]));
            }
        }
        // All run now.
        let mut mean = 0.0;
        for _ in 0..READINGS {
            interrupt::wait(PACE, || step.tick())?;
            mean += small.read(Which::Everything)?.ms / READINGS as f64;
        }
        if counted {
            everything.push(mean);
        }
    }
    step.end("done");
    for load in &crowd.loads {
        load.resume()?;
    }
    drop((small, large));
    // Twice the VMs with events, twice the time above that of none.
    let above = |at: usize| -> Vec<f64> { ms[at].iter().zip(&ms[0]).map(|(a, b)| a - b).collect() };
    let figure = |at: usize, target: Option<&str>| {
        let name = format!("collect.active_{}", ACTIVE[at]);
        Figure::measured(&name, "ms CPU", &ms[at], None, Some(&ms[0]), target)
    };
    let measured = |name: &str, unit, ours: &[f64], floor: Option<&[f64]>, target| {
        Figure::measured(name, unit, ours, None, floor, target)
    };
    let large = format!("collect.room_for_{LARGE}");
    Ok(vec![
        figure(0, None),
        figure(1, None),
        figure(2, None),
        figure(3, Some("ours <= 3")),
        measured("collect.twice_the_vms", "ms CPU", &above(3), Some(&above(2)), Some(LINEAR)),
        measured(&large, "ms CPU", &of_large, Some(&ms[1]), Some("ratio_to_floor <= 1.2")),
        measured("collect.everything_1000", "ms CPU", &everything, None, None),
    ])
}

/// Of what 1,000 VMs with events cost above none to what 500 do.
const LINEAR: &str = "ratio_to_floor <= 2.3";

fn resume(loads: &[Load]) -> Result<()> {
    loads.iter().try_for_each(Load::resume)
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

/// What it says of one reading.
struct Reading {
    /// CPU time, milliseconds.
    ms: f64,
    /// VMs that had waits, that had block I/O, and of which TCP segments were ever seen.
    vms: [usize; 3],
}

impl Reader {
    fn start(program: &Path, pattern: &str, vms: usize) -> Result<Self> {
        let mut child = Command::new(program)
            .args(["collect", pattern, &vms.to_string()])
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
        interrupt::until(Duration::from_secs(60), "the tap devices of all VMs", || {
            Ok((new.read(Which::Everything)?.vms[2] == VMS).then_some(()))
        })?;
        Ok(new)
    }

    /// Milliseconds of CPU time that a reading of all histograms took; so many VMs were to have
    /// events.
    fn histograms(&mut self, active: usize) -> Result<f64> {
        let reading = self.read(Which::Histograms)?;
        let [waited, blocked, taps] = reading.vms;
        // A few more or less: tasks wake up late on a busy host.
        if [waited, blocked].iter().any(|vms| vms.abs_diff(active) > VMS / 20) || taps != VMS {
            bail!("of {active} VMs {waited} had waits and {blocked} block I/O; {taps} sent TCP");
        }
        Ok(reading.ms)
    }

    fn read(&mut self, which: Which) -> Result<Reading> {
        self.orders.write_all(match which {
            Which::Histograms => b"histograms\n",
            Which::Everything => b"all\n",
        })?;
        let line = self.line()?;
        let numbers: Vec<u64> = line
            .split(' ')
            .map(|word| word.parse().with_context(|| line.clone()))
            .collect::<Result<_>>()?;
        let [ns, waited, blocked, taps] = numbers[..] else { bail!("the reader says {line:?}") };
        Ok(Reading { ms: ns as f64 / 1e6, vms: [waited, blocked, taps].map(|vms| vms as usize) })
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
