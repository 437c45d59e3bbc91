//! Says, once of each, when more VMs came than there is room for. What is not measured is in
//! [`ProbeHealth`] and `BlockHealth` all the time.

use super::block::Block;
use super::health::ProbeHealth;

/// What was said already.
pub struct Shortage {
    max_vms: u32,
    slots: bool,
    cgroups: bool,
    rows: bool,
    block_cgroups: bool,
}

impl Shortage {
    /// With room for so many VMs, as configured.
    pub fn of(max_vms: u32) -> Self {
        Self { max_vms, slots: false, cgroups: false, rows: false, block_cgroups: false }
    }

    /// To be called with every reading.
    pub fn look(&mut self, health: &ProbeHealth, block: &Block) {
        let remedy = if health.slots < self.max_vms {
            "more do not fit into the memory that its rows may take"
        } else {
            "raise `max_vms`"
        };
        // Without the probe there are no slots, which is said elsewhere.
        let (without, slots) = (health.not_measured, health.slots);
        say_once(&mut self.slots, without > 0 && slots > 0, || {
            format!(
                "{without} VMs wait for CPUs unmeasured: all {slots} slots of the run-queue probe \
                 are taken; {remedy}"
            )
        });
        let cgroups = health.cgroups_not_measured;
        say_once(&mut self.cgroups, cgroups > 0 && slots > 0, || {
            format!(
                "{cgroups} cgroups of VMs find no room in the run-queue probe: their waits are not \
                 counted, and nobody is blamed for tasks that are no known VM's; raise `max_vms`"
            )
        });
        let (requests, rows) = block.without_row();
        say_once(&mut self.rows, requests > 0, || {
            format!(
                "block I/O is counted in part: all {rows} rows of the probe are taken, and \
                 {requests} requests found none so far; raise `max_vms`"
            )
        });
        let cgroups = block.cgroups_not_counted();
        say_once(&mut self.block_cgroups, cgroups > 0, || {
            format!(
                "{cgroups} cgroups of VMs find no room in the block I/O probe: requests of no known \
                 VM are not counted, as they need not be the host's; raise `max_vms`"
            )
        });
    }
}

fn say_once(said: &mut bool, is_so: bool, line: impl FnOnce() -> String) {
    if is_so && !*said {
        *said = true;
        tracing::warn!("{}", line());
    }
}
