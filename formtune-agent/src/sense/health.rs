//! What the probes see and what they do not: for `doctor`, `/metrics` and `blind`.

use super::cgroup::Hierarchies;
use super::probes::Cost;

/// State of the probes and of the map that they count into.
#[derive(Clone, Debug)]
pub struct ProbeHealth {
    /// The run-queue probe.
    pub runq: ProbeState,
    /// The hierarchies found.
    pub hierarchies: Hierarchies,
    /// VMs that can be measured at once.
    pub slots: u32,
    /// VMs that are measured.
    pub slots_used: u32,
    /// VMs that are known and not measured, as all slots are taken.
    pub not_measured: u32,
    /// cgroups that the probe looks for.
    pub cgroups: u32,
    /// cgroups of VMs that the probe has no room for.
    pub cgroups_not_measured: u32,
    /// Of `cgroups`, those in the slower hash map.
    pub cgroups_spilled: u32,
    /// Kernel memory of the maps, bytes.
    pub map_bytes: u64,
    /// Waits counted since start, over all VMs.
    pub counted: u64,
    /// Switches of VMs' tasks without a usable time stamp since start; not counted.
    pub discarded: u64,
    /// Domains that libvirt reports running and for which no cgroup was found.
    pub domains_without_cgroup: u32,
    /// What the programs cost when it was last measured; `None` before, and where the kernel
    /// keeps no statistics.
    pub cost: Option<Cost>,
    /// The probes look at one event in 2^this.
    pub sampling_shift: u8,
    /// Context switches that the run-queue probe did not look at for that reason.
    pub unsampled: u64,
}

/// State of one probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeState {
    /// Loaded and attached.
    Loaded,
    /// Not loaded.
    Unavailable {
        /// Program, e.g. `sched_switch`.
        program: &'static str,
        /// What the kernel said, one line.
        why: String,
        /// What to do, and what still works without it.
        remedy: String,
    },
}

impl ProbeHealth {
    /// One line if nothing is measured at all.
    pub fn blind(&self) -> Option<String> {
        match &self.runq {
            ProbeState::Loaded => None,
            ProbeState::Unavailable { program, why, .. } => {
                Some(format!("program {program} is not loaded: {why}"))
            }
        }
    }
}
