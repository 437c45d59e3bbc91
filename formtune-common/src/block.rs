//! Block I/O latency: the map rows of its probe.

use crate::histogram::BUCKETS;

/// Whose a request is when it is no VM's.
pub const HOST: u32 = 0;

/// A request that reads.
pub const READ: u32 = 0;
/// A request that writes.
pub const WRITE: u32 = 1;
/// A request without data of its own: flush, discard, secure erase, write zeroes, zones.
pub const FLUSH: u32 = 2;

/// What is told apart; each has a row of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// [`HOST`], or the number that the agent gave the VM. No number is given twice.
    pub who: u32,
    /// Device number of the whole disk, as the kernel has it; see [`device`].
    pub device: u32,
    /// [`READ`], [`WRITE`] or [`FLUSH`].
    pub op: u32,
}

/// The kernel's `MKDEV(major, minor)`, include/linux/kdev_t.h.
#[inline(always)]
pub const fn device(major: u32, minor: u32) -> u32 {
    major << 20 | minor
}

/// Major and minor number of a [`device`].
pub const fn major_minor(device: u32) -> (u32, u32) {
    (device >> 20, device & 0xf_ffff)
}

/// What the agent may change while the probe runs: the only element of the map `CONTROL`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// One in 2^this requests is looked at, and counts as 2^this.
    pub sampling_shift: u32,
    /// Not 0: some cgroups of VMs are not in the table, so one that is not there need not be
    /// the host's.
    pub incomplete: u32,
}

/// What was counted for one [`Key`]: the element of the map `ROWS`.
///
/// The probe takes a free row when it first sees a key. Every CPU adds to it, atomically;
/// user space maps it and takes the counts out, atomically too: a row holds what came since
/// the last reading.
///
/// The head is a cache line of its own, and so is each [`LINE`] of `total`.
#[repr(C, align(64))]
pub struct Row {
    /// Whose row this is. Written when it is taken.
    pub key: Key,
    /// Requests done; added to last, so a reader that finds 0 may skip the row.
    pub count: u32,
    /// Sum of the times from queued to done, nanoseconds.
    pub total_ns: u64,
    /// Sum of the times from given to the device to done, nanoseconds.
    pub device_ns: u64,
    /// Which lines of `total` were added to: bit n for the buckets from n × [`LINE`] on. A hint:
    /// a CPU may undo what another one writes at the same time, and readers must look everywhere
    /// for what they miss.
    pub total_lines: u64,
    /// The same of `device`.
    pub device_lines: u64,
    /// None.
    pub padding: [u64; 2],
    /// Times from queued to done, per bucket.
    pub total: [u32; BUCKETS],
    /// Times from given to the device to done, per bucket.
    pub device: [u32; BUCKETS],
}

/// Buckets per bit of [`Row::total_lines`].
pub const LINE: usize = 16;

const _: () = assert!(BUCKETS.div_ceil(LINE) <= 64);

/// What is not in a row, or not in full: the only element of the map `COUNTERS`, one per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Rows taken.
    pub taken: u64,
    /// Requests without a row, as all were taken.
    pub full: u64,
    /// Requests of a cgroup that is not in the table while some VM's are not, either.
    pub unknown_cgroup: u64,
    /// Requests that carry a driver's command instead of reads or writes; not measured.
    pub passthrough: u64,
    /// Completions of a part of a request; the request is counted with its last part.
    pub partial: u64,
    /// Requests given back to their queue to be tried again; counted once, when done.
    pub requeued: u64,
    /// Requests that several were merged into; counted once, for whose came first.
    pub merged: u64,
    /// Requests without a bio; counted for the host.
    pub no_bio: u64,
    /// Requests whose bio leads to no cgroup; counted for the host.
    pub no_cgroup: u64,
    /// Requests of a disk that is gone, so that there is no row for them.
    pub no_disk: u64,
    /// Requests of which it is not known when they were queued.
    pub no_queued: u64,
    /// Requests of which it is not known when they were given to the device. Flushes, which
    /// the block layer hands over in requests of its own, are not among them.
    pub no_issued: u64,
    /// Times that cannot be: the stamp is after the clock.
    pub discarded: u64,
    /// Requests whose time could not be noted, as the map `STARTS` was full.
    pub not_noted: u64,
    /// Requests that were not looked at, to keep the cost down. Others count for them, in the
    /// rows and in every field here that is not `taken`, `passthrough`, `partial`, `requeued`
    /// or `not_noted`.
    pub unsampled: u64,
}

impl Counters {
    /// Adds what another CPU counted.
    pub const fn add(&mut self, other: &Self) {
        self.taken += other.taken;
        self.full += other.full;
        self.unknown_cgroup += other.unknown_cgroup;
        self.passthrough += other.passthrough;
        self.partial += other.partial;
        self.requeued += other.requeued;
        self.merged += other.merged;
        self.no_bio += other.no_bio;
        self.no_cgroup += other.no_cgroup;
        self.no_disk += other.no_disk;
        self.no_queued += other.no_queued;
        self.no_issued += other.no_issued;
        self.discarded += other.discarded;
        self.not_noted += other.not_noted;
        self.unsampled += other.unsampled;
    }
}

/// When a request was queued and given to its device, where the kernel does not note it in
/// the request: the element of the map `STARTS`, by the request's address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub queued: u64,
    /// The same; 0 while it waits in its queue.
    pub issued: u64,
}

// SAFETY: `repr(C)`, no padding (two u64), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Start {}
// SAFETY: `repr(C)`, no padding (3 × 4), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Key {}
// SAFETY: `repr(C)`, no padding (two u32), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Control {}
// SAFETY: `repr(C)`, no padding (15 × 8), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Counters {}
