//! Empty programs: what any probe on the same hook costs. For benchmarks only.
#![no_std]
#![no_main]
// The macros add functions of their own.
#![allow(missing_docs)]

use aya_ebpf::macros::{btf_tracepoint, classifier};
use aya_ebpf::programs::{BtfTracePointContext, TcContext};

formtune_ebpf::object!();

/// Does nothing at a context switch.
#[btf_tracepoint(function = "sched_switch")]
pub fn floor_switch(_ctx: BtfTracePointContext) -> i32 {
    0
}

/// Does nothing when a block request is done.
#[btf_tracepoint(function = "block_rq_complete")]
pub fn floor_block(_ctx: BtfTracePointContext) -> i32 {
    0
}

/// Does nothing with a packet: `TC_ACT_UNSPEC`, as the probe answers.
#[classifier]
pub fn floor_tap(_ctx: TcContext) -> i32 {
    -1
}
