//! From the onset of contention to the first weight written, and to the victim's p99 back
//! within its SLO. Real load in VM-shaped cgroups on one CPU; the real agent, restarted for
//! each onset so that each starts from the originals and knows nothing.

use super::load::{Cgroups, Load, VmCgroup};
use crate::demo::agent::{self, Agent};
use crate::demo::filler::Filler;
use crate::demo::{image, interrupt};
use crate::figure::Figure;
use crate::progress;
use crate::setup::{self, Purpose};
use anyhow::{Context, Result, bail};
use formtune_core::units::Nanos;
use formtune_guest::{VictimReport, histogram_us};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

const ONSETS: usize = 30;
/// What the victim is promised: it waits no longer than this for a CPU, p99 over a second.
/// Contended it is 5 to 7 ms here, alone far below a millisecond on a quiet host.
const THRESHOLD_US: u64 = 3_000;
/// Reports of the victim per second.
const REPORTS_PER_S: usize = 10;
/// Windows in a row, each a report later than the last, that must be within the SLO.
const STEADY: usize = 5;
/// Undisturbed time before an onset, so that the agent's window is full and calm.
const CALM: Duration = Duration::from_millis(2_500);
/// Onsets that were not to be had because other work on the host made the victim wait.
const MOST_SPOILT: usize = 30;
/// An onset that takes longer counts with this.
const LIMIT: Duration = Duration::from_secs(15);

/// Measures both figures.
///
/// # Errors
/// When the load cannot be set up, the agent fails, or the neighbours do not hurt the victim.
pub fn run() -> Result<Vec<Figure>> {
    setup::ensure(&[Purpose::Build, Purpose::Bench])?;
    interrupt::catch()?;
    let program = agent::build()?;
    let guest = image::guest_program()?;
    let folder = tempfile::Builder::new().prefix("bench-").tempdir()?;
    let cpu = std::thread::available_parallelism()?.get() - 1;

    let cgroups = Cgroups::new()?;
    let vms = [cgroups.vm(1, "victim")?, cgroups.vm(2, "noisy-1")?, cgroups.vm(3, "noisy-2")?];
    let report_ms = (1_000 / REPORTS_PER_S).to_string();
    let victim = [("role", "victim"), ("wake", "1"), ("report_ms", &report_ms)];
    let mut victim = vms[0].spawn(&guest, &victim, Some(cpu))?;
    let noisy = [("role", "neighbour"), ("threads", "1")];
    let mut noisy =
        [vms[1].spawn(&guest, &noisy, Some(cpu))?, vms[2].spawn(&guest, &noisy, Some(cpu))?];
    victim.wait_for_line()?;
    for load in &mut noisy {
        load.wait_for_line()?;
        load.pause()?;
    }

    let filler = Filler::start(&guest, cgroups.cpu(), cpu)?;
    let mut bench = Bench { vms: &vms, victim: &victim, noisy: &noisy, filler: &filler, seen: 0 };
    let settings = settings(&cgroups);
    let mut step = progress::Step::start(format!("{ONSETS} onsets of contention"));
    let (mut first_write, mut recovered) = (Vec::new(), Vec::new());
    let (_, mut log) = progress::log_file("bench-reaction")?;
    let mut spoilt = 0;
    while first_write.len() < ONSETS {
        let number = first_write.len() + spoilt + 1;
        let state = folder.path().join(number.to_string());
        let onset = bench
            .onset(&program, &state, &settings, &mut || step.tick())
            .with_context(|| format!("onset {number}"))?;
        match onset {
            Some((write, back)) => {
                writeln!(log, "onset {number}: first write {write:.3} s, recovered {back:.3} s")?;
                first_write.push(write);
                recovered.push(back);
            }
            None => {
                writeln!(log, "onset {number}: spoilt")?;
                spoilt += 1;
            }
        }
        if spoilt > MOST_SPOILT {
            bail!("other work on this host disturbed {spoilt} onsets: try again when it is quiet");
        }
    }
    step.end(&format!("done, {spoilt} more were spoilt by other work on this host"));
    let figure = |name, values: &[f64], target| {
        Figure::measured(name, "s", values, None, None, Some(target))
    };
    Ok(vec![
        figure("reaction.first_write", &first_write, "ours <= 1.5"),
        figure("reaction.recovered", &recovered, "ours <= 5"),
    ])
}

fn settings(cgroups: &Cgroups) -> String {
    let online = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "listen = 'off'
libvirt = 'off'
cgroups = ['{}']
default_class = 'bystander'
mode.cpu_weight = 'enforce'
cpu.relax_below_busy = {:.3}
[classes.bystander]
slo = 'off'
floor_ratio = 1.0
ceiling_ratio = 1.0
[classes.latency]
priority = 'high'
slo = {{ threshold = '{THRESHOLD_US}us' }}
[classes.batch]
priority = 'low'
slo = 'off'
floor_ratio = 0.02
[[rules]]
vms = ['victim']
class = 'latency'
[[rules]]
vms = ['noisy-*']
class = 'batch'
",
        cgroups.pattern(),
        // Load on one CPU never makes a larger host look busy.
        0.7 / online as f64,
    )
}

struct Bench<'a> {
    vms: &'a [VmCgroup; 3],
    victim: &'a Load,
    noisy: &'a [Load; 2],
    /// Spins while they do not.
    filler: &'a Filler,
    /// Lines of the victim that were used up.
    seen: usize,
}

impl Bench<'_> {
    /// Seconds from one onset to the first write and to the recovery; `None` when the victim
    /// was not well, or formtune had to act, before it.
    fn onset(
        &mut self,
        program: &Path,
        state: &Path,
        settings: &str,
        tick: &mut dyn FnMut(),
    ) -> Result<Option<(f64, f64)>> {
        let before = self.weights()?;
        let agent = Agent::start(program, state, settings, tick)?;
        self.seen += self.victim.lines_from(self.seen).len();
        interrupt::wait(CALM, &mut *tick)?;
        if self.weights()? != before || worst(&self.reports(Nanos(0))?) > THRESHOLD_US {
            agent.stop(tick)?;
            return Ok(None);
        }
        self.seen += self.victim.lines_from(self.seen).len();
        let begin = agent::monotonic()?;
        for load in self.noisy {
            load.resume()?;
        }
        self.filler.pause()?;
        let outcome = self.watch(begin, &before, tick);
        self.filler.resume()?;
        for load in self.noisy {
            load.pause()?;
        }
        agent.stop(tick)?;
        if self.weights()? != before {
            bail!("formtune did not put the weights back");
        }
        outcome.map(Some)
    }

    /// Looks at knobs and victim until it has recovered.
    fn watch(&self, begin: Nanos, before: &[u64; 3], tick: &mut dyn FnMut()) -> Result<(f64, f64)> {
        let mut written = None;
        loop {
            interrupt::check()?;
            tick();
            let now = agent::monotonic()?.since(begin);
            if written.is_none() && self.weights()? != *before {
                written = Some(now.as_secs_f64());
            }
            let reports = self.reports(begin)?;
            let recovered = recovered(&reports);
            if let (Some(written), Some(at_us)) = (written, recovered) {
                return Ok((written, at_us as f64 / 1e6));
            }
            if now.0 >= LIMIT.as_nanos() as u64 {
                let limit = LIMIT.as_secs_f64();
                if written.is_none() && worst(&reports) <= THRESHOLD_US {
                    bail!("the neighbours did not hurt the victim: p99 {} µs", worst(&reports));
                }
                return Ok((written.unwrap_or(limit), limit));
            }
            // Short against the tick of the agent, and hardly any load on the other CPUs.
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn weights(&self) -> Result<[u64; 3]> {
        Ok([self.vms[0].weight()?, self.vms[1].weight()?, self.vms[2].weight()?])
    }

    /// What the victim reported since the onset, times counted from there.
    fn reports(&self, begin: Nanos) -> Result<Vec<VictimReport>> {
        let mut reports = Vec::new();
        for line in self.victim.lines_from(self.seen) {
            let report =
                VictimReport::parse(&line)?.context("the victim printed something else")?;
            let at_us = report.at_us.saturating_sub(begin.0 / 1_000);
            reports.push(VictimReport { at_us, ..report });
        }
        Ok(reports)
    }
}

/// p99 of the wake-up delay over each window of a second, with the window's end.
fn windows(reports: &[VictimReport]) -> impl Iterator<Item = (u64, u64)> {
    reports.windows(REPORTS_PER_S).map(|window| {
        let mut wake = histogram_us();
        for report in window {
            wake.add(report.wake.as_ref().expect("asked for")).expect("grows by itself");
        }
        (window[REPORTS_PER_S - 1].at_us, wake.value_at_quantile(0.99))
    })
}

/// When the first of [`STEADY`] good windows in a row ended, after a bad one.
fn recovered(reports: &[VictimReport]) -> Option<u64> {
    let windows: Vec<_> = windows(reports).collect();
    let bad = windows.iter().position(|&(_, p99)| p99 > THRESHOLD_US)?;
    let good = windows[bad..]
        .windows(STEADY)
        .find(|run| run.iter().all(|&(_, p99)| p99 <= THRESHOLD_US))?;
    Some(good[0].0)
}

fn worst(reports: &[VictimReport]) -> u64 {
    windows(reports).map(|(_, p99)| p99).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports(wakes_us: &[u64]) -> Vec<VictimReport> {
        let report = |(index, &wake_us): (usize, &u64)| {
            let mut wake = histogram_us();
            wake.record_n(wake_us, 20).unwrap();
            let at_us = (index as u64 + 1) * 100_000;
            VictimReport { at_us, response: histogram_us(), wake: Some(wake) }
        };
        wakes_us.iter().enumerate().map(report).collect()
    }

    #[test]
    fn recovery_needs_harm_first_and_steady_windows_after() {
        let (good, bad) = (THRESHOLD_US / 10, THRESHOLD_US * 5);
        assert_eq!(recovered(&reports(&[good; 40])), None, "never hurt");
        assert_eq!(recovered(&reports(&[bad; 40])), None, "never well");
        let mut wakes = [good; 40];
        wakes[2..8].fill(bad);
        // The last bad report is the 8th; the window of the 9th to the 18th is the first without.
        assert_eq!(recovered(&reports(&wakes)), Some(1_800_000));
        wakes[20] = bad;
        assert_eq!(recovered(&reports(&wakes)), Some(3_100_000), "a relapse");
    }
}
