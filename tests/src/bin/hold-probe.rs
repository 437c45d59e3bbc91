//! Holds one kind of probe attached until its standard input ends; for `bench runq` and `bench
//! block`.
//!
//! `hold-probe floor`, `hold-probe floor-block`: the empty program on either tracepoint.
//! `hold-probe runq PATTERN`: all probes, with the VMs that the cgroup pattern names.
//! `hold-probe block CGROUP`: the block I/O probe alone, with the VM that this cgroup of the
//! `cpu` hierarchy is. `hold-probe collect PATTERN VMS`: all sensors, with room for so many VMs;
//! for each line that it is sent it reads all histograms once (after the line `all`: CPU time and
//! files of the kernel's too), and prints the CPU time of that in nanoseconds, how many VMs had
//! waits, how many had block I/O, and of how many TCP segments were ever seen. Prints `ready` once it is
//! attached, and what it counted at the end.

use anyhow::{Context, Result, bail};
use formtune_agent::sense::block::Block;
use formtune_agent::sense::cgroup::{self, Hierarchies};
use formtune_agent::sense::probes::{Floor, Kernel};
use formtune_agent::sense::tcp::TcpCounts;
use formtune_agent::sense::{ProbeState, Sense, SenseConfig, VmReading};
use formtune_core::sample::RunqInterval;
use formtune_core::units::Nanos;
use nix::time::{ClockId, clock_gettime};
use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["floor"] => {
            let _floor = Floor::switch(&Kernel::open()?)?;
            hold(|| 0)
        }
        ["floor-block"] => {
            let _floor = Floor::block(&Kernel::open()?)?;
            hold(|| 0)
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
            hold(|| {
                sense.sample(Nanos::from_secs(1));
                sense.health().counted
            })
        }
        ["collect", pattern, vms] => collect(pattern, vms.parse().context("bad number of VMs")?),
        ["block", vm] => {
            let vm = Path::new(vm);
            let hierarchies = Hierarchies::find(Path::new("/sys/fs/cgroup"))?;
            let mut block = Block::open(Kernel::open().as_ref(), &hierarchies, 64);
            if let ProbeState::Unavailable { why, .. } = &block.health().probe {
                bail!("the probe is not loaded: {why}");
            }
            block.track(vm, &BTreeSet::from([cgroup::id(vm)?]), Nanos(0));
            block.read(Nanos(0));
            if block.totals(vm).is_none() {
                bail!("block I/O of {} is charged to no cgroup of its own", vm.display());
            }
            hold(|| {
                block.read(Nanos::from_millis(500));
                let all = block.totals(vm).unwrap_or_default();
                all.values().map(|totals| totals.requests).sum()
            })
        }
        _ => bail!(
            "usage: hold-probe floor | floor-block | runq PATTERN | block CGROUP | \
             collect PATTERN VMS"
        ),
    }
}

fn collect(pattern: &str, max_vms: u32) -> Result<()> {
    let patterns = vec![pattern.parse().context("bad pattern")?];
    let config = SenseConfig { patterns, max_vms, ..Default::default() };
    let mut sense = Sense::open(&config, None)?;
    let tcp = sense.tcp_health();
    for probe in
        [&sense.health().runq, &sense.block().health().probe, &tcp.host.state, &tcp.guest.state]
    {
        if let ProbeState::Unavailable { program, why, .. } = probe {
            bail!("{program} is not loaded: {why}");
        }
    }
    println!("ready");
    // What is no histogram is due once a second, and it is told how late it is.
    let mut now = Nanos(1);
    for line in std::io::stdin().lines() {
        let step = if line? == "all" { Nanos::from_secs(1) } else { Nanos::from_millis(1) };
        now = Nanos(now.0 + step.0);
        let before = cpu_ns()?;
        let reading = sense.sample(now);
        let tcp: Vec<TcpCounts> = sense.each().map(|vm| vm.tcp).collect();
        let took = cpu_ns()? - before;
        let sent = |tcp: &&TcpCounts| tcp.guest.as_ref().is_some_and(|tcp| tcp.sent.segments > 0);
        let had = |of: fn(&VmReading) -> &Option<RunqInterval>| {
            let some = |vm: &&VmReading| of(vm).as_ref().is_some_and(|all| !all.counts.is_empty());
            reading.vms.values().filter(some).count()
        };
        let (waited, blocked) = (had(|vm| &vm.runq), had(|vm| &vm.block));
        println!("{took} {waited} {blocked} {}", tcp.iter().filter(sent).count());
    }
    Ok(())
}

/// CPU time of this thread, which is the one that reads.
fn cpu_ns() -> Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// `counted`: so that the benchmark can tell that it measured what it meant to.
fn hold(counted: impl FnOnce() -> u64) -> Result<()> {
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    println!("counted {}", counted());
    Ok(())
}
