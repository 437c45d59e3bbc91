//! A VM's state in one word, the same in `status` and `explain`.

use super::style::Tone;
use crate::export::snapshot::VmState;
use formtune_core::plan::Reason;
use serde::Serialize;

/// How a VM stands to its promise, from its last window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The last window met the SLO with room to spare.
    Met,
    /// It met the SLO, with a slack below 10 %.
    Tight,
    /// It did not.
    Missed,
    /// Too few waits to tell: it is (almost) idle.
    Quiet,
    /// Its class promises nothing.
    NoSlo,
    /// Nothing is known about it: not measured (yet), or the probe is blind.
    Unknown,
}

/// Slack below which a window that is met counts as tight: the default of `slack_act`.
const TIGHT: f64 = 0.1;

impl State {
    /// Of a VM; `blind` while the probe's counts cannot be relied on.
    pub fn of(vm: &VmState, blind: bool) -> Self {
        if blind || vm.runq.is_none() {
            return Self::Unknown;
        }
        if vm.slo.is_none() {
            return Self::NoSlo;
        }
        match vm.evidence().and_then(|evidence| evidence.slack) {
            Some(slack) if slack < 0.0 => Self::Missed,
            Some(slack) if slack < TIGHT => Self::Tight,
            Some(_) => Self::Met,
            // In mode `observe` nothing is decided, hence no evidence kept.
            None if matches!(
                vm.decision.as_ref().map(|d| &d.reason),
                Some(Reason::Observing) | None
            ) =>
            {
                Self::Unknown
            }
            None => Self::Quiet,
        }
    }

    /// Symbol and word; neither stands alone.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Met => "✓ met",
            Self::Tight => "! tight",
            Self::Missed => "✗ missed",
            Self::Quiet => "· quiet",
            Self::NoSlo => "· no slo",
            Self::Unknown => "? unknown",
        }
    }

    /// Its colour.
    pub const fn tone(self) -> Tone {
        match self {
            Self::Met => Tone::Good,
            Self::Tight => Tone::Notice,
            Self::Missed | Self::Unknown => Tone::Bad,
            Self::Quiet | Self::NoSlo => Tone::Dim,
        }
    }
}

/// Whether a reason wants a human to look.
pub const fn wants_attention(reason: &Reason) -> bool {
    matches!(
        reason,
        Reason::Frozen { .. }
            | Reason::Yielded { .. }
            | Reason::Refused { .. }
            | Reason::Barred { .. }
            | Reason::AtBounds { .. }
            | Reason::NoCulprit { .. }
            | Reason::OverEntitlement { .. }
            | Reason::Throttled { .. }
            | Reason::IdleCpu { .. }
            | Reason::BlindDecay { .. }
    )
}
