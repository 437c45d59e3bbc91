//! A sliding window of run-queue waits, made of the counts of single ticks.
//!
//! Each tick's counts are kept as they came (sparse). A quantile is found by walking down
//! from the greatest bucket of all ticks at once; as the quantiles that matter lie near the
//! top, that visits a few buckets, where a running sum would have to be kept for all of them.

use crate::sample::RunqInterval;
use crate::units::Nanos;
use alloc::vec::Vec;
use formtune_common::histogram::{BUCKETS, upper_bound};

/// Waits of the last window.
#[derive(Clone, Debug, Default)]
pub struct Window {
    /// Oldest first.
    ticks: Vec<Tick>,
    /// The counts of all ticks, one after another, ascending by bucket within a tick.
    counts: Vec<(u16, u32)>,
    /// Where the oldest tick's counts begin; what lies before is swept when it is the larger
    /// part, so that a count is moved about once in its life.
    start: usize,
    /// Waits in all ticks.
    total: u64,
}

#[derive(Clone, Copy, Debug)]
struct Tick {
    at: Nanos,
    len: u32,
    /// Entries of the tick not visited yet, while a quantile is looked for.
    left: u32,
}

impl Window {
    /// Adds the waits that ended up to `at`, and drops ticks that lie `window` or more back.
    ///
    /// Half a `tick` of jitter either way leaves the number of ticks in a window as it is.
    pub fn push(&mut self, at: Nanos, interval: &RunqInterval, window: Nanos, tick: Nanos) {
        let keep = Nanos(window.0.saturating_sub(tick.0 / 2));
        let gone = self.ticks.iter().take_while(|tick| at.since(tick.at) >= keep).count();
        if gone > 0 {
            let entries: usize = self.ticks.drain(..gone).map(|tick| tick.len as usize).sum();
            self.total -= sum(&self.counts[self.start..self.start + entries]);
            self.start += entries;
            if self.start * 2 >= self.counts.len() {
                self.counts.drain(..self.start);
                self.start = 0;
            }
        }
        let len = interval.counts.len() as u32;
        self.ticks.push(Tick { at, len, left: 0 });
        let from = self.counts.len();
        self.counts.extend_from_slice(&interval.counts);
        let added = &mut self.counts[from..];
        if !added.is_sorted_by_key(|(bucket, _)| *bucket) {
            added.sort_unstable();
        }
        self.total += sum(added);
    }

    /// Forgets everything, keeping its memory.
    pub fn clear(&mut self) {
        self.ticks.clear();
        self.counts.clear();
        self.start = 0;
        self.total = 0;
    }

    /// Waits in the window.
    pub fn samples(&self) -> u64 {
        self.total
    }

    /// The quantile `q` (nearest rank): the **upper bound** of the bucket that holds it, so
    /// at most 4.43 % too high and never too low. `None` without waits.
    pub fn quantile(&mut self, q: f64) -> Option<Nanos> {
        self.quantile_among(q, self.total)
    }

    /// The quantile if there were `total` waits, those that are missing having been none:
    /// whatever they would have been, the true quantile is not lower. `None` if it would be
    /// among the missing.
    pub fn quantile_among(&mut self, q: f64, total: u64) -> Option<Nanos> {
        let total = total.max(self.total);
        let rank = (libm::ceil(q * total as f64) as u64).clamp(1, total.max(1));
        let mut above = total.checked_sub(rank)? + 1;
        if above > self.total {
            return None;
        }
        for tick in &mut self.ticks {
            tick.left = tick.len;
        }
        loop {
            let mut greatest = None;
            let mut end = self.start;
            for tick in &self.ticks {
                if tick.left > 0 {
                    greatest = greatest.max(Some(self.counts[end + tick.left as usize - 1].0));
                }
                end += tick.len as usize;
            }
            let greatest = greatest?;
            let mut start = self.start;
            for tick in &mut self.ticks {
                while tick.left > 0 {
                    let (bucket, count) = self.counts[start + tick.left as usize - 1];
                    if bucket != greatest {
                        break;
                    }
                    tick.left -= 1;
                    above = above.saturating_sub(u64::from(count));
                }
                start += tick.len as usize;
            }
            if above == 0 {
                // A bucket that the scheme does not have counts as the last one.
                return Some(Nanos(upper_bound(u32::from(greatest).min(BUCKETS as u32 - 1))));
            }
        }
    }
}

fn sum(counts: &[(u16, u32)]) -> u64 {
    counts.iter().map(|(_, count)| u64::from(*count)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use formtune_common::histogram::bucket;

    const TICK: Nanos = Nanos::from_millis(250);
    const WINDOW: Nanos = Nanos::from_secs(1);

    fn interval(waits: &[u64]) -> RunqInterval {
        let mut counts = alloc::collections::BTreeMap::new();
        for &wait in waits {
            *counts.entry(bucket(wait) as u16).or_insert(0) += 1;
        }
        RunqInterval { counts: counts.into_iter().collect(), wait_ns: waits.iter().sum() }
    }

    #[test]
    fn slides_by_ticks() {
        let mut window = Window::default();
        for tick in 0..8_u64 {
            // A jitter of up to 40 ms must not change how many ticks a window holds.
            let at = Nanos(tick * TICK.0 + (tick % 3) * 20_000_000);
            window.push(at, &interval(&[1_000; 10]), WINDOW, TICK);
            assert_eq!(window.samples(), 10 * (tick + 1).min(4));
        }
        window.push(Nanos::from_secs(60), &interval(&[5]), WINDOW, TICK);
        assert_eq!((window.samples(), window.quantile(0.5)), (1, Some(Nanos(5))));
        assert_eq!(window.counts.len(), 1);
    }

    #[test]
    fn quantile_is_the_upper_bound() {
        let mut window = Window::default();
        assert_eq!(window.quantile(0.99), None);
        window.push(Nanos(1), &interval(&[1_000_000; 99]), WINDOW, TICK);
        window.push(Nanos(2), &interval(&[50_000_000; 1]), WINDOW, TICK);
        let bound = |wait| Some(Nanos(upper_bound(bucket(wait))));
        assert_eq!(window.quantile(0.99), bound(1_000_000));
        assert_eq!(window.quantile(0.991), bound(50_000_000));
        assert_eq!(window.quantile(f64::NAN), bound(1_000_000));
    }

    #[test]
    fn missing_waits_count_as_none() {
        let mut window = Window::default();
        assert_eq!(window.quantile_among(0.99, 100), None);
        window.push(Nanos(1), &interval(&[50_000_000]), WINDOW, TICK);
        assert_eq!(window.quantile_among(0.99, 100), None, "one of a hundred may be late");
        window.push(Nanos(2), &interval(&[50_000_000, 1_000]), WINDOW, TICK);
        let late = Some(Nanos(upper_bound(bucket(50_000_000))));
        assert_eq!(window.quantile_among(0.99, 100), late, "two may not");
        assert_eq!(window.quantile_among(0.5, 2), window.quantile(0.5), "none is missing");
    }

    #[test]
    fn takes_unsorted_and_unknown_buckets() {
        let mut window = Window::default();
        let garbage =
            RunqInterval { counts: [(9, 1), (3, 2), (9, 4), (u16::MAX, 1)].into(), wait_ns: 0 };
        for tick in 0..20 {
            window.push(Nanos(tick * TICK.0), &garbage, WINDOW, TICK);
        }
        assert_eq!(window.samples(), 32);
        let bound = |bucket| Some(Nanos(upper_bound(bucket)));
        assert_eq!(window.quantile(1.0), bound(BUCKETS as u32 - 1));
        assert_eq!(window.quantile(0.5), bound(9));
        assert_eq!(window.quantile(0.01), bound(3));
    }
}
