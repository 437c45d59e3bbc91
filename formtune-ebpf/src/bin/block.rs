//! Block I/O latency per VM: how long its requests took, from queued to done and from given
//! to the device to done.
//!
//! The kernel notes both times in the request itself, `start_time_ns` and `io_start_time_ns`
//! (`blk_mq_rq_ctx_init()` and `blk_mq_start_request()`, block/blk-mq.c), so one probe where
//! requests are done is enough. Devices whose queue keeps no statistics leave one or both
//! empty; for them two more programs, which the agent attaches once it is needed, note the
//! times in a map.
//!
//! A request is its VM's by the block cgroup of its first bio, never by the task that happens
//! to run when it is done.
#![feature(asm_experimental_arch)]
#![no_std]
#![no_main]
// The macros add functions of their own.
#![allow(missing_docs)]

use aya_ebpf::bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, Queue};
use aya_ebpf::programs::BtfTracePointContext;
use formtune_common::block::{
    Control, Counters, FLUSH, HOST, Key, LINE, READ, Row, Start, WRITE, device,
};
use formtune_common::sampling::{keeps, weight};
use formtune_common::table::TableEntry;
use formtune_ebpf::count::{add_shared_u32, add_shared_u64, add_u64};
use formtune_ebpf::histogram::bucket;
use formtune_ebpf::kernel::{Constant, field};
use formtune_ebpf::table::slot;

formtune_ebpf::object!();

// Lengths are those of a small node; the agent sets them for the node it is on.

#[map]
static ROWS: Array<Row> = Array::with_max_entries(256, BPF_F_MMAPABLE);
/// Which row is whose.
#[map]
static ROW_OF: HashMap<Key, u32> = HashMap::with_max_entries(256, 0);
/// Rows that nobody has; the agent puts them in.
#[map]
static FREE: Queue<u32> = Queue::with_max_entries(256, 0);
#[map]
static CONTROL: Array<Control> = Array::with_max_entries(1, 0);
#[map]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);
/// By the address of a request, where it carries no times itself. Allocated at once: many come
/// together, in interrupts, faster than the kernel finds memory for them there.
#[map]
static STARTS: HashMap<u64, Start> = HashMap::with_max_entries(16384, 0);
/// cgroup → VM, by the low bits of the cgroup's id.
#[map]
static TABLE: Array<TableEntry> = Array::with_max_entries(4096, 0);
/// cgroup → VM, for those whose place in `TABLE` is taken.
#[map]
static SPILL: HashMap<u64, u32> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// Length of `TABLE` less one; the length is a power of two.
#[unsafe(no_mangle)]
static TABLE_MASK: Constant = Constant::new();
/// 1: the disk is the queue's (Linux 5.17 and later); 0: the request's.
#[unsafe(no_mangle)]
static DISK_OF_QUEUE: Constant = Constant::new();
/// `REQ_OP_ZONE_APPEND`, whose number is not the same everywhere.
#[unsafe(no_mangle)]
static OP_ZONE_APPEND: Constant = Constant::new();
/// Bit of `RQF_FLUSH_SEQ` in a request's flags.
#[unsafe(no_mangle)]
static FLUSH_SEQ_BIT: Constant = Constant::new();
/// Flag of requests whose `start_time_ns` is theirs (`RQF_IO_STAT`); 0 where it is zeroed
/// otherwise (before Linux 6.11).
#[unsafe(no_mangle)]
static QUEUED_FLAG: Constant = Constant::new();
/// Flag of requests whose `io_start_time_ns` is theirs (`RQF_STATS`); 0 likewise.
#[unsafe(no_mangle)]
static ISSUED_FLAG: Constant = Constant::new();
/// Bit of `QUEUE_FLAG_STATS` in a queue's flags.
#[unsafe(no_mangle)]
static QUEUE_STATS_BIT: Constant = Constant::new();

#[unsafe(no_mangle)]
static RQ_QUEUE: Constant = Constant::new();
#[unsafe(no_mangle)]
static RQ_CMD_FLAGS: Constant = Constant::new();
#[unsafe(no_mangle)]
static RQ_FLAGS: Constant = Constant::new();
#[unsafe(no_mangle)]
static RQ_DATA_LEN: Constant = Constant::new();
#[unsafe(no_mangle)]
static RQ_BIO: Constant = Constant::new();
#[unsafe(no_mangle)]
static RQ_START_TIME: Constant = Constant::new();
#[unsafe(no_mangle)]
static RQ_IO_START_TIME: Constant = Constant::new();
#[unsafe(no_mangle)]
static RQ_DISK: Constant = Constant::new();
#[unsafe(no_mangle)]
static QUEUE_DISK: Constant = Constant::new();
#[unsafe(no_mangle)]
static QUEUE_FLAGS: Constant = Constant::new();
#[unsafe(no_mangle)]
static DISK_MAJOR: Constant = Constant::new();
#[unsafe(no_mangle)]
static DISK_FIRST_MINOR: Constant = Constant::new();
#[unsafe(no_mangle)]
static BIO_NEXT: Constant = Constant::new();
#[unsafe(no_mangle)]
static BIO_IO_VEC: Constant = Constant::new();
#[unsafe(no_mangle)]
static BIO_BLKG: Constant = Constant::new();
#[unsafe(no_mangle)]
static BLKG_BLKCG: Constant = Constant::new();
#[unsafe(no_mangle)]
static BLKCG_CGROUP: Constant = Constant::new();
#[unsafe(no_mangle)]
static CGROUP_KN: Constant = Constant::new();
#[unsafe(no_mangle)]
static KN_ID: Constant = Constant::new();

/// Adds to a counter of this CPU, one or as many as a request counts for; most need none.
macro_rules! count {
    ($counter:ident) => {
        count!($counter, 1_u32)
    };
    ($counter:ident, $weight:expr) => {
        if let Some(counters) = COUNTERS.get_ptr_mut(0) {
            add_u64(&raw mut (*counters).$counter, u64::from($weight));
        }
    };
}

/// Operation in a request's `cmd_flags` (`REQ_OP_MASK`, include/linux/blk_types.h).
const OP_MASK: u32 = 0xff;
const REQ_OP_READ: u32 = 0;
const REQ_OP_WRITE: u32 = 1;
/// From here on a driver's own commands (`REQ_OP_SCSI_IN` up to Linux 5.15, `REQ_OP_DRV_IN`).
const REQ_OP_PASSTHROUGH: u32 = 32;

/// `block_rq_complete(struct request *rq, blk_status_t error, unsigned int nr_bytes)`,
/// include/trace/events/block.h. `error` was an `int` before 5.16.
#[btf_tracepoint(function = "block_rq_complete")]
pub fn block_rq_complete(ctx: BtfTracePointContext) -> i32 {
    completed(&ctx);
    0
}

/// `block_rq_requeue(struct request *rq)`.
#[btf_tracepoint(function = "block_rq_requeue")]
pub fn block_rq_requeue(ctx: BtfTracePointContext) -> i32 {
    requeued(ctx.arg(0));
    0
}

/// `block_rq_requeue(struct request_queue *q, struct request *rq)`, before Linux 5.11.
#[btf_tracepoint(function = "block_rq_requeue")]
pub fn block_rq_requeue_of(ctx: BtfTracePointContext) -> i32 {
    requeued(ctx.arg(1));
    0
}

/// `block_rq_insert(struct request *rq)`.
#[btf_tracepoint(function = "block_rq_insert")]
pub fn block_rq_insert(ctx: BtfTracePointContext) -> i32 {
    note(ctx.arg(0), false);
    0
}

/// `block_rq_issue(struct request *rq)`.
#[btf_tracepoint(function = "block_rq_issue")]
pub fn block_rq_issue(ctx: BtfTracePointContext) -> i32 {
    note(ctx.arg(0), true);
    0
}

/// `block_rq_insert(struct request_queue *q, struct request *rq)`, before Linux 5.11.
#[btf_tracepoint(function = "block_rq_insert")]
pub fn block_rq_insert_of(ctx: BtfTracePointContext) -> i32 {
    note(ctx.arg(1), false);
    0
}

/// `block_rq_issue(struct request_queue *q, struct request *rq)`, before Linux 5.11.
#[btf_tracepoint(function = "block_rq_issue")]
pub fn block_rq_issue_of(ctx: BtfTracePointContext) -> i32 {
    note(ctx.arg(1), true);
    0
}

/// Looks at a request that is done, or a part of it.
#[inline(always)]
fn completed(ctx: &BtfTracePointContext) -> Option<()> {
    let control = CONTROL.get(0)?;
    let shift = control.sampling_shift & 15;
    let request: *const u8 = ctx.arg(0);
    let bytes: u32 = ctx.arg(2);
    // SAFETY: `request` is one, and the others are reached from it, each checked (see
    // `field`); a row takes atomic additions.
    unsafe {
        let length: u32 = field(request, &RQ_DATA_LEN);
        if bytes < length {
            count!(partial);
            return None;
        }
        // A step of a flush sequence (block/blk-flush.c): the block layer's own flush, or the
        // data of a write with a flush before or after it. The request itself comes once more,
        // without this flag and without data left, when all steps are done.
        let flags: u32 = field(request, &RQ_FLAGS);
        if flags >> (FLUSH_SEQ_BIT.get() & 31) & 1 != 0 {
            return None;
        }
        let command: u32 = field(request, &RQ_CMD_FLAGS);
        let command = command & OP_MASK;
        if command >= REQ_OP_PASSTHROUGH {
            count!(passthrough);
            return None;
        }
        let mut queued = stamp(request, flags, &QUEUED_FLAG, &RQ_START_TIME);
        let mut issued = stamp(request, flags, &ISSUED_FLAG, &RQ_IO_START_TIME);
        // Decided here, where it is a request's end and what is left out can be counted one
        // by one: so far all was in the request, and the expensive part comes.
        if shift != 0 && !keeps(bpf_get_prandom_u32(), shift) {
            if queued == 0 || issued == 0 {
                forget(request);
            }
            count!(unsampled);
            return None;
        }
        let weight = weight(shift);
        let bio: *const u8 = field(request, &RQ_BIO);
        let op = if command == REQ_OP_READ {
            READ
        } else if command == REQ_OP_WRITE {
            // A flush is a write of nothing (`blkdev_issue_flush()`, block/blk-flush.c).
            if length == 0 && (bio.is_null() || field::<*const u8>(bio, &BIO_IO_VEC).is_null()) {
                FLUSH
            } else {
                WRITE
            }
        } else if command == OP_ZONE_APPEND.get() {
            WRITE
        } else {
            FLUSH
        };
        if queued == 0 || issued == 0 {
            noted(request, &mut queued, &mut issued);
            if queued == 0 {
                count!(no_queued, weight);
            }
            if issued == 0 && op != FLUSH {
                count!(no_issued, weight);
            }
        }
        let now = bpf_ktime_get_ns();
        if queued > now || issued > now {
            count!(discarded, weight);
            return None;
        }
        // First, as what is in no row is no more the host's than a VM's.
        let Some(device) = disk(request) else {
            count!(no_disk, weight);
            return None;
        };
        let who = match whose(bio, weight) {
            Some(who) => who,
            None if control.incomplete == 0 => HOST,
            None => {
                count!(unknown_cgroup, weight);
                return None;
            }
        };
        let key = Key { who, device, op };
        let number = match ROW_OF.get_ptr(&key) {
            Some(number) => *number,
            None => match take(&key) {
                Some(number) => number,
                None => {
                    count!(full, weight);
                    return None;
                }
            },
        };
        let row = ROWS.get_ptr_mut(number)?;
        let mut at = None;
        if queued != 0 {
            at = bucket(now - queued);
            add_shared_u32((&raw mut (*row).total).cast::<u32>().add(at?), weight);
            add_shared_u64(&raw mut (*row).total_ns, (now - queued) * u64::from(weight));
            touch(&raw mut (*row).total_lines, at?);
        }
        if issued != 0 {
            // Often the same: the kernel reads the clock once for what is submitted together.
            if issued != queued {
                at = bucket(now - issued);
            }
            add_shared_u32((&raw mut (*row).device).cast::<u32>().add(at?), weight);
            add_shared_u64(&raw mut (*row).device_ns, (now - issued) * u64::from(weight));
            touch(&raw mut (*row).device_lines, at?);
        }
        add_shared_u32(&raw mut (*row).count, weight);
    }
    Some(())
}

/// Notes that a bucket was added to.
#[inline(always)]
unsafe fn touch(lines: *mut u64, bucket: usize) {
    // SAFETY: as demanded of the caller: a map value.
    unsafe { lines.write_volatile(lines.read_volatile() | 1 << (bucket / LINE & 63)) }
}

/// A time that the kernel noted in a request; 0 if it did not, as nobody keeps statistics of
/// the device.
#[inline(always)]
unsafe fn stamp(request: *const u8, flags: u32, needed: &Constant, time: &Constant) -> u64 {
    let needed = needed.get();
    if flags & needed == needed {
        // SAFETY: as demanded of the caller.
        unsafe { field(request, time) }
    } else {
        0
    }
}

/// The VM whose block cgroup is to pay for a bio; [`HOST`] if no cgroup is, `None` if it is not
/// in the table.
#[inline(always)]
unsafe fn whose(bio: *const u8, weight: u32) -> Option<u32> {
    // SAFETY: as demanded of the caller; every pointer may be null and is checked.
    unsafe {
        if bio.is_null() {
            count!(no_bio, weight);
            return Some(HOST);
        }
        if !field::<*const u8>(bio, &BIO_NEXT).is_null() {
            count!(merged, weight);
        }
        let Some(id) = cgroup_id(bio) else {
            count!(no_cgroup, weight);
            return Some(HOST);
        };
        slot(&TABLE, TABLE_MASK.get(), &SPILL, id)
    }
}

/// Id of the block cgroup of a bio. On cgroup v2 it is the nearest one with the io
/// controller; on v1 it is one of the hierarchy of blkio.
#[inline(always)]
unsafe fn cgroup_id(bio: *const u8) -> Option<u64> {
    // SAFETY: as demanded of the caller; every pointer may be null and is checked.
    unsafe {
        let blkg = present(field(bio, &BIO_BLKG))?;
        let blkcg = present(field(blkg, &BLKG_BLKCG))?;
        let cgroup = present(field(blkcg, &BLKCG_CGROUP))?;
        let kn = present(field(cgroup, &CGROUP_KN))?;
        Some(field(kn, &KN_ID))
    }
}

#[inline(always)]
fn present(pointer: *const u8) -> Option<*const u8> {
    if pointer.is_null() { None } else { Some(pointer) }
}

/// Device number of the disk that a request is for.
#[inline(always)]
unsafe fn disk(request: *const u8) -> Option<u32> {
    // SAFETY: as demanded of the caller; every pointer may be null and is checked.
    unsafe {
        let disk: *const u8 = if DISK_OF_QUEUE.get() == 0 {
            field(request, &RQ_DISK)
        } else {
            field(present(field(request, &RQ_QUEUE))?, &QUEUE_DISK)
        };
        let disk = present(disk)?;
        Some(device(field(disk, &DISK_MAJOR), field(disk, &DISK_FIRST_MINOR)))
    }
}

/// Takes a free row for a key that has none; `None` if there is none.
#[inline(always)]
unsafe fn take(key: &Key) -> Option<u32> {
    let number = FREE.pop().ok()??;
    if ROW_OF.insert(key, number, BPF_NOEXIST.into()).is_err() {
        // Another CPU was faster. The queue has room: the row came out of it.
        let _ = FREE.push(number, 0);
        // SAFETY: copied out at once; a key is removed only when no request leads to it.
        return unsafe { ROW_OF.get(key) }.copied();
    }
    let row = ROWS.get_ptr_mut(number)?;
    // SAFETY: a map value; only who put the key in writes it.
    unsafe {
        // The device last: a reader that finds it, 0 being none, may rely on the others.
        (&raw mut (*row).key.who).write_volatile(key.who);
        (&raw mut (*row).key.op).write_volatile(key.op);
        (&raw mut (*row).key.device).write_volatile(key.device);
        count!(taken);
    }
    Some(number)
}

/// Notes when a request is queued, or given to its device, if the kernel does not.
#[inline(always)]
fn note(request: *const u8, issue: bool) -> Option<()> {
    // SAFETY: `request` is one, and `queue` is reached from it, checked.
    unsafe {
        let command: u32 = field(request, &RQ_CMD_FLAGS);
        let bio: *const u8 = field(request, &RQ_BIO);
        // A request without a bio is a driver's or the block layer's own flush.
        if command & OP_MASK >= REQ_OP_PASSTHROUGH || bio.is_null() {
            return None;
        }
        let queue = present(field(request, &RQ_QUEUE))?;
        let of_queue: u64 = field(queue, &QUEUE_FLAGS);
        let flags: u32 = field(request, &RQ_FLAGS);
        let queued = stamp(request, flags, &QUEUED_FLAG, &RQ_START_TIME);
        if queued != 0 && of_queue >> (QUEUE_STATS_BIT.get() & 63) & 1 != 0 {
            return None;
        }
        let now = bpf_ktime_get_ns();
        let address = request as u64;
        let issued = if issue { now } else { 0 };
        // It was in the scheduler's queue before, or it is tried again. One that was given to
        // its device is an earlier request at this address, whose end was not seen.
        if let Some(known) = STARTS.get_ptr_mut(&address) {
            if (*known).issued != 0 {
                (*known).queued = now;
            }
            (*known).issued = issued;
            return Some(());
        }
        let start = Start { queued: now, issued };
        if STARTS.insert(&address, &start, BPF_ANY.into()).is_err() {
            count!(not_noted);
        }
    }
    Some(())
}

/// A request is given back to its queue: it waits there again, since it was first queued.
#[inline(always)]
fn requeued(request: *const u8) {
    let address = request as u64;
    // SAFETY: a map value; nobody else has this request, and so its entry, now.
    unsafe {
        count!(requeued);
        if let Some(start) = STARTS.get_ptr_mut(&address) {
            (*start).issued = 0;
        }
    }
}

/// Forgets what [`note`] noted of a request.
#[inline(always)]
fn forget(request: *const u8) {
    // Mostly there is nothing.
    let _ = STARTS.remove(&(request as u64));
}

/// Fills in what is missing from what [`note`] noted, and forgets it.
#[inline(always)]
unsafe fn noted(request: *const u8, queued: &mut u64, issued: &mut u64) {
    let address = request as u64;
    // SAFETY: nobody else has this request, and so its entry, now.
    unsafe {
        if let Some(start) = STARTS.get_ptr(&address) {
            if *queued == 0 {
                *queued = (*start).queued;
            }
            if *issued == 0 {
                *issued = (*start).issued;
            }
            forget(request);
        }
    }
}
