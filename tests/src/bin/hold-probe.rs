//! Holds one kind of probe attached until its standard input ends; for `bench runq`.
//!
//! `hold-probe floor`: the empty program. `hold-probe runq PATTERN`: the run-queue probe, with
//! the VMs that the cgroup pattern names. Prints `ready` once it is attached.

use anyhow::{Context, Result, bail};
use formtune_agent::sense::probes::{Floor, Kernel};
use formtune_agent::sense::{ProbeState, Sense, SenseConfig};
use formtune_core::units::Nanos;
use std::io::Read;

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
        _ => bail!("usage: hold-probe floor | runq PATTERN"),
    }
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
