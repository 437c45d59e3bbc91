//! A check of the run-queue probe: the kernel's own sum of waits, `run_delay` of the VM's
//! threads, over the same time (Documentation/scheduler/sched-stats.rst).
//!
//! Only a sample: one VM per second at most, each over 10 s at least, and only where all
//! threads were the same ones at both ends.

use crate::vm::CgroupVersion;
use formtune_core::units::Nanos;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// Least time that is compared.
const SPAN: Nanos = Nanos::from_secs(10);
/// The same for a VM of which the probe counted nothing, which may be its mistake.
const QUIET_SPAN: Nanos = Nanos::from_secs(600);
/// Waits below this tell nothing: a wait under way at either end weighs more.
const LEAST: Nanos = Nanos::from_millis(10);
/// A VM of more threads is not checked.
const THREADS: usize = 1024;
/// How far below a VM's directory groups are followed.
const DEPTH: u8 = 8;

/// Probe and kernel compared, for one VM over one span of time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunqCheck {
    /// `CLOCK_MONOTONIC` of its end.
    pub at: Nanos,
    /// How long it was.
    pub span: Nanos,
    /// Threads of the VM.
    pub threads: u32,
    /// What the probe counted, nanoseconds.
    pub counted_ns: u64,
    /// What the kernel booked as `run_delay` of these threads, nanoseconds.
    pub kernel_ns: u64,
    /// Difference as a share of the larger one, -1 to 1; negative where the probe counted
    /// less.
    pub divergence_ratio: f64,
}

/// One VM, as at the reading before.
#[derive(Default)]
pub(super) struct RunDelay(Option<Before>);

struct Before {
    at: Nanos,
    counted_ns: u64,
    threads: BTreeMap<u32, u64>,
}

impl RunDelay {
    /// Whether it is time to look (again).
    pub fn is_due(&self, counted_ns: u64, now: Nanos) -> bool {
        self.0.as_ref().is_none_or(|before| {
            let quiet = counted_ns == before.counted_ns;
            now.since(before.at) >= if quiet { QUIET_SPAN } else { SPAN }
        })
    }

    /// Reads all threads in and below `cgroup`; `counted_ns` is what the probe counted so far.
    pub fn read(
        &mut self,
        version: CgroupVersion,
        cgroup: &Path,
        counted_ns: u64,
        now: Nanos,
    ) -> Option<RunqCheck> {
        let threads = threads(version, cgroup).unwrap_or_default();
        self.compare(Before { at: now, counted_ns, threads })
    }

    fn compare(&mut self, now: Before) -> Option<RunqCheck> {
        let before = self.0.replace(now);
        let (before, now) = (before?, self.0.as_ref()?);
        if now.threads.is_empty() || !before.threads.keys().eq(now.threads.keys()) {
            return None;
        }
        let mut kernel_ns = 0;
        for (delay, earlier) in now.threads.values().zip(before.threads.values()) {
            // Less than before: another thread with the same id.
            kernel_ns += delay.checked_sub(*earlier)?;
        }
        let counted_ns = now.counted_ns.checked_sub(before.counted_ns)?;
        let larger = kernel_ns.max(counted_ns);
        (larger >= LEAST.0).then(|| RunqCheck {
            at: now.at,
            span: now.at.since(before.at),
            threads: now.threads.len() as u32,
            counted_ns,
            kernel_ns,
            divergence_ratio: (counted_ns as f64 - kernel_ns as f64) / larger as f64,
        })
    }
}

/// `run_delay` per thread; `None` if the VM is gone or has too many.
fn threads(version: CgroupVersion, cgroup: &Path) -> Option<BTreeMap<u32, u64>> {
    let mut tids = Vec::new();
    tids_below(version, cgroup, &mut tids, 0).ok()?;
    if tids.len() > THREADS {
        return None;
    }
    // procfs has a directory for a thread's id too, though it lists processes only. One that
    // ended meanwhile is not among them.
    let delay = |tid: &u32| {
        let text = std::fs::read_to_string(format!("/proc/{tid}/task/{tid}/schedstat")).ok()?;
        run_delay(&text)
    };
    Some(tids.iter().filter_map(|tid| Some((*tid, delay(tid)?))).collect())
}

/// Second field of `schedstat`: time on run queues, nanoseconds.
pub(in crate::sense) fn run_delay(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().nth(1)?.parse().ok()
}

/// All threads in and below a cgroup.
fn tids_below(
    version: CgroupVersion,
    cgroup: &Path,
    tids: &mut Vec<u32>,
    depth: u8,
) -> io::Result<()> {
    let list = match version {
        CgroupVersion::V1 => "tasks",
        CgroupVersion::V2 => "cgroup.threads",
    };
    // A v2 group that is being made threaded refuses until it is.
    if let Ok(text) = std::fs::read_to_string(cgroup.join(list)) {
        tids.extend(text.lines().filter_map(|tid| tid.parse::<u32>().ok()));
    }
    for entry in std::fs::read_dir(cgroup)?.flatten() {
        if depth < DEPTH && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // Gone meanwhile, and its threads with it.
            let _ = tids_below(version, &entry.path(), tids, depth + 1);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, counted_ns: u64, threads: &[(u32, u64)]) -> Before {
        let threads = threads.iter().copied().collect();
        Before { at: Nanos::from_secs(seconds), counted_ns, threads }
    }

    #[test]
    fn the_second_field_is_the_delay() {
        assert_eq!(run_delay("123 456 7\n"), Some(456));
        for text in ["", "123", "123 x 7", "123 -4 7", "\0"] {
            assert_eq!(run_delay(text), None, "{text:?}");
        }
    }

    #[test]
    fn both_sums_are_compared_over_the_same_time() {
        const MS: u64 = 1_000_000;
        let mut check = RunDelay::default();
        assert!(check.is_due(0, Nanos(0)));
        assert_eq!(check.compare(at(1, 500, &[(7, 100), (9, 0)])), None, "nothing to compare with");
        assert!(
            !check.is_due(501, Nanos::from_secs(10)) && check.is_due(501, Nanos::from_secs(11))
        );
        assert!(
            !check.is_due(500, Nanos::from_secs(11)) && check.is_due(500, Nanos::from_secs(601))
        );
        let found =
            check.compare(at(12, 500 + 99 * MS, &[(7, 100 + 60 * MS), (9, 40 * MS)])).unwrap();
        assert_eq!((found.counted_ns, found.kernel_ns), (99 * MS, 100 * MS));
        assert_eq!((found.threads, found.span), (2, Nanos::from_secs(11)));
        assert!((found.divergence_ratio + 0.01).abs() < 1e-12);
        // The probe counted nothing at all.
        let found = check.compare(at(24, 500 + 99 * MS, &[(7, 100 + 90 * MS), (9, 40 * MS)]));
        assert_eq!(found.unwrap().divergence_ratio, -1.0);
    }

    #[test]
    fn other_threads_counters_that_go_back_and_short_waits_are_no_reading() {
        let mut check = RunDelay::default();
        check.compare(at(0, 0, &[(7, 100)]));
        assert_eq!(check.compare(at(10, 1 << 40, &[(7, 1 << 40), (8, 0)])), None, "a new thread");
        assert_eq!(check.compare(at(20, 2 << 40, &[(7, 2 << 40)])), None, "one has ended");
        assert_eq!(check.compare(at(30, 3 << 40, &[(7, 1 << 40)])), None, "the id is another's");
        assert_eq!(check.compare(at(40, 3 << 40, &[(7, (1 << 40) + 5)])), None, "hardly a wait");
        assert_eq!(check.compare(at(50, 4 << 40, &[])), None, "the VM is gone");
    }
}
