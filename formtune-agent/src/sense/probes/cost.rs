//! What the probes' programs cost: the kernel's own statistics (`BPF_ENABLE_STATS`, Linux
//! 5.8), switched on for a tick now and then, as they cost some 25 ns per run themselves.

use aya::sys::{Stats, enable_stats};
use formtune_core::units::Nanos;
use std::os::fd::{AsRawFd, OwnedFd};

/// Least time over which is measured.
const SPAN: Nanos = Nanos::from_millis(200);
/// Time from the end of one measurement to the beginning of the next: the statistics are on
/// for a twentieth of the time at most.
const PAUSE: Nanos = Nanos::from_secs(5);

/// Runs of programs and the time they took, as the kernel counted while it did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Runs {
    /// How many.
    count: u64,
    /// Nanoseconds.
    ns: u64,
    /// Runs that did not happen; see [`Cost::missed`].
    missed: Option<u64>,
}

impl Runs {
    /// Of these programs, as the kernel says beside their descriptors
    /// (`bpf_prog_show_fdinfo()`, kernel/bpf/syscall.c).
    fn of(programs: &[OwnedFd]) -> Self {
        programs.iter().fold(Self::default(), |sum, program| {
            let path = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
            let text = std::fs::read_to_string(path).unwrap_or_default();
            sum + Self::parse(&text)
        })
    }

    fn parse(text: &str) -> Self {
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key))?;
            line.trim_start_matches(':').trim().parse().ok()
        };
        Self {
            count: value("run_cnt").unwrap_or_default(),
            ns: value("run_time_ns").unwrap_or_default(),
            missed: value("recursion_misses"),
        }
    }
}

impl std::ops::Add for Runs {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let missed = [self.missed, other.missed].into_iter().flatten();
        Self {
            count: self.count + other.count,
            ns: self.ns + other.ns,
            missed: missed.reduce(|sum, more| sum + more),
        }
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
    /// Events since the programs were loaded for which one did not run, as the same CPU was in the
    /// middle of running it; `None` where the kernel does not say (before 5.12).
    pub missed: Option<u64>,
}

/// Measures now and then.
#[derive(Debug)]
pub struct CostMeter {
    programs: Vec<OwnedFd>,
    measuring: Option<(Nanos, Runs, OwnedFd)>,
    next_at: Nanos,
}

impl CostMeter {
    /// Of these programs.
    pub fn new(programs: Vec<OwnedFd>) -> Self {
        Self { programs, measuring: None, next_at: Nanos(0) }
    }

    /// To be called with every sample. `Some` at the end of a measurement; never where the
    /// kernel has no statistics.
    pub fn tick(&mut self, now: Nanos) -> Option<Cost> {
        let Some((began, before, _)) = &self.measuring else {
            if now >= self.next_at && !self.programs.is_empty() {
                self.next_at = Nanos(now.0 + PAUSE.0);
                // Read before it is switched on: what runs in between counts for nothing.
                let before = Runs::of(&self.programs);
                self.measuring = enable_stats(Stats::RunTime).ok().map(|fd| (now, before, fd));
            }
            return None;
        };
        let span = now.since(*began);
        if span < SPAN {
            return None;
        }
        let after = Runs::of(&self.programs);
        let (count, ns) = (after.count.checked_sub(before.count), after.ns.checked_sub(before.ns));
        self.measuring = None;
        self.next_at = Nanos(now.0 + PAUSE.0);
        Some(Cost {
            cpus: ns? as f64 / span.0 as f64,
            runs_per_s: count? as f64 / span.as_secs_f64(),
            missed: after.missed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_beside_a_descriptor() {
        let text = "pos:\t0\nflags:\t02000002\nprog_type:\t26\nrun_time_ns:\t4711\n\
                    run_cnt:\t42\nrecursion_misses:\t0\n";
        assert_eq!(Runs::parse(text), Runs { count: 42, ns: 4_711, missed: Some(0) });
        let sum = Runs::parse(text) + Runs { missed: Some(2), ..Runs::default() };
        assert_eq!((sum + Runs::default()).missed, Some(2));
        assert_eq!(Runs::parse("prog_type:\t26\n"), Runs::default());
    }
}
