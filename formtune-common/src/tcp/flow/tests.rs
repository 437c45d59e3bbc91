use super::super::frame::{FIN, RST, SYN};
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::vec::Vec;

const MSS: u32 = 1_000;

fn data(seq: u32, len: u32) -> Segment {
    Segment { seq, len, flags: 0x10, mss: 0 }
}

fn flow(first: Segment) -> Flow {
    let mut flow = Flow::default();
    flow.begin(&first);
    flow
}

/// What each of these is, a microsecond apart, after a first one that ends at 1,000.
fn observe(segments: &[Segment]) -> Vec<Seen> {
    let mut flow = flow(data(0, MSS));
    (0..).zip(segments).map(|(at, segment)| flow.observe(segment, || at)).collect()
}

fn again(retransmitted: u32, retransmitted_bytes: u32) -> Seen {
    Seen { retransmitted, retransmitted_bytes, ..Seen::default() }
}

fn late(reordered: u32) -> Seen {
    Seen { reordered, ..Seen::default() }
}

const NEW: Seen =
    Seen { retransmitted: 0, retransmitted_bytes: 0, reordered: 0, keep_alive: false };

#[test]
fn what_was_seen_is_sent_again() {
    let seen = observe(&[data(1_000, 500), data(1_000, 500), data(0, 1_000), data(1_500, 10)]);
    assert_eq!(seen, [NEW, again(1, 500), again(1, 1_000), NEW]);
    // Old and new in one segment.
    assert_eq!(observe(&[data(900, 300), data(1_200, 1)]), [again(1, 100), NEW]);
}

#[test]
fn a_hole_is_reordering_until_three_segments_came() {
    let (hole, after) = (data(1_000, 100), |n: u32| data(1_100 + n * 100, 100));
    assert_eq!(observe(&[after(0), hole]), [NEW, late(1)]);
    assert_eq!(observe(&[after(0), after(1), after(2), hole])[3], late(1));
    assert_eq!(observe(&[after(0), after(1), after(2), after(3), hole])[4], again(1, 100));
    // Filled once, it is none any more.
    assert_eq!(observe(&[after(0), hole, hole]), [NEW, late(1), again(1, 100)]);
    // A long time is as good as many segments.
    let mut flow = flow(data(0, MSS));
    assert_eq!(flow.observe(&after(0), || 7), NEW);
    assert_eq!(flow.observe(&hole, || 7 + REORDER), again(1, 100));
}

#[test]
fn a_hole_can_be_filled_in_the_middle() {
    let ahead = data(1_300, 100);
    let parts = [data(1_100, 50), data(1_250, 50), data(1_000, 100), data(1_150, 100)];
    let seen = observe(&[ahead, parts[0], parts[1], parts[2], parts[3]]);
    assert_eq!(seen, [NEW, late(1), late(1), late(1), again(1, 100)]);
    let seen = observe(&[ahead, parts[0], parts[3], parts[2], parts[3]]);
    assert_eq!(seen, [NEW, late(1), late(1), late(1), again(1, 100)]);
}

#[test]
fn super_packets_are_as_many_segments_as_they_become() {
    let big = |seq, len| Segment { mss: 100, ..data(seq, len) };
    assert_eq!(observe(&[big(1_000, 1_050), big(1_000, 1_050)]), [NEW, again(11, 1_050)]);
    // Only its first two and a half are old.
    assert_eq!(observe(&[big(1_000, 250), big(1_000, 1_000)]), [NEW, again(3, 250)]);
    // Ten segments after a hole are more than three.
    assert_eq!(observe(&[big(1_100, 100), big(1_200, 1_000), big(1_000, 100)])[2], again(1, 100));
}

#[test]
fn syn_and_fin_take_up_a_number() {
    let syn = Segment { flags: SYN, ..data(77, 0) };
    let mut flow = flow(syn);
    assert_eq!(flow.observe(&syn, || 0), again(1, 1));
    assert_eq!(flow.observe(&data(78, 10), || 0), NEW);
    let fin = Segment { flags: FIN | 0x10, ..data(88, 0) };
    assert_eq!(flow.observe(&fin, || 0), NEW);
    assert_eq!(flow.observe(&fin, || 0), again(1, 1));
    // The same ports once more, another connection.
    let other = Segment { flags: SYN, ..data(5_000_000, 0) };
    assert_eq!(flow.observe(&other, || 0), NEW);
    assert_eq!(flow.observe(&data(5_000_001, 10), || 0), NEW);
    assert_eq!(Segment { flags: RST, ..data(1, 10) }.space(), 0);
}

#[test]
fn data_sent_with_a_syn_can_be_sent_again_without() {
    let mut flow = flow(Segment { flags: SYN, ..data(99, 1_400) });
    assert_eq!(flow.observe(&Segment { flags: SYN, ..data(99, 0) }, || 0), again(1, 1));
    assert_eq!(flow.observe(&data(100, 1_400), || 0), again(1, 1_400));
}

#[test]
fn keep_alive_probes_are_neither_new_nor_sent_again() {
    let probe = Seen { keep_alive: true, ..NEW };
    assert_eq!(observe(&[data(999, 1), data(999, 1), data(1_000, 5)]), [probe, probe, NEW]);
    // Without that byte it takes up nothing at all.
    assert_eq!(data(999, 0).space(), 0);
    // A FIN is no probe, nor is the byte before.
    let fin = Segment { flags: FIN, ..data(1_000, 0) };
    assert_eq!(observe(&[fin, fin, data(999, 1)]), [NEW, again(1, 1), again(1, 1)]);
}

#[test]
fn a_jump_beyond_every_window_is_another_connection() {
    assert_eq!(observe(&[data(2_000_000_000, 10), data(2_000_000_010, 10)]), [NEW, NEW]);
    assert_eq!(observe(&[data(2_900_000_000, 10), data(2_900_000_010, 10)]), [NEW, NEW]);
}

/// The rule as the module states it, over all sequence numbers ever seen and all holes ever
/// left, byte by byte, in 64 bits.
struct Reference {
    next: u64,
    /// Holes: first number → one after the last, when it was left, segments since.
    holes: BTreeMap<u64, (u64, u32, u64)>,
}

impl Reference {
    fn observe(&mut self, seq: u64, segment: &Segment, now: u32) -> Seen {
        let end = seq + u64::from(segment.space());
        if (segment.len, segment.space(), seq + 1) == (1, 1, self.next) {
            return Seen { keep_alive: true, ..NEW };
        }
        let mut filled = 0;
        let mut holes = BTreeMap::new();
        for (&start, &(stop, since, later)) in &self.holes {
            let (from, to) = (start.max(seq), stop.min(end));
            if from >= to {
                holes.insert(start, (stop, since, later));
                continue;
            }
            let young = later < u64::from(DUP_THRESH) && now.wrapping_sub(since) < REORDER;
            filled += if young { to - from } else { 0 };
            holes.extend((start < from).then_some((start, (from, since, later))));
            holes.extend((to < stop).then_some((to, (stop, since, later))));
        }
        self.holes = holes;
        let old = end.min(self.next).saturating_sub(seq);
        for (_, _, later) in self.holes.values_mut() {
            *later += u64::from(segment.count());
        }
        if seq > self.next {
            self.holes.insert(self.next, (seq, now, 0));
        }
        self.next = self.next.max(end);
        let bytes = (old - filled) as u32;
        let per = |bytes: u32| match (bytes, segment.mss) {
            (0, _) => 0,
            (_, 0) => 1,
            (bytes, mss) => bytes.div_ceil(mss),
        };
        let retransmitted = per(bytes).min(segment.count());
        let reordered = per(filled as u32).min(segment.count() - retransmitted);
        Seen { retransmitted, retransmitted_bytes: bytes, reordered, keep_alive: false }
    }
}

/// How far a segment is from the highest number, its length, its kind, and the time since the
/// one before.
fn steps() -> impl Strategy<Value = Vec<(i64, u32, u32, u8, u32)>> {
    let far = prop_oneof![
        8 => Just(0_i64),
        6 => -30..30_i64,
        3 => -5_000..5_000_i64,
        1 => -100_000..100_000_i64,
    ];
    let time = prop_oneof![8 => 0..20_u32, 1 => 0..2 * REORDER];
    let len = prop_oneof![4 => 1..20_u32, 1 => 1..70_000_u32];
    let mss = prop_oneof![2 => Just(0_u32), 1 => 1..2_000_u32];
    let flags = prop_oneof![8 => Just(0x10_u8), 1 => Just(FIN | 0x10)];
    proptest::collection::vec((far, len, mss, flags, time), 0..300)
}

proptest! {
    /// 64 bytes of memory give the answers of an unbounded one, wherever the sequence numbers
    /// and the clock begin.
    #[test]
    fn bounded_memory_knows_what_unbounded_memory_knows(
        begin in prop_oneof![any::<u32>(), (0..200_000_u32).prop_map(|n| n.wrapping_neg())],
        clock in any::<u32>(),
        steps in steps(),
    ) {
        // High enough that nothing gets below zero.
        let mut base = (1 << 40) + u64::from(begin);
        let mut flow = flow(data(begin, MSS));
        let mut reference = Reference { next: base + u64::from(MSS), holes: BTreeMap::new() };
        let mut now = clock;
        for (far, len, mss, flags, time) in steps {
            now = now.wrapping_add(time);
            base = reference.next.wrapping_add_signed(far);
            let segment = Segment { seq: base as u32, len, flags, mss };
            let expected = reference.observe(base, &segment, now);
            prop_assert_eq!(flow.observe(&segment, || now), expected, "{:?}", segment);
            prop_assert_eq!(flow.next, reference.next as u32);
        }
    }
}

/// A sender after RFC 9293 and 6675, its segments on their way, and where they are watched.
#[derive(Debug, Default)]
struct Network {
    /// Segments that were sent, in order: number, whether it had been sent before.
    sent: Vec<(u32, bool)>,
}

impl Network {
    /// `count` segments; those that `lost` names do not arrive the first time, and are sent
    /// again once `DUP_THRESH` later ones have arrived (or at the end, after a time-out).
    fn transfer(count: u32, lost: &[bool]) -> Self {
        let mut network = Self::default();
        let mut waiting: Vec<(u32, u32)> = Vec::new();
        for number in 0..count {
            network.sent.push((number, false));
            if lost.get(number as usize) == Some(&true) {
                waiting.push((number, 0));
                continue;
            }
            for (_, later) in &mut waiting {
                *later += 1;
            }
            // A gap of a few more, as the ACKs are on their way.
            while let Some(at) = waiting.iter().position(|(_, later)| *later >= DUP_THRESH + 2) {
                network.sent.push((waiting.remove(at).0, true));
            }
        }
        network.sent.extend(waiting.into_iter().map(|(number, _)| (number, true)));
        network
    }
}

proptest! {
    /// Next to the sender every segment is seen, so exactly what it sends again is counted.
    #[test]
    fn next_to_the_sender_the_count_is_exact(
        begin in any::<u32>(),
        lost in proptest::collection::vec(proptest::bool::weighted(0.05), 1..2_000),
    ) {
        let network = Network::transfer(lost.len() as u32, &lost);
        let mut flow = flow(data(begin.wrapping_sub(1), 1));
        let mut counted = 0;
        for (at, &(number, _)) in (0..).zip(&network.sent) {
            let seq = begin.wrapping_add(number * MSS);
            counted += flow.observe(&data(seq, MSS), || at * 10).retransmitted;
        }
        let truth = network.sent.iter().filter(|(_, again)| *again).count();
        prop_assert_eq!(counted as usize, truth);
    }

    /// Behind the loss a segment sent again is seen for the first time, and is told from one
    /// that was overtaken by up to three; but for what was lost at the very end.
    #[test]
    fn behind_the_loss_reordering_is_told_apart(
        begin in any::<u32>(),
        lost in proptest::collection::vec(proptest::bool::weighted(0.03), 50..1_000),
        swap in proptest::collection::vec(0_usize..100, 1_000),
    ) {
        let mut lost = lost;
        let whole = lost.len() - 20;
        lost[whole..].fill(false);
        let network = Network::transfer(lost.len() as u32, &lost);
        let mut first = std::collections::BTreeSet::new();
        // What was lost does not come by the first time.
        let mut seen: Vec<(u32, bool)> = network
            .sent
            .iter()
            .copied()
            .filter(|(number, again)| *again || !lost[*number as usize])
            .collect();
        // Overtaken by up to three that were sent for the first time.
        let mut overtaken = 0;
        let mut at = 1;
        while at + 8 < seen.len() {
            let by = swap[at % swap.len()];
            let quiet = seen[at - 1..at + 8].windows(2).all(|w| w[1].0 == w[0].0 + 1 && !w[1].1);
            if (1..=3).contains(&by) && quiet {
                let segment = seen.remove(at);
                seen.insert(at + by, segment);
                overtaken += 1;
                at += 8;
            } else {
                at += 1;
            }
        }
        let mut flow = flow(data(begin.wrapping_sub(1), 1));
        let (mut again, mut late) = (0, 0);
        for (at, &(number, _)) in (0..).zip(&seen) {
            first.insert(number);
            let seq = begin.wrapping_add(number * MSS);
            let seen = flow.observe(&data(seq, MSS), || at * 10);
            again += seen.retransmitted;
            late += seen.reordered;
        }
        let truth = network.sent.iter().filter(|(_, again)| *again).count();
        prop_assert_eq!((again as usize, late), (truth, overtaken));
        prop_assert_eq!(first.len(), lost.len());
    }
}
