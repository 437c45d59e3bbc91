//! Shared pieces of the root tests.

pub mod agent;
pub mod block;
pub mod contention;
pub mod footprint;
pub mod frames;
pub mod injected;
pub mod knob;
pub mod libvirtd;
pub mod many;
pub mod maps;
pub mod net;
pub mod payload;
pub mod prometheus;
pub mod relay;
pub mod retransmit;
pub mod sensing;
pub mod taps;
pub mod twin;
pub mod vm_block;
pub mod vm_cgroup;
pub mod vm_requests;
pub mod wait;
