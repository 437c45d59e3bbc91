//! Shared pieces of the root tests.

pub mod agent;
pub mod contention;
pub mod footprint;
pub mod knob;
pub mod libvirtd;
pub mod payload;
pub mod sensing;
pub mod vm_cgroup;
pub mod wait;
