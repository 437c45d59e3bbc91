//! The bucket scheme of every latency histogram: exponential, sixteen buckets per power of
//! two, aligned to seconds.
//!
//! A bucket ends, inclusively, at 2^(j/16) seconds for a whole j: the bounds of Prometheus'
//! native histograms of schema 4 (<https://prometheus.io/docs/specs/native_histograms/>).
//! Waits are counted once, in the kernel, into these buckets, and every form in which they
//! leave (native, classic, HdrHistogram) holds the same counts exactly. A bucket is at most
//! 4.43 % of its lower bound wide. Times are whole nanoseconds; as no bound between 1 ns
//! and 2^37 ns but whole powers of two of a second is a whole number of them, a bound is
//! rounded down, which moves no time across it.

/// Schema of a native histogram with these buckets: 2^4 of them per power of two.
pub const SCHEMA: i32 = 4;
/// Buckets per power of two.
const PER_OCTAVE: u32 = 1 << SCHEMA;
/// Largest power of two, in nanoseconds, that is told apart; longer times land in the last
/// bucket. 2^37 ns are 137 s.
const MAX_EXP: u32 = 36;
/// Number of buckets. The first holds zero only.
pub const BUCKETS: usize = (2 + (MAX_EXP + 1) * PER_OCTAVE) as usize;
/// A native histogram's index of a bucket is its number here less this. (The first bound
/// at or above 2^29 ns is 2^(-14/16) s.)
pub const NATIVE_OFFSET: i32 = 1 + 29 * PER_OCTAVE as i32 + 14;

/// The bounds within an octave, as 2^63 to 2^64: ⌊2^63 × 10^9 × 2^(j/16) / 2^29⌋ for
/// j = -14 to 1. The pattern repeats with every power of two.
const BOUNDS: [u64; PER_OCTAVE as usize] = [
    0x81ff_a7a9_549c_a6e3,
    0x87c1_1235_836d_16a3,
    0x8dc3_b896_0164_a7d9,
    0x940a_7e28_259f_b382,
    0x9a98_6705_4d51_2391,
    0xa170_9975_dfb0_6757,
    0xa896_5f74_bf06_5071,
    0xb00d_2843_e106_0dc2,
    0xb7d8_8a12_d0dd_9ea0,
    0xbffc_43b7_e604_a922,
    0xc87c_3e7d_03cd_bec3,
    0xd15c_9000_bf21_1c1f,
    0xdaa1_7c2c_d195_55db,
    0xe44f_7742_cb56_e3dd,
    0xee6b_2800_0000_0000,
    0xf8f9_69d9_b5ab_f948,
];

/// Bucket of a time, in nanoseconds.
pub const fn bucket(ns: u64) -> u32 {
    if ns == 0 {
        return 0;
    }
    let exp = 63 - ns.leading_zeros();
    if exp > MAX_EXP {
        return BUCKETS as u32 - 1;
    }
    let normal = ns << (63 - exp);
    let mut below = 0;
    while below < BOUNDS.len() && normal > BOUNDS[below] {
        below += 1;
    }
    1 + exp * PER_OCTAVE + below as u32
}

/// What the kernel side looks up for a 32nd of an octave, in which there is at most one
/// bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Cell {
    /// The bound in it; `u64::MAX` where there is none.
    pub bound: u64,
    /// Bounds of the octave that lie before it.
    pub before: u64,
}

/// An octave, cell by cell.
pub const CELLS: [Cell; 32] = {
    let mut cells = [Cell { bound: u64::MAX, before: 0 }; 32];
    let mut cell = 0;
    while cell < 32 {
        let start = (1 << 63) | (cell as u64) << 58;
        let mut bound = 0;
        while bound < BOUNDS.len() {
            if BOUNDS[bound] < start {
                cells[cell].before += 1;
            } else if BOUNDS[bound] - start < 1 << 58 {
                assert!(cells[cell].bound == u64::MAX);
                cells[cell].bound = BOUNDS[bound];
            }
            bound += 1;
        }
        cell += 1;
    }
    cells
};

/// Binary logarithms, rounded down, of 1..=255; 0 of 0.
pub const LOG2: [u8; 256] = {
    let mut table = [0; 256];
    let mut n = 1;
    while n < 256 {
        table[n] = n.ilog2() as u8;
        n += 1;
    }
    table
};

/// The same as [`bucket`], for the kernel side: BPF has no instruction that counts leading
/// zeros, and what LLVM makes of `leading_zeros` costs as much as the rest of the probe.
/// `log2` looks up [`LOG2`], and is asked for indices below 256 only; `cell` looks up
/// [`CELLS`], and is asked for indices below 32 only.
///
/// All is 64 bits wide, as BPF cpu v2 has no 32-bit arithmetic. The result is in bounds,
/// but a verifier that does not follow must be told so by its caller.
#[inline(always)]
pub fn bucket_by_table(
    ns: u64,
    log2: impl Fn(u64) -> u64,
    cell: impl Fn(u64) -> (u64, u64),
) -> u64 {
    let (top, dropped) = if ns < 1 << 8 {
        if ns == 0 {
            return 0;
        }
        (ns, 0)
    } else if ns < 1 << 16 {
        (ns >> 8, 8)
    } else if ns < 1 << 24 {
        (ns >> 16, 16)
    } else if ns < 1 << 32 {
        (ns >> 24, 24)
    } else if ns < 1 << (MAX_EXP + 1) {
        (ns >> 32, 32)
    } else {
        return BUCKETS as u64 - 1;
    };
    let exp = dropped + (log2(top & 255) & 7);
    let normal = ns << ((63 - exp) & 63);
    let (bound, before) = cell(normal >> 58 & 31);
    1 + exp * PER_OCTAVE as u64 + before + (normal > bound) as u64
}

/// Smallest time of a bucket, nanoseconds. A bucket below 32 ns may hold no whole number of
/// them at all; its upper bound is then less than this.
pub const fn lower_bound(bucket: u32) -> u64 {
    match bucket {
        0 => 0,
        _ => upper_bound(bucket - 1) + 1,
    }
}

/// Largest time of a bucket, nanoseconds.
pub const fn upper_bound(bucket: u32) -> u64 {
    if bucket == 0 {
        return 0;
    }
    let (exp, bound) = ((bucket - 1) / PER_OCTAVE, (bucket - 1) % PER_OCTAVE);
    BOUNDS[bound as usize] >> (63 - exp)
}

/// Sixteenths of a power of two of a second at which a bucket ends: its largest time is
/// 2^(this / 16) seconds. `None` for the first bucket, which holds zero only.
pub const fn native_index(bucket: u32) -> Option<i32> {
    match bucket {
        0 => None,
        _ => Some(bucket as i32 - NATIVE_OFFSET),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::Histogram;
    use num_bigint::BigUint;
    use proptest::prelude::*;

    fn by_table(ns: u64) -> u64 {
        let cell = |n: u64| (CELLS[n as usize].bound, CELLS[n as usize].before);
        bucket_by_table(ns, |n| LOG2[n as usize].into(), cell)
    }

    /// Whether `ns` ≤ 2^(j/16) s, by whole numbers: ns^16 ≤ 10^144 × 2^j.
    fn within(ns: u64, j: i32) -> bool {
        let (mut left, mut right) = (BigUint::from(ns).pow(16), BigUint::from(10_u8).pow(144));
        match j {
            0.. => right <<= j,
            _ => left <<= -j,
        }
        left <= right
    }

    #[test]
    fn bounds_are_those_of_a_native_histogram() {
        for bucket in 1..BUCKETS as u32 {
            let j = native_index(bucket).unwrap();
            let bound = upper_bound(bucket);
            assert!(within(bound, j) && !within(bound + 1, j), "bucket {bucket}, 2^({j}/16) s");
        }
        assert_eq!(native_index(bucket(1_000_000_000)), Some(0));
        assert_eq!(upper_bound(bucket(1_000_000_000)), 1_000_000_000);
    }

    #[test]
    fn bounds_meet_without_gaps() {
        for b in 0..BUCKETS as u32 {
            if lower_bound(b) > upper_bound(b) {
                assert!(upper_bound(b) < 32, "bucket {b} is empty");
                continue;
            }
            for ns in [lower_bound(b), upper_bound(b)] {
                assert_eq!(bucket(ns), b, "{ns} ns");
                assert_eq!(by_table(ns), b.into(), "{ns} ns");
            }
        }
        for ns in [0, 1, 2, u64::MAX, 1 << 37, (1 << 37) - 1] {
            assert_eq!(by_table(ns), bucket(ns).into(), "{ns} ns");
        }
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, BUCKETS as u32 - 1));
    }

    proptest! {
        #[test]
        fn error_is_at_most_a_sixteenth_of_a_power_of_two(exp in 6u32..37, rest in any::<u64>()) {
            let ns = (1 << exp) | (rest & ((1 << exp) - 1));
            let b = bucket(ns);
            prop_assert!(lower_bound(b) <= ns && ns <= upper_bound(b));
            let error = (upper_bound(b) - ns) as f64 / ns as f64;
            prop_assert!(error <= 0.0443, "{}", error);
        }

        #[test]
        fn both_ways_agree(exp in 0u32..64, rest in any::<u64>()) {
            let ns = (1 << exp) | (rest & ((1u64 << exp) - 1));
            prop_assert_eq!(by_table(ns), u64::from(bucket(ns)));
        }

        /// An HdrHistogram of three digits tells all these buckets apart: counts that are
        /// recorded there at their bucket's upper bound come back as they were.
        #[test]
        fn an_hdrhistogram_keeps_the_counts(
            times in proptest::collection::vec((0u32..37, any::<u64>()), 1..200),
        ) {
            let mut ours = std::vec![0_u64; BUCKETS];
            let mut hdr = Histogram::<u64>::new_with_bounds(1, 1 << 40, 3).unwrap();
            for (exp, rest) in times {
                let b = bucket((1 << exp) | (rest & ((1 << exp) - 1)));
                ours[b as usize] += 1;
                hdr.record(upper_bound(b)).unwrap();
            }
            let mut back = std::vec![0_u64; BUCKETS];
            for value in hdr.iter_recorded() {
                // Values of a few thousand nanoseconds and more share HDR's cells, whose
                // lowest value may lie before the bound: its highest does not lie past the
                // next one.
                let low = hdr.lowest_equivalent(value.value_iterated_to());
                let high = hdr.highest_equivalent(value.value_iterated_to());
                let b = (bucket(low)..=bucket(high))
                    .find(|&b| low <= upper_bound(b) && upper_bound(b) <= high)
                    .unwrap();
                back[b as usize] += value.count_at_value();
            }
            prop_assert_eq!(ours, back);
        }
    }
}
