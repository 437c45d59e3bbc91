//! Empty programs on the probes' hooks: what any probe there costs. For benchmarks.

use super::{Kernel, ProbeError, attach, load};
use aya::{Ebpf, include_bytes_aligned};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/formtune-floor"));

/// An empty program, attached; detached when dropped.
pub struct Floor(#[expect(dead_code, reason = "holds program and link")] Ebpf);

impl Floor {
    /// On `sched_switch`.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn switch(kernel: &Kernel) -> Result<Self, ProbeError> {
        Self::on(kernel, "floor_switch", "sched_switch")
    }

    /// On `block_rq_complete`.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn block(kernel: &Kernel) -> Result<Self, ProbeError> {
        Self::on(kernel, "floor_block", "block_rq_complete")
    }

    fn on(kernel: &Kernel, program: &'static str, hook: &str) -> Result<Self, ProbeError> {
        let mut ebpf = load(OBJECT, &[], &[])?;
        attach(&mut ebpf, kernel, program, hook)?;
        Ok(Self(ebpf))
    }
}
