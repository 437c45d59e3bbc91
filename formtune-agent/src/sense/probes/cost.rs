//! What the probes' programs cost: the kernel's own statistics (`BPF_ENABLE_STATS`, Linux
//! 5.8), switched on for a tick now and then, as they cost some 25 ns per run themselves.

use aya::sys::{Stats, enable_stats};
use formtune_core::units::Nanos;
use std::os::fd::OwnedFd;

/// Least time over which is measured.
const SPAN: Nanos = Nanos::from_millis(200);
/// Time from the end of one measurement to the beginning of the next: the statistics are on
/// for a twentieth of the time at most.
const PAUSE: Nanos = Nanos::from_secs(5);

/// Runs of programs and the time they took, as the kernel counted while it did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// How many.
    pub count: u64,
    /// Nanoseconds.
    pub ns: u64,
}

impl Runs {
    /// Of one program; none where the kernel does not say.
    pub(super) fn of(program: &aya::programs::Program) -> Self {
        let Ok(info) = program.info() else { return Self::default() };
        Self { count: info.run_count(), ns: info.run_time().as_nanos() as u64 }
    }
}

impl std::ops::Add for Runs {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { count: self.count + other.count, ns: self.ns + other.ns }
    }
}

/// What the programs cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// CPUs, over the whole node. Each run counts with what taking the time costs, some
    /// 30 ns, so this is rather too much than too little.
    pub cpus: f64,
    /// Runs per second.
    pub runs_per_s: f64,
}

/// Measures now and then.
#[derive(Debug, Default)]
pub struct CostMeter {
    measuring: Option<(Nanos, Runs, OwnedFd)>,
    next_at: Nanos,
}

impl CostMeter {
    /// To be called with every sample; `runs` sums up all programs. `Some` at the end of a
    /// measurement. Never where the kernel has no statistics.
    pub fn tick(&mut self, now: Nanos, runs: impl FnOnce() -> Runs) -> Option<Cost> {
        let Some((began, before, _)) = &self.measuring else {
            if now >= self.next_at {
                self.next_at = Nanos(now.0 + PAUSE.0);
                // Read before it is switched on: what runs in between counts for nothing.
                let before = runs();
                self.measuring = enable_stats(Stats::RunTime).ok().map(|fd| (now, before, fd));
            }
            return None;
        };
        let span = now.since(*began);
        if span < SPAN {
            return None;
        }
        let after = runs();
        let (count, ns) = (after.count.checked_sub(before.count), after.ns.checked_sub(before.ns));
        self.measuring = None;
        self.next_at = Nanos(now.0 + PAUSE.0);
        // A probe that went away meanwhile takes its runs with it: no measurement.
        Some(Cost {
            cpus: ns? as f64 / span.0 as f64,
            runs_per_s: count? as f64 / span.as_secs_f64(),
        })
    }
}
