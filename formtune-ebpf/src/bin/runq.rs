//! Run-queue latency per VM: how long a task was runnable before it got a CPU.
//!
//! The kernel keeps the start of every wait itself: `task_struct.sched_info.last_queued` is
//! set when a task becomes runnable or is preempted, in run-queue clock time
//! (`sched_info_enqueue()`, kernel/sched/stats.h), and is still set when `__schedule()`
//! fires the tracepoint, just before `sched_info_switch()` takes the wait into account. So
//! one probe is enough, and it needs no map of start times.
//!
//! Who is to blame: each CPU remembers who had it last ([`Running`]), a stint per change of
//! holder. A wait above a threshold is charged, back to its beginning, to those who held
//! the CPU meanwhile.
#![feature(asm_experimental_arch)]
#![no_std]
#![no_main]
// The macros add functions of their own.
#![allow(missing_docs)]

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_get_smp_processor_id};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::programs::BtfTracePointContext;
use formtune_common::runq::{
    Control, HOLDERS, IDLE, NOBODY, PAST, RECENT, Row, Running, Stint, UNMEASURED, recent, vm,
};
use formtune_common::sampling::{keeps, weight};
use formtune_common::table::TableEntry;
use formtune_ebpf::count::{add_u32, add_u64};
use formtune_ebpf::histogram::bucket;
use formtune_ebpf::kernel::{Constant, field};
use formtune_ebpf::table::slot;

formtune_ebpf::object!();

// Lengths are those of a small node; the agent sets them for the node it is on.

/// One row per slot and CPU.
#[map]
static ROWS: Array<Row> = Array::with_max_entries(64, BPF_F_MMAPABLE);
/// Switches to tasks of each VM, by CPU and slot: side by side, so that what did not run is read
/// at the price of next to nothing.
#[map]
static SEEN: Array<u64> = Array::with_max_entries(64, BPF_F_MMAPABLE);
/// One per CPU.
#[map]
static RUNNING: Array<Running> = Array::with_max_entries(64, 0);
#[map]
static CONTROL: Array<Control> = Array::with_max_entries(1, 0);
/// Switches that were not looked at, to keep the cost down. Others count for them.
#[map]
static UNSAMPLED: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
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
#[unsafe(no_mangle)]
static SLOTS: Constant = Constant::new();
/// 1: tasks are known by their cgroup in the v1 hierarchy of `cpu`; 0: in the v2 hierarchy.
#[unsafe(no_mangle)]
static CPU_ON_V1: Constant = Constant::new();

#[unsafe(no_mangle)]
static TASK_PID: Constant = Constant::new();
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
#[btf_tracepoint(function = "sched_switch")]
pub fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    switched(&ctx);
    0
}

/// Looks at the task that is about to run on this CPU.
#[inline(always)]
fn switched(ctx: &BtfTracePointContext) -> Option<()> {
    let control = CONTROL.get(0)?;
    let shift = control.sampling_shift & 15;
    // SAFETY: a helper without arguments.
    if shift != 0 && !keeps(unsafe { bpf_get_prandom_u32() }, shift) {
        let unsampled = UNSAMPLED.get_ptr_mut(0)?;
        // SAFETY: this CPU's own map value.
        unsafe { add_u64(unsampled, 1) };
        return None;
    }
    let next: *const u8 = ctx.arg(2);
    // SAFETY: a helper without arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let running = RUNNING.get_ptr_mut(cpu)?;
    // SAFETY: `next` is a task, and the others are reached from it (see `field`); `running`
    // is this CPU's own.
    unsafe {
        let found = slot(&TABLE, TABLE_MASK.get(), &SPILL, cgroup_id(next));
        let holder = match found {
            Some(slot) => vm(slot),
            None => {
                let holder = if is_idle(running, next) { IDLE } else { control.outside };
                // Many switches are between tasks of the host.
                if (*running).holder == holder {
                    return None;
                }
                holder
            }
        };
        // Between two switches that are looked at anybody may have had the CPU. What was before is
        // no longer known, either, once every switch is looked at again.
        let holder = if shift == 0 { holder } else { NOBODY };
        let cfs_rq: *const u8 = field(next, &TASK_CFS_RQ);
        let rq: *const u8 = field(cfs_rq, &CFS_RQ_RQ);
        let clock: u64 = field(rq, &RQ_CLOCK);
        if let Some(slot) = found
            && slot != UNMEASURED
        {
            let last_queued: u64 = field(next, &TASK_LAST_QUEUED);
            let row = ROWS.get_ptr_mut(slot * ROWS_PER_SLOT.get() + cpu)?;
            // Never after the clock, except with an unstable clock; none where the kernel
            // does not keep it. Counted, as blindness must show.
            if last_queued == 0 || clock < last_queued {
                add_u32(&raw mut (*row).discarded, weight(shift));
                #[cfg(feature = "log")]
                log_discarded(ctx, clock, last_queued);
            } else {
                let wait = clock - last_queued;
                if wait >= control.blame_ns && shift == 0 {
                    blame(running, row, last_queued, clock);
                }
                count(row, wait, shift)?;
            }
            // Last: a reader that finds it unchanged does not look at the row.
            add_u64(SEEN.get_ptr_mut(cpu * SLOTS.get() + slot)?, 1);
        }
        if (*running).holder != holder {
            hand_over(running, holder, clock);
        }
    }
    Some(())
}

/// Whether `next` is this CPU's idle task. Those are in the root cgroup, which is no VM's, so only
/// tasks outside of VMs need be asked; and once the CPU has been idle, its own memory answers.
#[inline(always)]
unsafe fn is_idle(running: *mut Running, next: *const u8) -> bool {
    // SAFETY: this CPU's own map value; `next` is a task.
    unsafe {
        let known = (*running).idle_task;
        if known != 0 {
            return known == next as u64;
        }
        let idle = field::<i32>(next, &TASK_PID) == 0;
        if idle {
            (*running).idle_task = next as u64;
        }
        idle
    }
}

/// Counts a wait, as often as switches are looked at seldom.
#[inline(always)]
unsafe fn count(row: *mut Row, wait: u64, shift: u32) -> Option<()> {
    let bucket = bucket(wait)?;
    // SAFETY: a map value that this CPU alone writes; `bucket` is in bounds.
    unsafe {
        add_u32((&raw mut (*row).buckets).cast::<u32>().add(bucket), weight(shift));
        add_u64(&raw mut (*row).wait_ns, wait * u64::from(weight(shift)));
        let count = (*row).count.wrapping_add(weight(shift));
        // One that counts for several is marked as none that a reader looks for.
        let entry = recent(if shift == 0 { count } else { !count }, bucket as u32);
        let at = count as usize & (RECENT - 1);
        (&raw mut (*row).recent).cast::<u32>().add(at).write_volatile(entry);
        (&raw mut (*row).count).write_volatile(count);
    }
    Some(())
}

/// Notes that somebody else has the CPU from now on.
#[inline(always)]
unsafe fn hand_over(running: *mut Running, holder: u32, clock: u64) {
    // SAFETY: this CPU's own map value; the index is masked.
    unsafe {
        let at = (*running).next as usize & (PAST - 1);
        let stint = Stint { since: (*running).since, holder: (*running).holder, padding: 0 };
        (&raw mut (*running).past).cast::<Stint>().add(at).write(stint);
        (*running).next = (at + 1) as u32;
        (*running).holder = holder;
        (*running).since = clock;
    }
}

/// Charges a wait, from its end back to its beginning, to those who held this CPU.
#[inline(always)]
unsafe fn blame(running: *const Running, row: *mut Row, begin: u64, now: u64) {
    // SAFETY: map values that this CPU alone writes; the index is masked.
    unsafe {
        let mut end = now;
        let mut since = (*running).since;
        let mut holder = (*running).holder;
        let mut at = (*running).next as usize;
        for _ in 0..=PAST {
            if holder == NOBODY {
                break;
            }
            let from = if since > begin { since } else { begin };
            if end > from {
                charge(row, holder, end - from);
                end = from;
            }
            if since <= begin {
                return;
            }
            at = (at + PAST - 1) & (PAST - 1);
            let stint = (&raw const (*running).past).cast::<Stint>().add(at);
            since = (*stint).since;
            holder = (*stint).holder;
        }
        add_u64(&raw mut (*row).unblamed_ns, end - begin);
    }
}

#[inline(always)]
unsafe fn charge(row: *mut Row, holder: u32, ns: u64) {
    // SAFETY: as for `blame`.
    unsafe {
        for at in 0..HOLDERS {
            let held = &raw mut (*row).held[at];
            let known = (*held).holder;
            if known == holder || known == NOBODY {
                (*held).holder = holder;
                add_u64(&raw mut (*held).ns, ns);
                add_u64(&raw mut (*row).held_ns, ns);
                return;
            }
        }
        add_u64(&raw mut (*row).unblamed_ns, ns);
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

/// Out of line: formatting is many times the size of the probe.
#[cfg(feature = "log")]
#[cold]
#[inline(never)]
fn log_discarded(ctx: &BtfTracePointContext, clock: u64, last_queued: u64) {
    aya_log_ebpf::debug!(ctx, "run queue clock {}, queued at {}", clock, last_queued);
}
