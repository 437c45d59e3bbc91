use super::TapControl;
use super::flow::{Flow, Seen, Segment};
use proptest::prelude::*;
use std::collections::BTreeMap;

fn data(seq: u32, len: u32) -> Segment {
    Segment { seq, len, flags: 0x10, mss: 0 }
}

/// What the probe does, with room for all flows.
#[derive(Default)]
struct Probe {
    control: TapControl,
    flows: BTreeMap<u64, Flow>,
    again: u64,
}

impl Probe {
    fn count(&mut self, key: u64, segment: &Segment) {
        if !self.control.follows(key) {
            return;
        }
        let mut began = false;
        let flow = self.flows.entry(self.control.kept_as(key)).or_insert_with(|| {
            began = true;
            let mut flow = Flow::default();
            flow.begin(segment);
            flow
        });
        let seen = if began { Seen::default() } else { flow.observe(segment, || 0) };
        self.again += u64::from(seen.retransmitted) << self.control.sampling_shift;
    }
}

/// Three gigabytes pass while a flow is left out: what comes then looks as if it lay behind.
#[test]
fn a_flow_that_was_left_out_begins_anew() {
    let key = 1 << 32;
    let mut probe = Probe::default();
    probe.count(key, &data(0, 1_000));
    let mut as_it_was = probe.flows[&key];
    probe.control = probe.control.with_shift(1);
    assert!(!probe.control.follows(key));
    probe.control = probe.control.with_shift(0);
    let segment = data(1_000_u32.wrapping_sub(1 << 29), 1_000);
    assert_eq!(as_it_was.observe(&segment, || 0).retransmitted, 1, "this is no test");
    probe.count(key, &segment);
    assert_eq!(probe.again, 0);
    probe.count(key, &segment);
    assert_eq!(probe.again, 1);
}

#[test]
fn flows_that_stay_among_those_followed_go_on() {
    let control = TapControl::default().with_shift(2);
    assert_eq!(control, TapControl { sampling_shift: 2, epoch: 0 });
    assert_eq!(control.with_shift(3), TapControl { sampling_shift: 3, epoch: 0 });
    assert_eq!(control.with_shift(1), TapControl { sampling_shift: 1, epoch: 1 });
    let key = 0xabcd_0000_1234_5678;
    for epoch in [0, 1, u32::MAX] {
        let kept = TapControl { sampling_shift: 0, epoch }.kept_as(key);
        assert_eq!(kept as u32, key as u32, "in the same set");
    }
}

proptest! {
    /// However often the share of flows changes while they run, what is counted lies around what
    /// was sent again by no more than the choice of flows allows.
    #[test]
    fn counts_are_unbiased_while_the_share_changes(
        seed in any::<u64>(),
        shifts in proptest::collection::vec(0..=5_u32, 1..12),
    ) {
        const FLOWS: u64 = 4_096;
        let mut state = seed;
        let mut random = || {
            // Sebastiano Vigna's splitmix64 (public domain).
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        let mut probe = Probe::default();
        let mut deviation = 0.0;
        let mut truth = 0;
        let keys: std::vec::Vec<u64> = (0..FLOWS).map(|_| random()).collect();
        for (round, shift) in (0..).zip(&shifts) {
            probe.control = probe.control.with_shift(*shift);
            for (flow, key) in (0..).zip(&keys) {
                // Within a window of the round before, and behind that of the fifth before.
                let seq = 0x3000_0000_u32.wrapping_mul(round);
                let again = flow % 5;
                for segment in [data(seq, 100), data(seq + 100, 100)] {
                    probe.count(*key, &segment);
                }
                (0..again).for_each(|_| probe.count(*key, &data(seq, 200)));
                truth += again;
            }
            // Rounds choose from the same flows: their deviations add up at worst.
            let squares: f64 = (0..FLOWS).map(|flow| ((flow % 5) as f64).powi(2)).sum();
            deviation += (squares * f64::from((1_u32 << shift) - 1)).sqrt();
        }
        let error = (probe.again as f64 - truth as f64).abs();
        prop_assert!(error <= 6.0 * deviation, "{} for {truth} ± {deviation}", probe.again);
    }
}
