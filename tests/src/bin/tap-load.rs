//! What the tap probe adds to a packet, for `bench tap`: puts packets on a tap device of its
//! own, in a network namespace of its own, with and without a program there.
//!
//! `tap-load ROUNDS PACKETS FLOWS`. Per round one line: nanoseconds of CPU time that a packet
//! costs with nothing, with the empty program, with the probe. In each round the order is
//! another one, and what is printed for a program is set against the runs with nothing just
//! before and after it.

use anyhow::{Context, Result, ensure};
use formtune_agent::sense::probes::{Floor, TapProbe, TapSizes};
use formtune_tests::frames::Wire;
use formtune_tests::net;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use std::fs::File;
use std::io::Write;
use std::time::Duration;

const TAP: &str = "ft-bench0";
/// Payload: small, as what is not the probe's work is only noise here.
const LEN: u16 = 64;
/// As the agent makes it for 1,024 VMs.
const SIZES: TapSizes = TapSizes { places: 64, cpus: 0, table: 256, flow_sets: 1 << 14 };

fn main() -> Result<()> {
    let arguments: Vec<usize> =
        std::env::args().skip(1).map(|word| word.parse()).collect::<Result<_, _>>()?;
    let [rounds, packets, flows] = arguments[..] else {
        anyhow::bail!("usage: tap-load ROUNDS PACKETS FLOWS");
    };
    ensure!(packets.is_multiple_of(flows), "PACKETS is no multiple of FLOWS");
    net::own_namespace()?;
    let mut load = Load::new(flows, packets)?;
    pin()?;
    // The first run fills caches.
    load.run()?;
    for round in 0..rounds {
        let mut costs = [0.0; 2];
        let mut before = load.run()?;
        for turn in 0..costs.len() {
            let at = (round + turn) % costs.len();
            let with = if at == 0 { load.with_floor()? } else { load.with_probe()? };
            let after = load.run()?;
            costs[at] = with - (before + after) / 2.0;
            before = after;
        }
        println!("{:.2} {:.2} {before:.2}", costs[0], costs[1]);
    }
    Ok(())
}

/// On the last CPU, so that the packets are one CPU's business.
fn pin() -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(std::thread::available_parallelism()?.get() - 1)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &cpus)?)
}

struct Load {
    tap: File,
    frames: Vec<Vec<u8>>,
    seq: u32,
    packets: usize,
    cpus: u32,
}

impl Load {
    fn new(flows: usize, packets: usize) -> Result<Self> {
        let tap = File::from(net::tap(TAP).context("no tap device")?);
        let frame = |flow: usize| {
            let mut frame = Wire::data(flow as u16, 0, LEN).v4();
            // To somebody else, so that the host is done with it soon.
            frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
            frame
        };
        let cpus = std::thread::available_parallelism()?.get() as u32;
        Ok(Self { tap, frames: (0..flows).map(frame).collect(), seq: 0, packets, cpus })
    }

    /// Nanoseconds of this thread's CPU time per packet.
    fn run(&mut self) -> Result<f64> {
        let begin = cpu_time()?;
        for _ in 0..self.packets / self.frames.len() {
            let seq = self.seq.to_be_bytes();
            for frame in &mut self.frames {
                frame[14 + 20 + 4..][..4].copy_from_slice(&seq);
                self.tap.write_all(frame)?;
            }
            self.seq = self.seq.wrapping_add(LEN.into());
        }
        Ok((cpu_time()? - begin).as_nanos() as f64 / self.packets as f64)
    }

    fn with_floor(&mut self) -> Result<f64> {
        let floor = Floor::tap(TAP)?;
        let cost = self.run()?;
        drop(floor);
        settle();
        Ok(cost)
    }

    fn with_probe(&mut self) -> Result<f64> {
        let sizes = TapSizes { cpus: self.cpus, ..SIZES };
        let (probe, links) = TapProbe::alone(TAP, sizes).map_err(anyhow::Error::msg)?;
        // Its flows are known from then on, as they are while it runs for long.
        let packets = std::mem::replace(&mut self.packets, self.frames.len());
        self.run()?;
        self.packets = packets;
        let cost = self.run()?;
        let [sent, _] = probe.rows().at(0).ways;
        let all = (packets + self.frames.len()) as u64;
        ensure!(sent.segments == all, "the probe counted {sent:?} of {all}");
        ensure!(sent.retransmitted == 0 && sent.untracked * 100 <= all, "{sent:?}");
        drop((links, probe));
        settle();
        Ok(cost)
    }
}

/// The kernel frees a program after a grace period.
fn settle() {
    std::thread::sleep(Duration::from_millis(50));
}

fn cpu_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
