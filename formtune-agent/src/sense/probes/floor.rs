//! Empty programs on the probes' hooks: what any probe there costs. For benchmarks.

use super::tap::TapMethod;
use super::{Kernel, ProbeError, attach, load};
use aya::programs::tc::{NlOptions, TcAttachOptions, qdisc_add_clsact};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
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

    /// On what comes in at a device, attached as the tap probe is.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn tap(device: &str) -> Result<Self, ProbeError> {
        const NAME: &str = "floor_tap";
        let mut ebpf = load(OBJECT, &[], &[])?;
        let program = ebpf.program_mut(NAME).ok_or(ProbeError::Object(NAME))?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load()?;
        let options = match TapMethod::of_kernel() {
            TapMethod::Tcx => TcAttachOptions::TcxOrder(LinkOrder::first()),
            TapMethod::Clsact => {
                // It may be there already; if it cannot be had, attaching says so.
                let _ = qdisc_add_clsact(device);
                TcAttachOptions::Netlink(NlOptions::default())
            }
        };
        program.attach_with_options(device, TcAttachType::Ingress, options)?;
        Ok(Self(ebpf))
    }

    fn on(kernel: &Kernel, program: &'static str, hook: &str) -> Result<Self, ProbeError> {
        let mut ebpf = load(OBJECT, &[], &[])?;
        attach(&mut ebpf, kernel, program, hook)?;
        Ok(Self(ebpf))
    }
}
