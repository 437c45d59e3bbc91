//! Giving back: step by step, when nobody needs the change any more, and later each time
//! that turned out to be too early.

use crate::plan::{Reason, RelaxHold};
use crate::policy::CpuLoop;
use crate::state::VmState;
use crate::units::{Nanos, Weight};

/// A victim without a known window for this long is idle; what was done for it is given
/// back. Long against any pause of a service, short against the life of a VM.
pub const IDLE: Nanos = Nanos::from_secs(30);

/// Least time between an action and the first step back. Ten windows at the default.
const HOLD: Nanos = Nanos::from_secs(10);

/// An action this soon after a step back says that the step was too early; the next hold is
/// then twice as long (exponential back-off, as in TCP's RTO, RFC 6298 section 5.5).
const RELAPSE_WITHIN: Nanos = Nanos::from_secs(60);

/// Greatest hold.
const HOLD_MAX: Nanos = Nanos::from_secs(640);

/// A victim's memory of steps back that came too early.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    relaxed_at: Option<Nanos>,
    hold: Nanos,
    not_before: Nanos,
}

impl Backoff {
    /// Something was done for the victim.
    pub fn acted(&mut self, now: Nanos) {
        let relapse = self.relaxed_at.is_some_and(|at| now.since(at) < RELAPSE_WITHIN);
        self.hold = if relapse { Nanos((self.hold.0 * 2).clamp(HOLD.0, HOLD_MAX.0)) } else { HOLD };
        self.relaxed_at = None;
        self.not_before = Nanos(now.0 + self.hold.0);
    }

    /// Something done for the victim was given back a step.
    pub fn relaxed(&mut self, now: Nanos) {
        self.relaxed_at = Some(now);
    }

    fn left(&self, now: Nanos) -> Nanos {
        self.not_before.since(now)
    }
}

/// Whether a victim still needs what was done for it.
#[derive(Clone, Debug, PartialEq)]
pub enum Need {
    /// It is idle, or nothing is promised to it any more.
    Gone,
    /// It has not been measured for so long that nothing done for it can be defended.
    Blind {
        /// How long.
        blind_for: Nanos,
    },
    /// It is well, and the node has room.
    Less,
    /// It needs it, or may.
    Still(RelaxHold),
}

/// Whether `vm` needs what was done for it; `promised`: its class has an SLO.
pub fn need(vm: &VmState, promised: bool, now: Nanos, busy: Option<f64>, cpu: &CpuLoop) -> Need {
    if !promised {
        return Need::Gone;
    }
    if let Some(since) = vm.blind_since {
        let blind_for = now.since(since);
        return if blind_for >= cpu.blind_decay_after {
            Need::Blind { blind_for }
        } else {
            Need::Still(RelaxHold::Slack)
        };
    }
    if now.since(vm.known_at) > IDLE {
        // One that is only known while it suffers is not idle for long.
        return match vm.backoff.left(now) {
            Nanos(0) => Need::Gone,
            left => Need::Still(RelaxHold::Relapse { left }),
        };
    }
    if vm.trial.is_some() || !vm.history.confirmed_comfortable(cpu) {
        return Need::Still(RelaxHold::Slack);
    }
    if busy.is_none_or(|busy| busy >= cpu.relax_below_busy) {
        return Need::Still(RelaxHold::Busy { busy });
    }
    match vm.backoff.left(now) {
        Nanos(0) => Need::Less,
        left => Need::Still(RelaxHold::Relapse { left }),
    }
}

/// The reason to go a step back, as long as the need allows.
pub fn reason(need: &Need, original: Weight, busy: Option<f64>) -> Option<Reason> {
    match *need {
        Need::Gone => Some(Reason::NoLongerNeeded { original }),
        Need::Blind { blind_for } => Some(Reason::BlindDecay { original, blind_for }),
        Need::Less => Some(Reason::Relaxing { original, busy }),
        Need::Still(_) => None,
    }
}

/// One step from `from` towards `original`, all the way where less than another step would
/// be left.
pub fn step_back(from: Weight, original: Weight, step: u32) -> Weight {
    let (from, goal) = (from.get(), original.get());
    if from.abs_diff(goal) < 2 * step {
        original
    } else if from < goal {
        Weight::clamped(u64::from(from + step))
    } else {
        Weight::clamped(u64::from(from - step))
    }
}
