//! The senses with filters of `clsact` on tap devices, whatever the kernel has, for tests that
//! kill them: `follow-taps PATTERN`, the cgroup pattern that names the VMs. Ends when its standard
//! input does.

use anyhow::{Context, Result, ensure};
use formtune_agent::sense::probes::TapMethod;
use formtune_agent::sense::{ProbeState, Sense, SenseConfig};
use formtune_core::units::Nanos;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn main() -> Result<()> {
    let pattern = std::env::args().nth(1).context("follow-taps PATTERN")?;
    let patterns = vec![pattern.parse()?];
    let tap_method = Some(TapMethod::Clsact);
    let config = SenseConfig { patterns, max_vms: 64, tap_method, ..SenseConfig::default() };
    let mut sense = Sense::open(&config, None)?;
    let guest = sense.tcp_health().guest;
    ensure!(guest.state == ProbeState::Loaded, "{guest:?}");
    let (start, ended) = (Instant::now(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Whatever comes, it is the end.
            let _ = std::io::stdin().read(&mut [0]);
            ended.store(true, Ordering::Relaxed);
        });
        while !ended.load(Ordering::Relaxed) {
            sense.sample(Nanos(start.elapsed().as_nanos() as u64));
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    Ok(())
}
