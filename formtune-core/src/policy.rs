//! The operator's numbers, validated once on the way in (by the agent's `config`).

use crate::units::{ClassName, Nanos, Weight};
use alloc::collections::BTreeMap;
use serde::{Deserialize, Serialize};

/// Everything the operator decides. Part of a trace's header, so a replay has it too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// What may be done, per knob.
    pub modes: Modes,
    /// Time between samples.
    pub tick: Nanos,
    /// CPUs that the probes may take on the whole node; above, they look at fewer events.
    pub probe_budget: f64,
    /// Limits of the CPU loop.
    pub cpu: CpuLoop,
    /// Classes by name; always holds `default_class`.
    pub classes: BTreeMap<ClassName, Class>,
    /// Class of a VM that no rule names.
    pub default_class: ClassName,
}

/// A mode per knob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modes {
    /// `cpu.weight` / `cpu.shares`.
    pub cpu_weight: Mode,
}

/// How far the agent may go with a knob.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Measure only: no decisions.
    Observe,
    /// Decide, log and export, write nothing.
    #[default]
    Shadow,
    /// Decide and write.
    Enforce,
}

/// A class of VMs: what it is promised, and how far its weight may move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Class {
    /// Who is asked to give way first: a VM is only ever throttled for a VM of the same
    /// or a higher priority.
    pub priority: Priority,
    /// What the class is promised; a class without an SLO is never a victim.
    pub slo: Option<Slo>,
    /// Entitlement. `None`: the weight the VM was found with.
    pub cpu_weight: Option<Weight>,
    /// Least weight the loop may set, as a share of the entitlement (0 < floor ≤ 1).
    pub floor_ratio: f64,
    /// Greatest weight the loop may set, as a multiple of the entitlement (≥ 1).
    pub ceiling_ratio: f64,
}

/// Priority of a class, as the guide's `resource_pools` spell it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Gives way first.
    Low,
    /// The default.
    #[default]
    Normal,
    /// Gives way last.
    High,
}

/// A promise: in at least `share` of the windows, the indicator's quantile stays at or
/// below the threshold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slo {
    /// What is measured.
    pub indicator: Indicator,
    /// Quantile of the indicator, 0 < q < 1, usually 0.99.
    pub quantile: f64,
    /// Threshold of that quantile.
    pub threshold: Nanos,
    /// Length of a window; windows slide by one tick.
    pub window: Nanos,
    /// Share of windows that must meet the threshold, 0 < share ≤ 1.
    pub share: f64,
    /// Waits a window must hold for its quantile to count; fewer is "unknown".
    pub min_samples: u32,
}

/// What an SLO is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Indicator {
    /// Time from runnable to running, over all threads of the VM.
    #[default]
    RunqLatency,
}

/// Limits of the CPU loop. `Default` holds the starting values of the design.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuLoop {
    /// Below this slack a window counts as bad: slack = (target − measured) / target.
    pub slack_act: f64,
    /// Above this slack a window counts as comfortable; between both: hold.
    pub slack_relax: f64,
    /// Below this slack neighbours go straight to their floor.
    pub slack_severe: f64,
    /// Bad windows needed (of `confirm_of`) before acting.
    pub confirm: u8,
    /// Windows looked back on for confirmation, at most 32.
    pub confirm_of: u8,
    /// Victim's increase per action, as a share of its entitlement.
    pub raise_ratio: f64,
    /// Neighbour's decrease per action: factor on its weight.
    pub lower_factor: f64,
    /// Step back towards the original per relax action, as a share of the entitlement.
    pub relax_ratio: f64,
    /// Changes smaller than this share of the weight are skipped.
    pub min_change_ratio: f64,
    /// Relax only while the node's CPUs are busy below this share.
    pub relax_below_busy: f64,
    /// Least time between two changes of one knob.
    pub cooldown: Nanos,
    /// Windows after an action before it is judged.
    pub verify_windows: u8,
    /// Least improvement of the victim's indicator for an action to be kept.
    pub verify_gain: f64,
    /// How long a victim/knob pair is barred after an action that did not help.
    pub bar: Nanos,
    /// Direction changes of one knob within `reversal_window` that freeze it.
    pub reversals: u8,
    /// See `reversals`.
    pub reversal_window: Nanos,
    /// How long a frozen knob stays frozen.
    pub freeze: Nanos,
    /// Blind for this long: decay to the originals.
    pub blind_decay_after: Nanos,
}

impl Default for CpuLoop {
    fn default() -> Self {
        Self {
            slack_act: 0.1,
            slack_relax: 0.3,
            slack_severe: -0.5,
            confirm: 3,
            confirm_of: 5,
            raise_ratio: 0.1,
            lower_factor: 0.8,
            relax_ratio: 0.05,
            min_change_ratio: 0.05,
            relax_below_busy: 0.7,
            cooldown: Nanos::from_secs(3),
            verify_windows: 3,
            verify_gain: 0.1,
            bar: Nanos::from_secs(600),
            reversals: 3,
            reversal_window: Nanos::from_secs(60),
            freeze: Nanos::from_secs(600),
            blind_decay_after: Nanos::from_secs(10),
        }
    }
}
