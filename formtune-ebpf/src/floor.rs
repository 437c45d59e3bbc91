//! What attaching to `sched_switch` costs by itself: the floor of `cargo xtask bench runq`.
//! Never loaded by the agent.

use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;

/// Does nothing.
#[btf_tracepoint(function = "sched_switch")]
pub fn floor(_ctx: BtfTracePointContext) -> i32 {
    0
}
