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
