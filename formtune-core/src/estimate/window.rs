//! A sliding window of run-queue waits, made of the counts of single ticks.
//!
//! Each tick's counts are kept as they came (sparse) together with their running sum, so a
//! step costs one merge of the new tick and one of the tick that falls out, whatever the
//! window's length.

use crate::sample::RunqInterval;
use crate::units::Nanos;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use formtune_common::runq::{BUCKETS, upper_bound};

/// Waits of the last window.
#[derive(Clone, Debug, Default)]
pub struct Window {
    /// Oldest first.
    ticks: VecDeque<Tick>,
    /// The counts of all ticks, one after another.
    counts: VecDeque<(u16, u32)>,
    /// Sum over all ticks, ascending by bucket; a count may be zero.
    sum: Vec<(u16, u64)>,
    /// Waits in `sum`.
    total: u64,
}

#[derive(Clone, Copy, Debug)]
struct Tick {
    at: Nanos,
    len: u32,
}

impl Window {
    /// Adds the waits that ended up to `at`, and drops ticks that lie `window` or more back.
    ///
    /// Half a `tick` of jitter either way leaves the number of ticks in a window as it is.
    pub fn push(&mut self, at: Nanos, interval: &RunqInterval, window: Nanos, tick: Nanos) {
        let keep = Nanos(window.0.saturating_sub(tick.0 / 2));
        while let Some(&oldest) = self.ticks.front() {
            if at.since(oldest.at) < keep {
                break;
            }
            self.drop_oldest(oldest.len);
        }
        self.ticks.push_back(Tick { at, len: interval.counts.len() as u32 });
        self.counts.extend(&interval.counts);
        let mut cursor = 0;
        for &(bucket, count) in &interval.counts {
            cursor = seek(&self.sum, cursor, in_range(bucket));
            match self.sum.get_mut(cursor) {
                Some((found, sum)) if *found == in_range(bucket) => *sum += u64::from(count),
                _ => self.sum.insert(cursor, (in_range(bucket), u64::from(count))),
            }
            self.total += u64::from(count);
        }
    }

    /// Forgets everything, keeping its memory.
    pub fn clear(&mut self) {
        self.ticks.clear();
        self.counts.clear();
        self.sum.clear();
        self.total = 0;
    }

    /// Waits in the window.
    pub fn samples(&self) -> u64 {
        self.total
    }

    /// The quantile `q` (nearest rank): the **upper bound** of the bucket that holds it, so
    /// at most 6.25 % too high and never too low. `None` without waits.
    pub fn quantile(&self, q: f64) -> Option<Nanos> {
        if self.total == 0 {
            return None;
        }
        let rank = (libm::ceil(q * self.total as f64) as u64).clamp(1, self.total);
        // From the top: the quantiles that matter lie there.
        let above = self.total - rank + 1;
        let mut seen = 0;
        for &(bucket, count) in self.sum.iter().rev() {
            seen += count;
            if seen >= above {
                return Some(Nanos(upper_bound(u32::from(bucket))));
            }
        }
        None
    }

    fn drop_oldest(&mut self, len: u32) {
        self.ticks.pop_front();
        let (mut cursor, mut emptied) = (0, 0);
        for (bucket, count) in self.counts.drain(..len as usize) {
            cursor = seek(&self.sum, cursor, in_range(bucket));
            let (_, sum) = &mut self.sum[cursor];
            *sum -= u64::from(count);
            emptied += usize::from(*sum == 0);
            self.total -= u64::from(count);
        }
        // Buckets come and go all the time; sweep only when many have gone.
        if emptied > 8 || self.ticks.is_empty() {
            self.sum.retain(|(_, count)| *count > 0);
        }
    }
}

/// Where `bucket` is or belongs, at or after `cursor` if buckets ascend, else from the start.
fn seek(sum: &[(u16, u64)], cursor: usize, bucket: u16) -> usize {
    let from = match cursor.checked_sub(1) {
        Some(before) if sum[before].0 >= bucket => 0,
        _ => cursor,
    };
    from + sum[from..].iter().take_while(|(at, _)| *at < bucket).count()
}

/// A bucket that the scheme does not have counts as the last one.
fn in_range(bucket: u16) -> u16 {
    bucket.min(BUCKETS as u16 - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use formtune_common::runq::bucket;

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
        assert_eq!(window.sum.len(), 1);
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
    fn takes_unsorted_and_unknown_buckets() {
        let mut window = Window::default();
        let garbage =
            RunqInterval { counts: [(9, 1), (3, 2), (9, 4), (u16::MAX, 1)].into(), wait_ns: 0 };
        for tick in 0..20 {
            window.push(Nanos(tick * TICK.0), &garbage, WINDOW, TICK);
        }
        assert_eq!(window.samples(), 32);
        assert_eq!(window.sum, [(3, 8), (9, 20), (BUCKETS as u16 - 1, 4)]);
    }
}
