//! What the host's own TCP sends again, per VM: the sockets of a VM's processes (migration,
//! slirp, remote storage), by the cgroup in which they were made.
//!
//! Segments are counted, not calls: one call sends a whole buffer again, and the kernel
//! keeps the number of segments in it in the buffer itself (`tcp_skb_pcount()`), which is
//! also what it adds to `RetransSegs`. SYN-ACKs have a tracepoint of their own.
//!
//! All this happens seldom, so pointers that the verifier does not follow (before 5.16 the
//! cgroup is a union with flags in its low bits) are read by a helper.
#![feature(asm_experimental_arch)]
#![no_std]
#![no_main]
// The macros add functions of their own.
#![allow(missing_docs)]

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::BtfTracePointContext;
use formtune_common::table::TableEntry;
use formtune_common::tcp::{HostRow, NO_VM, host_row};
use formtune_ebpf::count::add_shared_u64;
use formtune_ebpf::kernel::{Constant, field};
use formtune_ebpf::table::slot;

formtune_ebpf::object!();

// Lengths are those of a small node; the agent sets them for the node it is on.

/// One row per slot and one for those of no VM.
#[map]
static ROWS: Array<HostRow> = Array::with_max_entries(65, BPF_F_MMAPABLE);
/// cgroup → slot, by the low bits of the cgroup's id.
#[map]
static TABLE: Array<TableEntry> = Array::with_max_entries(4096, 0);
/// cgroup → slot, for those whose place in `TABLE` is taken.
#[map]
static SPILL: HashMap<u64, u32> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// Length of `TABLE` less one; the length is a power of two.
#[unsafe(no_mangle)]
static TABLE_MASK: Constant = Constant::new();
/// 1: the tracepoint has a third argument, whether sending failed (from 6.16 on); before, it
/// fires only where it did not.
#[unsafe(no_mangle)]
static HAS_ERROR: Constant = Constant::new();

/// Offset of the cgroup in `struct sock`.
#[unsafe(no_mangle)]
static SOCK_CGROUP: Constant = Constant::new();
/// Offset of `tcp_gso_segs` in `struct sk_buff`.
#[unsafe(no_mangle)]
static SKB_SEGMENTS: Constant = Constant::new();
#[unsafe(no_mangle)]
static CGROUP_KN: Constant = Constant::new();
#[unsafe(no_mangle)]
static KN_ID: Constant = Constant::new();

/// `tcp_retransmit_skb(const struct sock *sk, const struct sk_buff *skb, …)`,
/// include/trace/events/tcp.h.
#[btf_tracepoint(function = "tcp_retransmit_skb")]
pub fn tcp_retransmit_skb(ctx: BtfTracePointContext) -> i32 {
    if HAS_ERROR.get() != 0 {
        let error: i32 = ctx.arg(2);
        if error != 0 {
            return 0;
        }
    }
    let socket: *const u8 = ctx.arg(0);
    let buffer: *const u8 = ctx.arg(1);
    // SAFETY: the tracepoint's second argument.
    let segments: u16 = unsafe { field(buffer, &SKB_SEGMENTS) };
    if let Some(row) = row(socket) {
        // SAFETY: a map value.
        unsafe { add_shared_u64(&raw mut (*row).segments, segments.into()) };
    }
    0
}

/// `tcp_retransmit_synack(const struct sock *sk, const struct request_sock *req)`; `sk` is
/// the listener.
#[btf_tracepoint(function = "tcp_retransmit_synack")]
pub fn tcp_retransmit_synack(ctx: BtfTracePointContext) -> i32 {
    if let Some(row) = row(ctx.arg(0)) {
        // SAFETY: a map value.
        unsafe { add_shared_u64(&raw mut (*row).syn_acks, 1) };
    }
    0
}

/// The row to count into.
#[inline(always)]
fn row(socket: *const u8) -> Option<*mut HostRow> {
    let owner = cgroup_id(socket).and_then(|id| slot(&TABLE, TABLE_MASK.get(), &SPILL, id));
    ROWS.get_ptr_mut(owner.map_or(NO_VM, host_row))
}

/// Id of the cgroup in the v2 hierarchy in which a socket was made.
#[inline(always)]
fn cgroup_id(socket: *const u8) -> Option<u64> {
    // SAFETY: the helper reads from any address, or fails.
    unsafe {
        let cgroup: u64 = read(socket, &SOCK_CGROUP)?;
        // Before 5.16 the low bits say that there is no cgroup here but a v1 class.
        if cgroup == 0 || cgroup & 3 != 0 {
            return None;
        }
        let node: u64 = read(cgroup as *const u8, &CGROUP_KN)?;
        read(node as *const u8, &KN_ID)
    }
}

/// The 64 bits at an offset.
#[inline(always)]
unsafe fn read(base: *const u8, offset: &Constant) -> Option<u64> {
    // SAFETY: as for `cgroup_id`.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset.get() as usize).cast()) }.ok()
}
