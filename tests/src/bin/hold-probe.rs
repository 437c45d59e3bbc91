//! Holds one kind of probe attached until its standard input ends; for `bench runq`.
//!
//! `hold-probe floor`: the empty program. `hold-probe runq PATTERN`: the run-queue probe, with
//! the VMs that the cgroup pattern names. `hold-probe collect PATTERN`: all sensors; for each
//! line that it is sent it reads everything once, and prints the CPU time of that in nanoseconds
//! and how many VMs had waits. Prints `ready` once it is attached.

use anyhow::{Context, Result, bail};
use formtune_agent::sense::probes::{Floor, Kernel};
use formtune_agent::sense::{ProbeState, Sense, SenseConfig, VmReading};
use formtune_core::units::Nanos;
use nix::time::{ClockId, clock_gettime};
use std::io::Read;
use std::time::Instant;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["floor"] => {
            let _floor = Floor::switch(&Kernel::open()?)?;
            hold(None)
        }
        ["runq", pattern] => {
            let patterns = vec![pattern.parse().context("bad pattern")?];
            let mut sense = Sense::open(&SenseConfig { patterns, ..Default::default() }, None)?;
            if let ProbeState::Unavailable { why, .. } = &sense.health().runq {
                bail!("the probe is not loaded: {why}");
            }
            let reading = sense.sample(Nanos(0));
            if reading.vms.is_empty() {
                bail!("no VM under {pattern}");
            }
            hold(Some(sense))
        }
        ["collect", pattern] => collect(pattern),
        _ => bail!("usage: hold-probe floor | runq PATTERN | collect PATTERN"),
    }
}

fn collect(pattern: &str) -> Result<()> {
    let patterns = vec![pattern.parse().context("bad pattern")?];
    let config = SenseConfig { patterns, max_vms: 1024, ..Default::default() };
    let mut sense = Sense::open(&config, None)?;
    let start = Instant::now();
    println!("ready");
    for line in std::io::stdin().lines() {
        line?;
        let before = cpu_ns()?;
        let reading = sense.sample(Nanos(start.elapsed().as_nanos() as u64 + 1));
        let took = cpu_ns()? - before;
        let waited = |vm: &&VmReading| vm.runq.as_ref().is_some_and(|runq| !runq.counts.is_empty());
        println!("{took} {}", reading.vms.values().filter(waited).count());
    }
    Ok(())
}

/// CPU time of this thread, which is the one that reads.
fn cpu_ns() -> Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

fn hold(sense: Option<Sense>) -> Result<()> {
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    if let Some(mut sense) = sense {
        // So that the benchmark can tell that it measured what it meant to.
        sense.sample(Nanos::from_secs(1));
        println!("counted {}", sense.health().counted);
    }
    Ok(())
}
