//! What is to be done, and why; what became of it.

use crate::policy::Mode;
pub use crate::reason::{Breach, Culprit, Quantile, Reason, RelaxHold, Usage};
use crate::units::{Nanos, VmId, Weight};
use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The answer to one sample. Execution has no choice left: it does the setpoints in order
/// or reports why it could not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[must_use]
pub struct Plan {
    /// `seq` of the sample it answers; actuators refuse an older plan than the last one.
    pub seq: u64,
    /// `at` of the sample it answers.
    pub at: Nanos,
    /// Writes to be made, in this order. In `shadow` they are announced, not made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub setpoints: Vec<Setpoint>,
    /// From now on the probes look at one event in 2^this; `None`: as before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_shift: Option<u8>,
    /// One per VM that has a knob or an SLO, including every decision to do nothing.
    pub decisions: Vec<Decision>,
}

/// A knob of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Knob {
    /// `cpu.weight` (v2) or `cpu.shares` (v1).
    CpuWeight,
}

/// One write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setpoint {
    /// Whose knob.
    pub vm: VmId,
    /// Which knob.
    pub knob: Knob,
    /// Value the decision was based on; another value found at the knob means that
    /// somebody else changed it, and the write is not made.
    pub from: Weight,
    /// Value to write.
    pub to: Weight,
    /// `Shadow`: announce only. Never `Observe`.
    pub mode: Mode,
    /// The VM for whose sake it is done; `None` when it goes back to its original.
    pub victim: Option<VmId>,
    /// Why.
    pub reason: Reason,
}

/// What was decided about one VM in one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// About whom.
    pub vm: VmId,
    /// What the last window said.
    pub evidence: Evidence,
    /// What is done.
    pub action: Action,
    /// Why, or why not.
    pub reason: Reason,
}

/// What is done about a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Nothing.
    Hold,
    /// Its weight goes up: it is a victim.
    Raise,
    /// Its weight goes down: it makes a victim wait.
    Lower,
    /// Its weight goes a step back towards its original.
    Relax,
    /// An action that did not help is taken back.
    Revert,
}

/// What one window of one VM said. Percentiles are `None` below `min_samples`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// Waits that ended in the window.
    pub samples: u64,
    /// The SLO's quantile of the run-queue latency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Nanos>,
    /// The SLO's threshold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Nanos>,
    /// (target − measured) / target, rounded to three decimals.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slack: Option<f64>,
    /// Windows among the last `confirm_of` that were bad (slack below `slack_act`).
    #[serde(default)]
    pub bad_windows: u8,
    /// CPUs used, averaged over about the last second, rounded to three decimals.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus_used: Option<f64>,
    /// The knob as read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<Weight>,
}

/// What became of a setpoint; enters the next sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Plan that asked for it.
    pub plan_seq: u64,
    /// Whose knob.
    pub vm: VmId,
    /// Which knob.
    pub knob: Knob,
    /// Value asked for.
    pub asked: Weight,
    /// What happened.
    pub result: OutcomeResult,
}

/// See [`Outcome`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum OutcomeResult {
    /// Written and read back.
    Applied {
        /// As read back.
        value: Weight,
    },
    /// It already had that value.
    Unchanged,
    /// Written, and the kernel or libvirt made something else of it.
    Clamped {
        /// As read back.
        value: Weight,
    },
    /// Somebody else had changed the knob: it is theirs now, until the VM restarts or the
    /// agent does.
    Yielded {
        /// The foreign value.
        found: Weight,
    },
    /// Not written, e.g. the cgroup is gone, or the journal could not be made durable.
    Refused {
        /// One line: what and where.
        why: String,
    },
}
