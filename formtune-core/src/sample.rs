//! What was read, and when. Anything a host may lack is an `Option`: absent is never zero.

use crate::plan::Outcome;
use crate::units::{ClassName, Nanos, VmId, Weight};
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// One reading of the node. `at` is the only clock that core ever sees.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Counts up by one per sample since the agent started.
    pub seq: u64,
    /// `CLOCK_MONOTONIC` when the reading began; strictly increasing.
    pub at: Nanos,
    /// The node as a whole.
    pub host: HostSample,
    /// Every VM known at `at`. A VM missing here is gone: core drops its state.
    pub vms: BTreeMap<VmId, VmSample>,
    /// What became of the setpoints of earlier plans since the previous sample.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outcomes: Vec<Outcome>,
}

/// The node as a whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostSample {
    /// Online CPUs.
    pub cpus: u32,
    /// Cumulative busy time of all CPUs (user, nice, system, irq, softirq, steal of
    /// `/proc/stat`), nanoseconds. The share of capacity in use is its rate over `cpus`.
    pub cpu_busy_ns: Option<u64>,
    /// `None` while the probe counts everything; else why its counts cannot be relied on
    /// (not loaded, events discarded, table full). Blindness means hold, then decay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blind: Option<String>,
    /// CPUs that the probes took lately; only where it was measured since the last sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe_cost: Option<f64>,
    /// The probes looked at one event in 2^this, which counts as 2^this.
    #[serde(default, skip_serializing_if = "is_not_sampled")]
    pub sampling_shift: u8,
}

fn is_not_sampled(shift: &u8) -> bool {
    *shift == 0
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmSample {
    /// Class of the policy that the agent found for this VM.
    pub class: ClassName,
    /// Virtual CPUs; 0 where not known.
    pub vcpus: u32,
    /// Waits of all threads of the VM that ended since the previous sample.
    /// `None`: not measured (yet); `Some` with no counts: measured, and nothing waited.
    pub runq: Option<RunqInterval>,
    /// Who held the CPUs that this VM's long waits of the same interval were for. `None`: not
    /// known; empty: there were no long waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<HeldInterval>,
    /// Cumulative CPU time of the whole VM, nanoseconds. May be refreshed less often than
    /// every sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_usage_ns: Option<u64>,
    /// Cumulative time the VM was throttled by its own quota, nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttled_ns: Option<u64>,
    /// The knob as it stands, on the v2 scale. `None`: the VM has no such knob, or it
    /// could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<Weight>,
    /// The knob as formtune first found it (from the journal where formtune changed it).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight_original: Option<Weight>,
}

/// Run-queue waits that ended in one interval: a sparse histogram and its sum.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunqInterval {
    /// `(bucket, count)`, ascending by bucket, counts above zero. Bucket bounds are those
    /// of `formtune_common::histogram`.
    pub counts: Vec<(u16, u32)>,
    /// Sum of the waits, nanoseconds (measured, not derived from buckets).
    pub wait_ns: u64,
}

/// Time of one VM's long waits, by who had the CPU meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldInterval {
    /// VMs, the waiting one itself among them, nanoseconds above zero.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub by_vm: BTreeMap<VmId, u64>,
    /// Tasks of the host, nanoseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub by_host_ns: u64,
    /// Nobody: the CPU was idle while the VM was stopped by its own quota, or being woken up.
    /// Neither the host's nor any VM's doing; nanoseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub idle_ns: u64,
    /// Nobody knows who, nanoseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unknown_ns: u64,
}

impl HeldInterval {
    /// All of it, nanoseconds.
    pub fn total_ns(&self) -> u64 {
        let vms = self.by_vm.values().fold(0_u64, |sum, ns| sum.saturating_add(*ns));
        [self.by_host_ns, self.idle_ns, self.unknown_ns].into_iter().fold(vms, u64::saturating_add)
    }

    /// Adds another interval.
    pub fn add(&mut self, other: &Self) {
        for (vm, ns) in &other.by_vm {
            match self.by_vm.get_mut(vm) {
                Some(sum) => *sum = sum.saturating_add(*ns),
                None => drop(self.by_vm.insert(vm.clone(), *ns)),
            }
        }
        self.by_host_ns = self.by_host_ns.saturating_add(other.by_host_ns);
        self.idle_ns = self.idle_ns.saturating_add(other.idle_ns);
        self.unknown_ns = self.unknown_ns.saturating_add(other.unknown_ns);
    }
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}
