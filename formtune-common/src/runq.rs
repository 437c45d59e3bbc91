//! Run-queue latency: the histogram's bucket scheme and the map rows.
//!
//! Log-linear: values below 32 ns have a bucket each, above that every power of two is cut
//! into 16 equal buckets, so a bucket is at most 1/16 (6.25 %) of its lower bound wide.
//! These are the buckets of an HdrHistogram with one significant digit.

/// Buckets per power of two, as a power of two.
pub const SUB_BITS: u32 = 4;
/// Largest power of two that is told apart; longer waits land in the last bucket.
pub const MAX_EXP: u32 = 36;
/// Number of buckets: 16 below 2^4, then 16 for each of 2^4 … 2^36.
pub const BUCKETS: usize = 16 + ((MAX_EXP - SUB_BITS + 1) as usize) * 16;

/// Bucket of a wait, in nanoseconds.
#[inline(always)]
pub const fn bucket(ns: u64) -> u32 {
    if ns < 16 {
        return ns as u32;
    }
    let exp = 63 - ns.leading_zeros();
    if exp > MAX_EXP {
        return BUCKETS as u32 - 1;
    }
    let sub = (ns >> (exp - SUB_BITS)) as u32 & 15;
    (exp - SUB_BITS + 1) * 16 + sub
}

/// The same, for the kernel side: BPF has no instruction that counts leading zeros, and
/// what LLVM makes of `leading_zeros` costs as much as the rest of the probe. `log2`
/// looks up [`LOG2`], and is asked for indices below 256 only.
///
/// Written for the verifier, too: each value it has to bound is masked or compared where it
/// is used, as Linux 5.10 does not connect a copy with what is learnt of its original. All
/// is 64 bits wide, as BPF cpu v2 has no 32-bit arithmetic.
#[inline(always)]
pub fn bucket_by_table(ns: u64, log2: impl Fn(u64) -> u64) -> u64 {
    // `top` keeps the leading bit and the four after it, at least, in twelve bits.
    let (top, dropped) = if ns < 1 << 12 {
        (ns, 0)
    } else if ns < 1 << 20 {
        (ns >> 8, 8)
    } else if ns < 1 << 28 {
        (ns >> 16, 16)
    } else if ns < 1 << 36 {
        (ns >> 24, 24)
    } else if ns < 1 << (MAX_EXP + 1) {
        return ((MAX_EXP - SUB_BITS + 1) as u64 * 16) + (ns >> 32 & 15);
    } else {
        return BUCKETS as u64 - 1;
    };
    let shift = log2(top >> 4) & 7;
    // The leading bit, if it is there, adds the 16 by which the second half of the first 32
    // buckets differs from the first. A sum, as the verifier's bounds survive no `|`.
    ((dropped + shift) << 4) + (top >> shift & 31)
}

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

/// Smallest value of a bucket, nanoseconds.
pub const fn lower_bound(bucket: u32) -> u64 {
    if bucket < 16 {
        return bucket as u64;
    }
    let exp = bucket / 16 - 1 + SUB_BITS;
    ((16 + (bucket % 16)) as u64) << (exp - SUB_BITS)
}

/// Largest value of a bucket, nanoseconds.
pub const fn upper_bound(bucket: u32) -> u64 {
    lower_bound(bucket + 1) - 1
}

/// What one CPU counted for one VM: the element of the map `ROWS`, at index
/// `slot × cpus + cpu`. Only that CPU writes it, inside the scheduler with interrupts off,
/// so plain additions suffice; user space maps it and reads. Every field wraps around:
/// readers take differences.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Row {
    /// Waits counted; written last, so a reader that finds it unchanged may skip the row.
    pub count: u32,
    /// Tasks of the VM that were switched in without a usable time stamp (none, or one
    /// after the run queue's clock). Not in `count`.
    pub discarded: u32,
    /// Sum of the waits, nanoseconds.
    pub wait_ns: u64,
    /// Waits per bucket.
    pub buckets: [u32; BUCKETS],
}

/// Element of the direct-mapped table `TABLE`, at index `cgroup id & (length − 1)`.
/// cgroup ids are small and cyclic, so neighbours seldom collide; what does is in the hash
/// map `SPILL`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableEntry {
    /// The cgroup; 0 is no cgroup's id and means "empty".
    pub cgroup_id: u64,
    /// Its VM's slot.
    pub slot: u32,
    /// Not 0: other cgroups with the same index are in `SPILL`.
    pub spilled: u32,
}

// SAFETY: `repr(C)`, no padding (4 + 4 + 8 + 4 × BUCKETS; 8 + 4 + 4), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Row {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for TableEntry {}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::Histogram;
    use proptest::prelude::*;

    fn by_table(ns: u64) -> u64 {
        bucket_by_table(ns, |n| LOG2[n as usize].into())
    }

    #[test]
    fn bounds_meet_without_gaps() {
        for b in 0..BUCKETS as u32 {
            for ns in [lower_bound(b), upper_bound(b)] {
                assert_eq!(bucket(ns), b);
                assert_eq!(by_table(ns), b.into());
            }
            assert_eq!(upper_bound(b) + 1, lower_bound(b + 1));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS as u32 - 1);
        assert_eq!(by_table(u64::MAX), BUCKETS as u64 - 1);
    }

    proptest! {
        #[test]
        fn error_is_at_most_one_sixteenth(exp in 0u32..37, rest in any::<u64>()) {
            let ns = (1 << exp) | (rest & ((1 << exp) - 1));
            let b = bucket(ns);
            prop_assert!(lower_bound(b) <= ns && ns <= upper_bound(b));
            let width = upper_bound(b) - lower_bound(b) + 1;
            prop_assert!(width == 1 || width * 16 <= lower_bound(b));
        }

        #[test]
        fn both_ways_agree(exp in 0u32..64, rest in any::<u64>()) {
            let ns = (1 << exp) | (rest & ((1u64 << exp) - 1));
            prop_assert_eq!(by_table(ns), u64::from(bucket(ns)));
        }

        /// An independent implementation: with one significant digit HdrHistogram keeps 32
        /// values below 32 and 16 per power of two above, as here.
        #[test]
        fn buckets_are_those_of_hdrhistogram(exp in 0u32..37, rest in any::<u64>()) {
            let ns = (1 << exp) | (rest & ((1 << exp) - 1));
            let histogram = Histogram::<u64>::new_with_bounds(1, 1 << 40, 1).unwrap();
            prop_assert_eq!(histogram.lowest_equivalent(ns), lower_bound(bucket(ns)));
            prop_assert_eq!(histogram.highest_equivalent(ns), upper_bound(bucket(ns)));
        }
    }
}
