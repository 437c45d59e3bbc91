//! One knob of one VM: what stands there, who owns it, and when it may move again.

use crate::plan::{Outcome, OutcomeResult, Reason};
use crate::policy::{Class, CpuLoop};
use crate::sample::VmSample;
use crate::units::{Nanos, VmId, Weight};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// Samples in a row that must show a foreign value before the knob is given up: one may
/// have been taken while a write was under way.
const FOREIGN_SAMPLES: u8 = 2;

/// A knob and its history.
#[derive(Clone, Debug, Default)]
pub struct KnobState {
    /// As first found.
    original: Option<Weight>,
    /// As it should stand now: the original, or what was last applied.
    expected: Option<Weight>,
    /// Before the last change: a reading that lags shows it, which is nobody's doing.
    previous: Option<Weight>,
    /// Whether the last sample could read it at all.
    readable: bool,
    foreign_samples: u8,
    yielded: Option<Weight>,
    pending: Option<Pending>,
    changed_at: Option<Nanos>,
    rising: Option<bool>,
    reversed_at: Vec<Nanos>,
    frozen: Option<Frozen>,
    refused: Option<Box<str>>,
    /// A change to be taken back as soon as the knob may move.
    pub revert: Option<Box<Revert>>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    seq: u64,
    to: Weight,
    since: Nanos,
}

#[derive(Clone, Copy, Debug)]
struct Frozen {
    until: Nanos,
    reversals: u8,
}

/// A change that did not help.
#[derive(Clone, Debug)]
pub struct Revert {
    /// Where the knob goes back to.
    pub to: Weight,
    /// For whose sake it had been changed.
    pub victim: VmId,
    /// The victim's indicator before the change.
    pub before: Nanos,
    /// And after.
    pub after: Nanos,
}

/// How far a weight may go. The original may be returned to even outside of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// What the class gives the VM.
    pub entitlement: Weight,
    /// Least weight.
    pub floor: Weight,
    /// Greatest weight.
    pub ceiling: Weight,
}

impl KnobState {
    /// Takes the knob's part of a sample.
    pub fn read(&mut self, at: Nanos, tick: Nanos, cooldown: Nanos, vm: &VmSample) {
        self.readable = vm.cpu_weight.is_some();
        let Some(found) = vm.cpu_weight else { return };
        self.original = vm.cpu_weight_original.or(self.original).or(Some(found));
        if let Some(pending) = self.pending {
            if pending.to == found {
                self.applied(found);
            } else if at.since(pending.since) > Nanos(cooldown.0.max(2 * tick.0)) {
                // The outcome got lost; believe what is there.
                self.pending = None;
                self.expected = Some(found);
            }
            return;
        }
        let expected = *self.expected.get_or_insert(found);
        if found == expected || Some(found) == self.previous {
            self.foreign_samples = 0;
        } else {
            self.foreign_samples = self.foreign_samples.saturating_add(1);
            if self.foreign_samples >= FOREIGN_SAMPLES {
                self.yielded.get_or_insert(found);
            }
        }
    }

    /// Takes what became of a setpoint.
    pub fn outcome(&mut self, outcome: &Outcome) {
        if let OutcomeResult::Yielded { found } = outcome.result {
            self.pending = None;
            self.revert = None;
            self.yielded.get_or_insert(found);
            return;
        }
        if self.pending.is_none_or(|pending| pending.seq != outcome.plan_seq) {
            return;
        }
        match &outcome.result {
            OutcomeResult::Applied { value } | OutcomeResult::Clamped { value } => {
                self.applied(*value);
            }
            OutcomeResult::Unchanged => self.applied(outcome.asked),
            OutcomeResult::Refused { why } => {
                self.pending = None;
                self.refused = Some(why.as_str().into());
            }
            OutcomeResult::Yielded { .. } => unreachable!("returned above"),
        }
    }

    /// Notes a setpoint that is about to be announced. `enforced`: it is also written, so
    /// its direction counts and its outcome is waited for.
    pub fn asked(&mut self, at: Nanos, seq: u64, to: Weight, enforced: bool, cpu: &CpuLoop) {
        self.changed_at = Some(at);
        self.refused = None;
        if !enforced {
            return;
        }
        self.pending = Some(Pending { seq, to, since: at });
        let rising = self.expected.is_some_and(|from| to > from);
        if self.rising.replace(rising).is_some_and(|before| before != rising) {
            self.reversed_at.retain(|reversed| at.since(*reversed) < cpu.reversal_window);
            self.reversed_at.push(at);
            if self.reversed_at.len() >= usize::from(cpu.reversals.max(1)) {
                let reversals = self.reversed_at.len() as u8;
                self.frozen = Some(Frozen { until: Nanos(at.0 + cpu.freeze.0), reversals });
                self.reversed_at.clear();
            }
        }
    }

    /// Why the knob will not move for long, if so: an operator should know, whether or not
    /// anything would be done.
    pub fn stuck(&self, now: Nanos) -> Option<Reason> {
        if let Some(found) = self.yielded {
            return Some(Reason::Yielded { found });
        }
        let frozen = self.frozen.filter(|frozen| now < frozen.until)?;
        Some(Reason::Frozen { reversals: frozen.reversals, left: frozen.until.since(now) })
    }

    /// Why the knob may not move at `now`, if so.
    pub fn obstacle(&self, now: Nanos, cpu: &CpuLoop) -> Option<Reason> {
        if let Some(stuck) = self.stuck(now) {
            return Some(stuck);
        }
        self.obstacle_back(now, cpu)
    }

    /// Why the knob may not even go back towards its original at `now`, if so. A frozen one
    /// may: going in that direction only, it comes to rest.
    pub fn obstacle_back(&self, now: Nanos, cpu: &CpuLoop) -> Option<Reason> {
        if let Some(found) = self.yielded {
            return Some(Reason::Yielded { found });
        }
        if !self.readable || self.expected.is_none() {
            return Some(Reason::NoKnob);
        }
        if let Some(pending) = self.pending {
            return Some(Reason::AwaitingOutcome { asked: pending.to });
        }
        let left = cpu.cooldown.since(now.since(self.changed_at?));
        if left.0 == 0 {
            return None;
        }
        Some(match &self.refused {
            Some(cause) => Reason::Refused { cause: (**cause).into(), left },
            None => Reason::Cooldown { left },
        })
    }

    /// Whether somebody else owns it now.
    pub fn is_yielded(&self) -> bool {
        self.yielded.is_some()
    }

    /// As it should stand.
    pub fn expected(&self) -> Option<Weight> {
        self.expected
    }

    /// As first found.
    pub fn original(&self) -> Option<Weight> {
        self.original
    }

    /// Whether formtune has moved it away from its original, and may move it back.
    pub fn is_changed(&self) -> bool {
        self.yielded.is_none() && self.expected != self.original
    }

    /// When it was last asked to change.
    pub fn changed_at(&self) -> Option<Nanos> {
        self.changed_at
    }

    /// Whether there is more to say of it than that it stands where it was found.
    pub fn is_eventful(&self, now: Nanos) -> bool {
        self.is_changed() || self.revert.is_some() || self.stuck(now).is_some()
    }

    /// Bounds that the class puts around the VM's entitlement; `None` without a knob.
    pub fn bounds(&self, class: &Class) -> Option<Bounds> {
        let entitlement = class.cpu_weight.or(self.original)?;
        Some(Bounds {
            entitlement,
            floor: entitlement.scaled(class.floor_ratio).min(entitlement),
            ceiling: entitlement.scaled(class.ceiling_ratio).max(entitlement),
        })
    }

    fn applied(&mut self, value: Weight) {
        self.pending = None;
        self.refused = None;
        self.foreign_samples = 0;
        self.previous = self.expected;
        self.expected = Some(value);
    }
}

/// Whether going from `from` to `to` is worth a write.
pub fn worthwhile(from: Weight, to: Weight, cpu: &CpuLoop) -> bool {
    let change = f64::from(from.get().abs_diff(to.get()));
    change > 0.0 && change >= cpu.min_change_ratio * f64::from(from.get())
}

/// A step of `ratio` of the entitlement, but never so small that it would be skipped.
pub fn step_size(from: Weight, entitlement: Weight, ratio: f64, cpu: &CpuLoop) -> u32 {
    let wanted = ratio * f64::from(entitlement.get());
    let least = cpu.min_change_ratio * f64::from(from.get());
    (libm::ceil(wanted.max(least).clamp(1.0, 10_000.0))) as u32
}
