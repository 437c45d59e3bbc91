//! What a guest's own TCP sends again, which the host's stack never sees: recognised by
//! sequence numbers on the VM's tap device, in both directions.
//!
//! Both programs only look: they answer `TC_ACT_UNSPEC`, with which whatever else is on the
//! device has its turn. What is a retransmission is decided in
//! [`formtune_common::tcp::flow`].
//!
//! Flows live in a table of sets of four, found by the low bits of a 64-bit key. Who is not
//! in its set takes the place of the one that was silent longest there, unless that one was
//! heard of a moment ago: with more flows than room some are followed well, and the others
//! are counted as not followed, instead of all of them badly. Two CPUs that carry one flow
//! at once may miscount a segment; nothing is locked.
#![feature(asm_experimental_arch)]
#![no_std]
#![no_main]
// The macros add functions of their own.
#![allow(missing_docs)]

use aya_ebpf::bindings::{__sk_buff, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_skb_load_bytes};
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::programs::TcContext;
use core::arch::asm;
use formtune_common::table::TableEntry;
use formtune_common::tcp::flow::{Flow, Seen, Segment};
use formtune_common::tcp::frame::{self, About, Frame, MAX_DEPTH, MAX_HEADER};
use formtune_common::tcp::{FlowSet, RECEIVED, SENT, TapControl, TapRow, WAYS, Way};
use formtune_ebpf::count::add_u64;
use formtune_ebpf::kernel::Constant;
use formtune_ebpf::packet::{Copied, InPlace};
use formtune_ebpf::table::slot;

formtune_ebpf::object!();

// Lengths are those of a small node; the agent sets them for the node it is on.

/// One row per place and CPU.
#[map]
static ROWS: Array<TapRow> = Array::with_max_entries(64, BPF_F_MMAPABLE);
#[map]
static CONTROL: Array<TapControl> = Array::with_max_entries(1, 0);
/// Segments of flows that are left out, to keep the cost down. Others count for them.
#[map]
static UNSAMPLED: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
/// Interface → place, by the low bits of the interface's index.
#[map]
static TABLE: Array<TableEntry> = Array::with_max_entries(1024, 0);
/// Interface → place, for those whose place in `TABLE` is taken.
#[map]
static SPILL: HashMap<u64, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map]
static FLOWS: Array<FlowSet> = Array::with_max_entries(1024, 0);
/// Where a packet's headers are copied that are not in one piece.
#[map]
static COPY: PerCpuArray<[u8; MAX_DEPTH + MAX_HEADER]> = PerCpuArray::with_max_entries(1, 0);

/// Length of `TABLE` less one; the length is a power of two.
#[unsafe(no_mangle)]
static TABLE_MASK: Constant = Constant::new();
/// Length of `FLOWS` less one; the length is a power of two.
#[unsafe(no_mangle)]
static FLOWS_MASK: Constant = Constant::new();
/// Rows per place: the greatest possible CPU number and one.
#[unsafe(no_mangle)]
static ROWS_PER_PLACE: Constant = Constant::new();
/// Random, so that no guest can tell which flows share a set.
#[unsafe(no_mangle)]
static SEED_LOW: Constant = Constant::new();
#[unsafe(no_mangle)]
static SEED_HIGH: Constant = Constant::new();

/// A flow that was silent for so many jiffies may be forgotten for another: 0.25 to 2.5 s,
/// as the kernel was built.
const SILENT: u32 = 256;

/// Continue with the next program.
const TC_ACT_UNSPEC: i32 = -1;

/// From the guest: what comes in at its tap.
#[classifier]
pub fn formtune_tap_tx(ctx: TcContext) -> i32 {
    look(ctx.skb.skb, SENT);
    TC_ACT_UNSPEC
}

/// To the guest: what goes out there.
#[classifier]
pub fn formtune_tap_rx(ctx: TcContext) -> i32 {
    look(ctx.skb.skb, RECEIVED);
    TC_ACT_UNSPEC
}

#[inline(always)]
fn look(skb: *mut __sk_buff, way: usize) -> Option<()> {
    // SAFETY: the program's context.
    let (data, end, len, interface, mss) = unsafe {
        let skb = &*skb;
        (skb.data as usize, skb.data_end as usize, skb.len, skb.ifindex, skb.gso_size)
    };
    // SAFETY: as above.
    let tag = unsafe { (*skb).vlan_tci } & 0xfff;
    let about = About {
        len,
        mss,
        // Interface indices stay far below 2^19; a clash would only mix up two flows' keys.
        apart: interface << 13 | tag << 1 | way as u32,
        seed: u64::from(SEED_HIGH.get()) << 32 | u64::from(SEED_LOW.get()),
    };
    let mut frame = frame::read(&InPlace { data, end }, &about);
    if frame == Frame::Short && (end - data) < len as usize {
        frame = read_copy(skb, &about)?;
    }
    if frame == Frame::Other {
        return Some(());
    }
    let place = slot(&TABLE, TABLE_MASK.get(), &SPILL, interface.into())?;
    // SAFETY: a helper without arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let row = ROWS.get_ptr_mut(place * ROWS_PER_PLACE.get() + cpu)?;
    // SAFETY: a map value that only this CPU writes.
    let counts = unsafe { &raw mut (*row).ways[way] };
    match frame {
        Frame::Tcp { key, segment } => count(counts, key, &segment),
        // SAFETY: as above.
        _ => unsafe { add_u64(&raw mut (*counts).unread, 1) },
    }
    Some(())
}

/// Copies the headers first. Rare, so not inlined twice.
#[inline(always)]
fn read_copy(skb: *mut __sk_buff, about: &About) -> Option<Frame> {
    let bytes = COPY.get_ptr_mut(0)?;
    let mut len = if about.len < MAX_DEPTH as u32 { about.len } else { MAX_DEPTH as u32 };
    if len == 0 {
        return Some(Frame::Other);
    }
    // Known to be 1 to 256, also to a verifier that did not follow.
    // SAFETY: changes nothing but its operand.
    unsafe {
        asm!("{0} += -1", "{0} &= 255", "{0} += 1", inout(reg) len, options(nomem, nostack));
    }
    // SAFETY: a map value of that length at least, this CPU's own.
    let copied = unsafe { bpf_skb_load_bytes(skb.cast(), 0, bytes.cast(), len) };
    if copied != 0 {
        return Some(Frame::Unread);
    }
    // SAFETY: as above.
    Some(frame::read(&Copied { bytes: unsafe { &*bytes }, len: len as usize }, about))
}

#[inline(always)]
fn count(way: *mut Way, key: u64, segment: &Segment) {
    if segment.space() == 0 {
        return;
    }
    let segments = segment.count();
    // Copied: the agent may change it meanwhile, and weight and choice belong together.
    let Some(&control) = CONTROL.get(0) else { return };
    let shift = control.sampling_shift & 31;
    // SAFETY: a map value that only this CPU writes.
    unsafe {
        add_u64(&raw mut (*way).segments, segments.into());
        add_u64(&raw mut (*way).bytes, segment.len.into());
        if !control.follows(key) {
            let Some(unsampled) = UNSAMPLED.get_ptr_mut(0) else { return };
            add_u64(unsampled, segments.into());
            return;
        }
        let Some(seen) = follow(control.kept_as(key), segment) else {
            add_u64(&raw mut (*way).untracked, u64::from(segments) << shift);
            return;
        };
        if seen == Seen::default() {
            return;
        }
        add_u64(&raw mut (*way).retransmitted, u64::from(seen.retransmitted) << shift);
        add_u64(&raw mut (*way).retransmitted_bytes, u64::from(seen.retransmitted_bytes) << shift);
        add_u64(&raw mut (*way).reordered, u64::from(seen.reordered) << shift);
        add_u64(&raw mut (*way).keep_alives, u64::from(seen.keep_alive) << shift);
    }
}

/// What a segment is to its flow; `None` if there is no room for that.
#[inline(always)]
fn follow(key: u64, segment: &Segment) -> Option<Seen> {
    let set = FLOWS.get_ptr_mut(key as u32 & FLOWS_MASK.get())?;
    // SAFETY: helpers without arguments.
    let (jiffies, now) = unsafe { (bpf_jiffies64() as u32, || (bpf_ktime_get_ns() >> 10) as u32) };
    let flows = set.cast::<Flow>();
    // SAFETY: within the set. Other CPUs may write as well; every value is a valid one.
    unsafe {
        for at in 0..WAYS {
            let flow = flows.add(at);
            if (*flow).key == key {
                (*flow).used = jiffies;
                return Some((*flow).observe(segment, now));
            }
        }
        let mut oldest = flows;
        let mut longest = 0;
        for at in 0..WAYS {
            let flow = flows.add(at);
            let silent = match (*flow).key {
                0 => u32::MAX,
                _ => jiffies.wrapping_sub((*flow).used),
            };
            if silent > longest {
                longest = silent;
                oldest = flow;
            }
        }
        if longest < SILENT {
            return None;
        }
        (*oldest).key = 0;
        (*oldest).begin(segment);
        (*oldest).used = jiffies;
        (*oldest).key = key;
    }
    Some(Seen::default())
}
