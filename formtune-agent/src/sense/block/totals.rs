//! Block I/O latency since something was first seen.

use formtune_common::histogram::BUCKETS;
use std::collections::BTreeMap;
use std::ops::Range;

/// Times, bucket by bucket; only the range in use takes memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LatencyTotals {
    /// Sum of the times, nanoseconds.
    pub sum_ns: u64,
    /// Bucket of the first of `counts`.
    first: usize,
    counts: Vec<u64>,
}

impl LatencyTotals {
    /// Adds counts, sorted by bucket, and the sum of their times.
    pub fn add(&mut self, sum_ns: u64, counts: &[(u16, u32)]) {
        self.sum_ns += sum_ns;
        let (Some(&(low, _)), Some(&(high, _))) = (counts.first(), counts.last()) else { return };
        let (low, high) = (usize::from(low), usize::from(high));
        if self.counts.is_empty() {
            self.first = low;
        } else if low < self.first {
            self.counts.splice(0..0, std::iter::repeat_n(0, self.first - low));
            self.first = low;
        }
        if high >= self.first + self.counts.len() {
            self.counts.resize(high - self.first + 1, 0);
        }
        for &(at, count) in counts {
            self.counts[usize::from(at) - self.first] += u64::from(count);
        }
    }

    /// From the first bucket that holds something to behind the last.
    pub fn range(&self) -> Range<usize> {
        self.first..self.first + self.counts.len()
    }

    /// Times per bucket of [`Self::range`].
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Times per bucket; bounds are those of `formtune_common::histogram`.
    pub fn dense(&self) -> [u64; BUCKETS] {
        let mut dense = [0; BUCKETS];
        dense[self.range()].copy_from_slice(&self.counts);
        dense
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Requests of one operation on one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpTotals {
    /// Requests done, with or without times.
    pub requests: u64,
    /// From queued to done.
    pub total: LatencyTotals,
    /// From given to the device to done.
    pub device: LatencyTotals,
}

/// Requests by device and operation (`READ`, `WRITE`, `FLUSH` of `formtune_common::block`).
pub type BlockTotals<'a> = BTreeMap<(u32, u32), &'a OpTotals>;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_range_grows_both_ways(
            intervals in proptest::collection::vec(
                proptest::collection::btree_map(0u16..BUCKETS as u16, 1u32..9, 0..6), 0..20),
        ) {
            let mut totals = LatencyTotals::default();
            let mut expected = [0; BUCKETS];
            for interval in intervals {
                let counts: Vec<_> = interval.into_iter().collect();
                counts.iter().for_each(|&(at, n)| expected[usize::from(at)] += u64::from(n));
                totals.add(counts.len() as u64, &counts);
            }
            prop_assert_eq!(totals.dense(), expected);
            prop_assert_eq!(totals.count(), expected.iter().sum::<u64>());
        }
    }
}
