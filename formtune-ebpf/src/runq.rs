//! Run-queue latency per VM: how long a task was runnable before it got a CPU.
//!
//! The kernel keeps the start of every wait itself: `task_struct.sched_info.last_queued` is
//! set when a task becomes runnable or is preempted, in run-queue clock time
//! (`sched_info_enqueue()`, kernel/sched/stats.h), and is still set when `__schedule()`
//! fires the tracepoint, just before `sched_info_switch()` takes the wait into account. So
//! one probe is enough, and it needs no map of start times.

use crate::kernel::{Constant, field};
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::BtfTracePointContext;
use core::arch::asm;
use core::ptr::{read_volatile, write_volatile};
use formtune_common::runq::{BUCKETS, LOG2, Row, TableEntry, bucket_by_table};

// Lengths are those of a small node; the agent sets them for the node it is on.

/// One row per slot and CPU.
#[map]
static ROWS: Array<Row> = Array::with_max_entries(64, BPF_F_MMAPABLE);
/// cgroup → slot, by the low bits of the cgroup's id.
#[map]
static TABLE: Array<TableEntry> = Array::with_max_entries(4096, 0);
/// cgroup → slot, for those whose place in `TABLE` is taken.
#[map]
static SPILL: HashMap<u64, u32> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// Length of `TABLE` less one; the length is a power of two.
#[unsafe(no_mangle)]
static TABLE_MASK: Constant = Constant::new();
/// Rows per slot: the greatest possible CPU number and one.
#[unsafe(no_mangle)]
static ROWS_PER_SLOT: Constant = Constant::new();
/// 1: tasks are known by their cgroup in the v1 hierarchy of `cpu`; 0: in the v2 hierarchy.
#[unsafe(no_mangle)]
static CPU_ON_V1: Constant = Constant::new();

/// In `.rodata`.
static LOGARITHMS: [u8; 256] = LOG2;

#[unsafe(no_mangle)]
static TASK_LAST_QUEUED: Constant = Constant::new();
#[unsafe(no_mangle)]
static TASK_CFS_RQ: Constant = Constant::new();
#[unsafe(no_mangle)]
static TASK_CGROUPS: Constant = Constant::new();
#[unsafe(no_mangle)]
static CFS_RQ_RQ: Constant = Constant::new();
#[unsafe(no_mangle)]
static RQ_CLOCK: Constant = Constant::new();
#[unsafe(no_mangle)]
static RQ_CPU: Constant = Constant::new();
#[unsafe(no_mangle)]
static CSS_SET_DFL_CGRP: Constant = Constant::new();
/// Offset of `subsys[cpu_cgrp_id]`.
#[unsafe(no_mangle)]
static CSS_SET_CPU_CSS: Constant = Constant::new();
#[unsafe(no_mangle)]
static CSS_CGROUP: Constant = Constant::new();
#[unsafe(no_mangle)]
static CGROUP_KN: Constant = Constant::new();
#[unsafe(no_mangle)]
static KN_ID: Constant = Constant::new();

/// `sched_switch(bool preempt, struct task_struct *prev, struct task_struct *next, …)`,
/// include/trace/events/sched.h. A fourth argument came with 5.18; the first three stayed.
///
/// pid 0 needs no test: idle tasks are in the root cgroup, which is no VM's.
#[btf_tracepoint(function = "sched_switch")]
pub fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    count(&ctx);
    0
}

/// Counts the wait of the task that is about to run on this CPU.
#[inline(always)]
fn count(ctx: &BtfTracePointContext) -> Option<()> {
    let next: *const u8 = ctx.arg(2);
    // SAFETY: `next` is a task, and the others are reached from it; see `field`.
    unsafe {
        let id = cgroup_id(next);
        let slot = slot(id)?;
        let last_queued: u64 = field(next, &TASK_LAST_QUEUED);
        let cfs_rq: *const u8 = field(next, &TASK_CFS_RQ);
        let rq: *const u8 = field(cfs_rq, &CFS_RQ_RQ);
        let clock: u64 = field(rq, &RQ_CLOCK);
        let cpu: u32 = field(rq, &RQ_CPU);
        let row = ROWS.get_ptr_mut(slot * ROWS_PER_SLOT.get() + cpu)?;
        // Never after the clock, except with an unstable clock; none where the kernel does
        // not keep it. Counted, as blindness must show.
        if last_queued == 0 || clock < last_queued {
            bump(&raw mut (*row).discarded);
            #[cfg(feature = "log")]
            log_discarded(ctx, clock, last_queued);
            return None;
        }
        let wait = clock - last_queued;
        // Volatile, so that the compiler cannot tell what comes out and leaves the masks
        // that the verifier needs.
        let log2 = |n| u64::from(read_volatile(&raw const LOGARITHMS[n as usize & 255]));
        let mut bucket = bucket_by_table(wait, log2);
        // The compiler knows that this is in bounds, and makes `|` of its sums. Kernels before
        // 6.4 know nothing of what comes out of a `|`, so a mask that the compiler cannot take
        // away tells them. (An `asm!` without an instruction breaks the line numbers in BTF.)
        asm!("{0} &= 1023", inout(reg) bucket, options(nomem, nostack));
        if bucket >= BUCKETS as u64 {
            return None;
        }
        let bucket = bucket as usize;
        bump((&raw mut (*row).buckets).cast::<u32>().add(bucket));
        let wait_ns = &raw mut (*row).wait_ns;
        write_volatile(wait_ns, read_volatile(wait_ns) + wait);
        bump(&raw mut (*row).count);
        Some(())
    }
}

/// Id of the cgroup that `task` is in, in the hierarchy that carries `cpu`.
#[inline(always)]
unsafe fn cgroup_id(task: *const u8) -> u64 {
    // SAFETY: `task` is a task; css_set, its default cgroup and its css are never null.
    unsafe {
        let css_set: *const u8 = field(task, &TASK_CGROUPS);
        let cgroup: *const u8 = if CPU_ON_V1.get() == 0 {
            field(css_set, &CSS_SET_DFL_CGRP)
        } else {
            let css: *const u8 = field(css_set, &CSS_SET_CPU_CSS);
            field(css, &CSS_CGROUP)
        };
        let kn: *const u8 = field(cgroup, &CGROUP_KN);
        field(kn, &KN_ID)
    }
}

/// Slot of the VM that the cgroup belongs to.
#[inline(always)]
fn slot(id: u64) -> Option<u32> {
    let entry = TABLE.get(id as u32 & TABLE_MASK.get())?;
    if entry.cgroup_id == id {
        Some(entry.slot)
    } else if entry.spilled == 0 {
        None
    } else {
        // SAFETY: entries are written by user space only and copied out at once.
        unsafe { SPILL.get(&id) }.copied()
    }
}

/// Adds one; plain, as no other CPU writes the row.
#[inline(always)]
unsafe fn bump(counter: *mut u32) {
    // SAFETY: points into a map value, as the verifier checks.
    unsafe { write_volatile(counter, read_volatile(counter).wrapping_add(1)) }
}

/// Out of line: formatting is many times the size of the probe.
#[cfg(feature = "log")]
#[cold]
#[inline(never)]
fn log_discarded(ctx: &BtfTracePointContext, clock: u64, last_queued: u64) {
    aya_log_ebpf::debug!(ctx, "run queue clock {}, queued at {}", clock, last_queued);
}
