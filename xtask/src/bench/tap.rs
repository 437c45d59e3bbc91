//! What the tap probe adds to a packet, beside an empty tc program on the same device.
//!
//! `tap-load` puts packets on a tap device: the added cost is CPU time of the system call that
//! does that, with the program less without, within a round. So it is what a packet really
//! costs, the kernel's way to the program included; `BPF_PROG_TEST_RUN`, with everything in
//! the cache and no packet moved, would tell of the program alone.

use crate::figure::Figure;
use crate::progress;
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;

const ROUNDS: usize = 21;
/// Of one run: some tenths of a second.
const PACKETS: usize = 200_000;

/// Measures both figures.
///
/// # Errors
/// When the load cannot be built or run, which needs root.
pub fn run() -> Result<Vec<Figure>> {
    let program = super::build("tap-load")?;
    [("tap.one_flow", 1), ("tap.10000_flows", 10_000)]
        .into_iter()
        .map(|(name, flows)| measure(&program, name, flows))
        .collect()
}

fn measure(program: &Path, name: &str, flows: usize) -> Result<Figure> {
    let mut step = progress::Step::start(format!("bench {name}: {ROUNDS} rounds"));
    let numbers = [ROUNDS, PACKETS, flows].map(|number| number.to_string());
    let out = Command::new(program).args(numbers).output()?;
    step.tick();
    if !out.status.success() {
        step.end("failed");
        bail!("tap-load: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    step.end("done");
    let (mut floor, mut ours) = (Vec::new(), Vec::new());
    for line in String::from_utf8(out.stdout)?.lines() {
        let mut costs = line.split(' ').map(str::parse);
        let mut next = || -> Result<f64> { Ok(costs.next().context("a short line")??) };
        floor.push(next()?);
        ours.push(next()?);
    }
    let target = Some("ratio_to_floor <= 4");
    Ok(Figure::measured(name, "ns/packet", &ours, None, Some(&floor), target))
}
