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

/// Holders told apart per VM and CPU. What more there are goes to [`Row::unblamed_ns`].
pub const HOLDERS: usize = 8;

/// What one CPU counted for one VM: the element of the map `ROWS`, at index
/// `slot × cpus + cpu`. Only that CPU writes it, inside the scheduler with interrupts off,
/// so plain additions suffice; user space maps it and reads. Counters wrap around: readers
/// take differences.
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
    /// Time of waits above the blame threshold during which it is not known who held the
    /// CPU, or for whom there was no room in `held`, nanoseconds.
    pub unblamed_ns: u64,
    /// Who held the CPU during waits above the blame threshold.
    pub held: [Held; HOLDERS],
    /// Waits per bucket.
    pub buckets: [u32; BUCKETS],
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

// SAFETY: `repr(C)`, no padding (4 + 4 + 8 + 8 + 16 × HOLDERS + 4 × BUCKETS, which is even),
// any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Row {}
// SAFETY: `repr(C)`, no padding (4 + 4 + 8 + 8 + 16 × PAST), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Running {}
// SAFETY: `repr(C)`, no padding (4 + 4 + 8), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Control {}
