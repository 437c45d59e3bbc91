//! Run-queue latency: the map rows of its probe.

use crate::histogram::BUCKETS;

/// Who held a CPU: nobody known.
pub const NOBODY: u32 = 0;
/// Who held a CPU: a task that is no VM's.
pub const HOST: u32 = 1;
/// Who held a CPU: nobody, it was idle. A VM that waits all the while is stopped by its own
/// quota, or just being woken up.
pub const IDLE: u32 = 2;

/// Who held a CPU: the VM in a slot.
#[inline(always)]
pub const fn vm(slot: u32) -> u32 {
    slot + 3
}

/// The slot of [`vm`]; `None` of the others.
pub const fn slot_of(holder: u32) -> Option<u32> {
    holder.checked_sub(3)
}

/// The slot of VMs for which there is none: it has no rows. That such a VM held a CPU must not
/// be taken for the host's doing.
pub const UNMEASURED: u32 = u32::MAX - 3;

/// Waits of which a row still tells one by one where they were counted.
pub const RECENT: usize = 16;

/// What [`Row::recent`] holds of a wait: the low 16 bits of `count` once it was counted, and its
/// bucket. A reader tells by the former whether it is the wait that it looks for.
#[inline(always)]
pub const fn recent(count: u32, bucket: u32) -> u32 {
    count << 16 | bucket
}

/// The bucket of the wait with which `count` came to be this; `None` if an entry is of another.
pub const fn recent_bucket(entry: u32, count: u32) -> Option<u32> {
    if entry >> 16 == count & 0xffff { Some(entry & 0xffff) } else { None }
}

/// Holders told apart per VM and CPU. What more there are goes to [`Row::unblamed_ns`].
pub const HOLDERS: usize = 8;

/// What one CPU counted for one VM: the element of the map `ROWS`, at index
/// `slot × cpus + cpu`. Only that CPU writes it, inside the scheduler with interrupts off,
/// so plain additions suffice; user space maps it and reads. Counters wrap around: readers
/// take differences.
///
/// In the order in which readers need it: mostly the first cache line or two will do.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Row {
    /// Waits counted; written after all else here.
    pub count: u32,
    /// Tasks of the VM that were switched in without a usable time stamp (none, or one
    /// after the run queue's clock). Not in `count`.
    pub discarded: u32,
    /// Sum of the waits, nanoseconds.
    pub wait_ns: u64,
    /// Time of waits above the blame threshold during which it is not known who held the
    /// CPU, or for whom there was no room in `held`, nanoseconds.
    pub unblamed_ns: u64,
    /// Sum of `held`, nanoseconds.
    pub held_ns: u64,
    /// The last waits: those with which `count` came to be n are at n modulo the length (see
    /// [`recent`]). None where a wait counts for several.
    pub recent: [u32; RECENT],
    /// Who held the CPU during waits above the blame threshold.
    pub held: [Held; HOLDERS],
    /// Waits per bucket.
    pub buckets: [u32; BUCKETS],
    /// None.
    pub padding: [u64; 3],
}

/// How long somebody held a CPU for which a VM waited.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// [`NOBODY`] (free), [`HOST`], [`IDLE`] or [`vm`].
    pub holder: u32,
    /// None.
    pub padding: u32,
    /// Nanoseconds.
    pub ns: u64,
}

/// Stints on a CPU that are remembered: a VM that is stopped by its quota waits for most of 100 ms,
/// in which an idle CPU wakes up some times. A power of two.
pub const PAST: usize = 32;

/// Who holds a CPU and who held it before: the element of the map `RUNNING`, at the CPU's
/// number. Only that CPU uses it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Running {
    /// [`HOST`], [`IDLE`] or [`vm`].
    pub holder: u32,
    /// Where in `past` the next stint goes.
    pub next: u32,
    /// Since when, in the run queue's clock.
    pub since: u64,
    /// Address of the CPU's idle task, which is always the same; 0 until it first ran.
    pub idle_task: u64,
    /// Each ended where the next began.
    pub past: [Stint; PAST],
}

/// A stretch of time during which one holder had a CPU.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Stint {
    /// When it began, in the run queue's clock.
    pub since: u64,
    /// [`NOBODY`] (never used), [`HOST`], [`IDLE`] or [`vm`].
    pub holder: u32,
    /// None.
    pub padding: u32,
}

/// What the agent may change while the probe runs: the only element of the map `CONTROL`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// One in 2^this switches is looked at, and counts as 2^this waits. While it is not 0
    /// nobody is blamed.
    pub sampling_shift: u32,
    /// Who holds a CPU when its task's cgroup is not in the table, and it is not idle: [`HOST`], or
    /// a VM that is [`UNMEASURED`] while the cgroups of some VM are not all there.
    pub outside: u32,
    /// Waits at least this long are somebody's fault, nanoseconds.
    pub blame_ns: u64,
}

// SAFETY: `repr(C)`, no padding (see below), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Row {}
// SAFETY: `repr(C)`, no padding (4 + 4 + 8 + 8 + 16 × PAST), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Running {}
// SAFETY: `repr(C)`, no padding (4 + 4 + 8), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Control {}

const _: () = assert!(
    size_of::<Row>()
        == 32 + 4 * RECENT + size_of::<Held>() * HOLDERS + 4 * BUCKETS + size_of::<[u64; 3]>()
);
