//! One latency histogram as it leaves the agent: the kernel's counts, and the forms that are
//! made of them.
//!
//! The kernel counts into the buckets of [`formtune_common::histogram`]. Here only those that
//! hold something are kept, so an idle VM costs nothing and a busy one some hundred pairs.
//! Every form is made of the same counts and loses none: [`classic`](LatencyCounts::classic)
//! bounds are bounds of the kernel's, [`native`](LatencyCounts::native) buckets are the
//! kernel's, and the interval log ([`super::hdr`]) tells all of them apart.

use formtune_common::histogram;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

/// Number of finite bounds of the classic form.
pub const LE_BOUNDS: usize = 24;
/// Exponent of the first bound: 2^-20 s, about 1 µs. The last one is 2^3 s.
const FIRST_LE_EXP: i32 = -20;
/// Buckets of the kernel's histogram per power of two.
const PER_OCTAVE: i32 = 1 << histogram::SCHEMA;
/// Empty buckets that a span may hold: they cost a byte each, a new span two and a message.
const SPAN_GAP: i32 = 2;

/// The `i`th bound of the classic form, seconds, inclusive. Powers of two are bounds of the
/// kernel's buckets, so the counts below them are exact.
pub fn le_bound_seconds(i: usize) -> f64 {
    f64::exp2(f64::from(FIRST_LE_EXP) + i as f64)
}

/// Counts of one latency since it was first measured. They only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Read")]
pub struct LatencyCounts {
    /// Bucket and count, ascending, none of them zero.
    counts: Vec<(u16, u64)>,
    /// Sum of the times, nanoseconds, as measured.
    pub sum_ns: u64,
}

/// Consecutive buckets of a native histogram.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Native {
    /// Times of zero.
    pub zero: u64,
    /// How many indices lie between this span and the end of the one before (the first: its
    /// index), and how many buckets it has.
    pub spans: Vec<(i32, u32)>,
    /// Count of each bucket less that of the one before, over all spans.
    pub deltas: Vec<i64>,
}

impl LatencyCounts {
    /// Keeps what is not zero of the kernel's buckets.
    pub fn from_dense(dense: &[u64], sum_ns: u64) -> Self {
        Self::from_range(0, dense, sum_ns)
    }

    /// The same where only the buckets from `first` on are given.
    pub fn from_range(first: usize, dense: &[u64], sum_ns: u64) -> Self {
        let filled = dense.iter().filter(|&&count| count > 0).count();
        let mut counts = Vec::with_capacity(filled);
        let pairs = dense.iter().zip(first..).map(|(&count, bucket)| (bucket as u16, count));
        counts.extend(pairs.filter(|(_, count)| *count > 0));
        Self { counts, sum_ns }
    }

    /// Bucket and count, ascending, none of them zero.
    pub fn counts(&self) -> &[(u16, u64)] {
        &self.counts
    }

    /// Number of times.
    pub fn count(&self) -> u64 {
        self.counts.iter().map(|(_, count)| count).sum()
    }

    /// Counts of the classic form, not cumulative; the last one has no upper bound.
    pub fn classic(&self) -> [u64; LE_BOUNDS + 1] {
        let mut classic = [0; LE_BOUNDS + 1];
        for &(bucket, count) in &self.counts {
            classic[classic_bucket(bucket.into())] += count;
        }
        classic
    }

    /// The native form, of schema [`histogram::SCHEMA`].
    pub fn native(&self) -> Native {
        let mut native =
            Native { deltas: Vec::with_capacity(self.counts.len()), ..Native::default() };
        let (mut before, mut end) = (0, None);
        for &(bucket, count) in &self.counts {
            let Some(index) = histogram::native_index(bucket.into()) else {
                native.zero += count;
                continue;
            };
            let gap = index - end.unwrap_or(0);
            match native.spans.last_mut() {
                Some((_, length)) if gap <= SPAN_GAP => {
                    for _ in 0..gap {
                        native.deltas.push(-before);
                        before = 0;
                    }
                    *length += gap as u32 + 1;
                }
                _ => native.spans.push((gap, 1)),
            }
            native.deltas.push(count as i64 - before);
            (before, end) = (count as i64, Some(index + 1));
        }
        native
    }

    /// What was counted since `earlier`; `None` if that is not an earlier state of the same
    /// counts.
    pub fn since(&self, earlier: &Self) -> Option<Self> {
        let mut old = earlier.counts.iter().peekable();
        let mut counts = Vec::new();
        for &(bucket, count) in &self.counts {
            let had = old.next_if(|(other, _)| *other == bucket).map_or(0, |(_, had)| *had);
            let more = count.checked_sub(had)?;
            if more > 0 {
                counts.push((bucket, more));
            }
        }
        let sum_ns = self.sum_ns.checked_sub(earlier.sum_ns)?;
        // One that is left over is a bucket that is now empty.
        old.next().is_none().then_some(Self { counts, sum_ns })
    }
}

fn classic_bucket(bucket: u32) -> usize {
    let Some(sixteenth) = histogram::native_index(bucket) else { return 0 };
    let exp = sixteenth.div_euclid(PER_OCTAVE) + i32::from(sixteenth.rem_euclid(PER_OCTAVE) > 0);
    ((exp - FIRST_LE_EXP).max(0) as usize).min(LE_BOUNDS)
}

/// As JSON: `counts` is exact, `buckets` the classic form for readers who want no more.
impl Serialize for LatencyCounts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("LatencyCounts", 3)?;
        fields.serialize_field("buckets", &self.classic())?;
        fields.serialize_field("wait_ns", &self.sum_ns)?;
        fields.serialize_field("counts", &self.counts)?;
        fields.end()
    }
}

/// What is read of the JSON form.
#[derive(Deserialize)]
struct Read {
    wait_ns: u64,
    counts: Vec<(u16, u64)>,
}

impl TryFrom<Read> for LatencyCounts {
    type Error = &'static str;

    fn try_from(Read { wait_ns: sum_ns, counts }: Read) -> Result<Self, Self::Error> {
        let known =
            counts.last().is_none_or(|(bucket, _)| usize::from(*bucket) < histogram::BUCKETS);
        if !known || !counts.is_sorted_by(|a, b| a.0 < b.0) {
            return Err("counts are not of ascending, known buckets");
        }
        let counts = counts.into_iter().filter(|(_, count)| *count > 0).collect();
        Ok(Self { counts, sum_ns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_kernel_bucket_lies_on_one_side_of_every_classic_bound() {
        for i in 0..LE_BOUNDS {
            let le = (le_bound_seconds(i) * 1e9) as u64;
            for bucket in 0..histogram::BUCKETS as u32 {
                let (lower, upper) =
                    (histogram::lower_bound(bucket), histogram::upper_bound(bucket));
                assert!(upper <= le || lower > le, "bucket {bucket} straddles {le}");
            }
        }
    }

    #[test]
    fn counts_go_to_the_classic_bucket_that_holds_them() {
        for ns in [0, 1, 15, 953, 954, 1907, 99_999, 1_000_000_000, 1_000_000_001, u64::MAX] {
            let mut dense = vec![0; histogram::BUCKETS];
            dense[histogram::bucket(ns) as usize] = 3;
            let counts = LatencyCounts::from_dense(&dense, 0);
            let within = |i: &usize| ns as f64 / 1e9 <= le_bound_seconds(*i);
            let expected = (0..LE_BOUNDS).find(within).unwrap_or(LE_BOUNDS);
            assert_eq!(counts.classic()[expected], 3, "{ns} ns");
            assert_eq!(counts.count(), 3);
        }
    }

    #[test]
    fn spans_name_the_bucket_of_a_second() {
        let mut dense = vec![0; histogram::BUCKETS];
        let second = histogram::bucket(1_000_000_000) as usize;
        // 2^(0/16) s is the bound of index 0.
        (dense[0], dense[second], dense[second + 3], dense[second + 7]) = (9, 5, 2, 1);
        let native = LatencyCounts::from_dense(&dense, 0).native();
        assert_eq!(native.zero, 9);
        assert_eq!((native.spans, native.deltas), (vec![(0, 4), (3, 1)], vec![5, -5, 0, 2, -1]));
    }

    #[test]
    fn what_is_not_an_earlier_state_has_no_difference() {
        let of = |pairs: &[(u16, u64)], sum_ns| LatencyCounts { counts: pairs.to_vec(), sum_ns };
        let now = of(&[(3, 4), (9, 1)], 50);
        assert_eq!(now.since(&of(&[(3, 1)], 20)), Some(of(&[(3, 3), (9, 1)], 30)));
        assert_eq!(now.since(&now), Some(LatencyCounts::default()));
        for other in
            [of(&[(3, 5)], 0), of(&[(4, 1)], 0), of(&[], 51), of(&[(3, 4), (9, 1), (10, 1)], 0)]
        {
            assert_eq!(now.since(&other), None, "{other:?}");
        }
    }

    #[test]
    fn json_keeps_the_counts_and_refuses_what_no_agent_says() {
        let counts = LatencyCounts { counts: vec![(0, 1), (593, 1 << 40)], sum_ns: 7 };
        let json = serde_json::to_string(&counts).unwrap();
        assert_eq!(serde_json::from_str::<LatencyCounts>(&json).unwrap(), counts);
        for bad in ["[[594,1]]", "[[3,1],[3,1]]", "[[4,1],[3,1]]"] {
            let json = format!("{{\"wait_ns\":0,\"counts\":{bad}}}");
            assert!(serde_json::from_str::<LatencyCounts>(&json).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn differences_add_up(
            first in proptest::collection::vec((0..histogram::BUCKETS, 1u64..1 << 40), 0..50),
            then in proptest::collection::vec((0..histogram::BUCKETS, 1u64..1 << 40), 0..50),
        ) {
            let mut dense = vec![0; histogram::BUCKETS];
            first.iter().for_each(|&(bucket, count)| dense[bucket] += count);
            let earlier = LatencyCounts::from_dense(&dense, 10);
            let mut more = vec![0; histogram::BUCKETS];
            for &(bucket, count) in &then {
                (dense[bucket], more[bucket]) = (dense[bucket] + count, more[bucket] + count);
            }
            let now = LatencyCounts::from_dense(&dense, 25);
            prop_assert_eq!(now.since(&earlier), Some(LatencyCounts::from_dense(&more, 15)));
        }
    }
}
