//! One phase of the demo: what the guests printed about it.

use super::domain::Domain;
use super::{agent, interrupt};
use crate::progress;
use anyhow::{Context, Result, bail};
use formtune_core::units::Nanos;
use formtune_guest::{NeighbourReport, VictimReport, histogram_us};
use hdrhistogram::Histogram;
use std::fs;
use std::time::Duration;

/// A measured stretch of time.
pub struct Phase {
    /// When it began.
    pub from: Nanos,
    /// When it ended.
    pub to: Nanos,
    /// The victim's response times, microseconds.
    pub response: Histogram<u64>,
    /// Pieces of work per second of all neighbours; `None` while they are stopped.
    pub work_per_s: Option<f64>,
}

impl Phase {
    /// Measures for `length`, under one progress line.
    ///
    /// # Errors
    /// When a console cannot be read or says too little, or on an interrupt.
    pub fn measure(
        label: &str,
        length: Duration,
        victim: &Domain,
        neighbours: &[&Domain],
    ) -> Result<Self> {
        let victim_from = size(victim)?;
        let neighbours_from =
            neighbours.iter().map(|guest| size(guest)).collect::<Result<Vec<_>>>()?;
        let from = agent::monotonic()?;
        let mut step = progress::Step::start(label);
        interrupt::wait(length, || step.tick())?;
        let to = agent::monotonic()?;

        let mut response = histogram_us();
        // The first report began before the phase did.
        for line in lines(victim, victim_from)?.iter().skip(1) {
            if let Some(report) = VictimReport::parse(line).with_context(|| console(victim))? {
                response.add(report.response)?;
            }
        }
        if response.is_empty() {
            bail!("{}: no report within {} s", console(victim), length.as_secs());
        }
        let mut work = 0.0;
        for (guest, offset) in neighbours.iter().zip(neighbours_from) {
            let mut reports = Vec::new();
            for line in lines(guest, offset)? {
                reports.extend(NeighbourReport::parse(&line).with_context(|| console(guest))?);
            }
            work += rate(&reports).with_context(|| console(guest))?;
        }
        step.end(&format!(
            "response p99 {:.2} ms of {} periods",
            response.value_at_quantile(0.99) as f64 / 1e3,
            response.len()
        ));
        Ok(Self { from, to, response, work_per_s: (!neighbours.is_empty()).then_some(work) })
    }

    /// A quantile of the response time.
    pub fn response_at(&self, q: f64) -> Nanos {
        Nanos::from_micros(self.response.value_at_quantile(q))
    }
}

/// Work per second between the first and the last report.
fn rate(reports: &[NeighbourReport]) -> Result<f64> {
    let (Some(first), Some(last)) = (reports.first(), reports.last()) else {
        bail!("no report");
    };
    if last.at_us <= first.at_us {
        bail!("only one report");
    }
    let work = last.iterations.saturating_sub(first.iterations) as f64;
    Ok(work * 1e6 / (last.at_us - first.at_us) as f64)
}

fn console(guest: &Domain) -> String {
    format!("guest {}, console {}", guest.name(), guest.console().display())
}

fn size(guest: &Domain) -> Result<usize> {
    let meta = fs::metadata(guest.console()).with_context(|| console(guest))?;
    Ok(meta.len() as usize)
}

/// The lines printed since the console had `offset` bytes, without a cut one at either end.
fn lines(guest: &Domain, offset: usize) -> Result<Vec<String>> {
    let bytes = fs::read(guest.console()).with_context(|| console(guest))?;
    let text = String::from_utf8_lossy(bytes.get(offset..).unwrap_or_default());
    let mut lines: Vec<String> = text.split('\n').map(|line| line.trim().to_owned()).collect();
    lines.pop();
    if offset > 0 && bytes.get(offset - 1) != Some(&b'\n') && !lines.is_empty() {
        lines.remove(0);
    }
    Ok(lines)
}

/// Waits until every guest printed a report.
///
/// # Errors
/// When one does not within a minute, or on an interrupt.
pub fn wait_for_reports(guests: &[&Domain], mut tick: impl FnMut()) -> Result<()> {
    interrupt::until(Duration::from_secs(60), "the guests' first report", || {
        tick();
        for guest in guests {
            let text = fs::read(guest.console()).with_context(|| console(guest))?;
            let text = String::from_utf8_lossy(&text);
            if !text
                .lines()
                .any(|line| line.starts_with("victim ") || line.starts_with("neighbour "))
            {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })
}

#[cfg(test)]
mod tests {
    use super::rate;
    use formtune_guest::NeighbourReport;

    #[test]
    fn rate_is_taken_between_first_and_last_report() {
        let report = |at_us, iterations| NeighbourReport { at_us, iterations };
        let reports = [report(1_000_000, 100), report(2_500_000, 999), report(5_000_000, 900)];
        assert_eq!(rate(&reports).unwrap(), 200.0);
        assert!(rate(&reports[..1]).is_err());
        assert!(rate(&[]).is_err());
    }
}
