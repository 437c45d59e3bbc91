//! Waits of the last seconds per VM, for the percentiles people are shown.
//!
//! Control has windows of its own in core; this one is longer, so that a figure read twice
//! does not look like two different nodes. Idle VMs cost nothing.

use super::snapshot::RecentRunq;
use formtune_common::histogram::{self, BUCKETS};
use formtune_core::sample::RunqInterval;
use formtune_core::units::{Nanos, VmId};
use std::collections::{BTreeMap, VecDeque};

/// Time looked back on.
pub const SPAN: Nanos = Nanos::from_secs(10);
/// Intervals are added up to slots of this length.
const SLOT: Nanos = Nanos::from_secs(1);

/// The waits of the last [`SPAN`] of every VM that waited.
#[derive(Debug, Default)]
pub struct Recent {
    vms: BTreeMap<VmId, VecDeque<Slot>>,
}

#[derive(Debug)]
struct Slot {
    began: Nanos,
    /// Sorted by bucket.
    counts: Vec<(u16, u32)>,
    wait_ns: u64,
}

impl Recent {
    /// Adds what ended between the last sample and `now`. Intervals without waits may be
    /// left out.
    pub fn add(&mut self, vm: &VmId, now: Nanos, interval: &RunqInterval) {
        if interval.counts.is_empty() {
            return;
        }
        if !self.vms.contains_key(vm) {
            self.vms.insert(vm.clone(), VecDeque::new());
        }
        let slots = self.vms.get_mut(vm).expect("inserted above");
        while slots.front().is_some_and(|slot| now.since(slot.began) >= SPAN) {
            slots.pop_front();
        }
        match slots.back_mut() {
            Some(slot) if now.since(slot.began) < SLOT => {
                slot.wait_ns += interval.wait_ns;
                merge(&mut slot.counts, &interval.counts);
            }
            _ => slots.push_back(Slot {
                began: now,
                counts: interval.counts.clone(),
                wait_ns: interval.wait_ns,
            }),
        }
    }

    /// Drops a VM that is gone.
    pub fn forget(&mut self, vm: &VmId) {
        self.vms.remove(vm);
    }

    /// Percentiles as of `now`. A VM that did not wait has none, and zero samples.
    pub fn runq(&self, vm: &VmId, now: Nanos) -> RecentRunq {
        let mut counts = [0; BUCKETS];
        let (mut low, mut end, mut samples, mut wait_ns) = (BUCKETS, 0, 0, 0);
        for slot in self.vms.get(vm).into_iter().flatten() {
            if now.since(slot.began) >= SPAN {
                continue;
            }
            wait_ns += slot.wait_ns;
            for &(bucket, count) in &slot.counts {
                let bucket = usize::from(bucket);
                counts[bucket] += u64::from(count);
                samples += u64::from(count);
                (low, end) = (low.min(bucket), end.max(bucket + 1));
            }
        }
        let quantile = |q| quantile(counts.get(low..end)?, low, samples, q);
        RecentRunq {
            span: SPAN,
            samples,
            wait: Nanos(wait_ns),
            p50: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: quantile(1.0),
        }
    }
}

/// Adds one sparse histogram to another.
fn merge(into: &mut Vec<(u16, u32)>, from: &[(u16, u32)]) {
    for &(bucket, count) in from {
        match into.binary_search_by_key(&bucket, |&(bucket, _)| bucket) {
            Ok(at) => into[at].1 = into[at].1.saturating_add(count),
            Err(at) => into.insert(at, (bucket, count)),
        }
    }
}

/// Upper bound of the bucket that holds the value of rank ⌈q × samples⌉; `first` is the bucket of
/// the first count.
fn quantile(counts: &[u64], first: usize, samples: u64, q: f64) -> Option<Nanos> {
    let rank = ((q * samples as f64).ceil() as u64).max(1);
    let mut seen = 0;
    counts.iter().zip(first..).find_map(|(count, bucket)| {
        seen += count;
        (seen >= rank).then(|| Nanos(histogram::upper_bound(bucket as u32)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(waits: &[u64]) -> RunqInterval {
        let mut counts = Vec::new();
        for &ns in waits {
            merge(&mut counts, &[(histogram::bucket(ns) as u16, 1)]);
        }
        RunqInterval { counts, wait_ns: waits.iter().sum() }
    }

    #[test]
    fn percentiles_are_those_of_the_last_seconds_only() {
        let vm = VmId::from("web-1");
        let mut recent = Recent::default();
        recent.add(&vm, Nanos::from_secs(1), &interval(&[5_000_000; 50]));
        for tick in 0..40 {
            let now = Nanos::from_millis(11_000 + tick * 250);
            recent.add(&vm, now, &interval(&[1_000, 2_000, 3_000, 40_000]));
        }
        let now = Nanos::from_millis(20_750);
        let runq = recent.runq(&vm, now);
        assert_eq!(runq.samples, 160);
        assert_eq!(runq.wait, Nanos(40 * 46_000));
        let close = |got: Option<Nanos>, want: u64| {
            let got = got.unwrap().0;
            assert!(got >= want && got as f64 <= want as f64 * 1.0626, "{got} for {want}");
        };
        close(runq.p50, 2_000);
        close(runq.p99, 40_000);
        close(runq.max, 40_000);
        assert!(recent.vms[&vm].len() <= 11, "slots are not kept for ever");

        assert_eq!(recent.runq(&vm, Nanos::from_secs(60)).samples, 0);
        assert_eq!(recent.runq(&vm, Nanos::from_secs(60)).p99, None);
        recent.forget(&vm);
        assert!(recent.vms.is_empty());
    }
}
