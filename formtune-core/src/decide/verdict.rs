//! What a VM's last window says about its promise.

use crate::estimate::rounded;
use crate::estimate::window::Window;
use crate::plan::{Breach, Quantile, Reason};
use crate::policy::{CpuLoop, Slo};
use crate::state::VmState;
use crate::units::Nanos;

/// One window against one promise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// No reading of this VM in this sample.
    NotMeasured,
    /// Nothing is promised.
    NoSlo,
    /// Unknown, which is neither good nor bad.
    TooFew {
        /// Waits in the window.
        have: u64,
        /// Waits needed.
        need: u32,
    },
    /// Enough waits to tell.
    Known {
        /// The quantile.
        measured: Nanos,
        /// (target − measured) / target.
        slack: f64,
    },
}

/// The zones of the last windows, newest in bit 0; a window that is unknown is in none.
#[derive(Clone, Copy, Debug, Default)]
pub struct History {
    bad: u32,
    comfortable: u32,
}

impl Verdict {
    /// Judges a window against a promise.
    ///
    /// Too few waits are unknown, with one exception: if so many of them are late that the
    /// promise were broken even had the missing ones not waited at all, it is broken. A VM
    /// that is starved waits seldom and long.
    ///
    /// `shift`: each wait in the window was counted 2^shift times for others that were not
    /// looked at, which say nothing.
    pub fn of(slo: &Slo, window: &mut Window, shift: u32) -> Self {
        let (have, need) = (window.samples() >> shift, slo.min_samples.max(1));
        let broken = |measured: &Nanos| *measured > slo.threshold;
        let measured = if have >= u64::from(need) {
            window.quantile(slo.quantile)
        } else {
            window.quantile_among(slo.quantile, u64::from(need) << shift).filter(broken)
        };
        let Some(measured) = measured else { return Self::TooFew { have, need } };
        let target = (slo.threshold.0 as f64).max(1.0);
        Self::Known { measured, slack: (target - measured.0 as f64) / target }
    }

    /// Slack, where it is known.
    pub fn slack(self) -> Option<f64> {
        match self {
            Self::Known { slack, .. } => Some(slack),
            _ => None,
        }
    }

    /// The indicator, where it is known.
    pub fn measured(self) -> Option<Nanos> {
        match self {
            Self::Known { measured, .. } => Some(measured),
            _ => None,
        }
    }
}

impl History {
    /// Takes the next window.
    pub fn push(&mut self, verdict: Verdict, cpu: &CpuLoop) {
        let slack = verdict.slack();
        self.bad = self.bad << 1 | u32::from(slack.is_some_and(|s| s < cpu.slack_act));
        self.comfortable =
            self.comfortable << 1 | u32::from(slack.is_some_and(|s| s > cpu.slack_relax));
    }

    /// Forgets what was: after an action, or blindness, only new windows count.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Bad windows among the last `confirm_of`.
    pub fn bad_windows(self, cpu: &CpuLoop) -> u8 {
        (self.bad & mask(cpu)).count_ones() as u8
    }

    /// The last window was bad, and so many before it that it is no accident and more than
    /// the promise's `share` allows.
    pub fn confirmed_bad(self, slo: &Slo, cpu: &CpuLoop) -> bool {
        self.bad & 1 == 1 && self.bad_windows(cpu) >= needed(slo, cpu)
    }

    /// All of the last windows were comfortable.
    pub fn confirmed_comfortable(self, cpu: &CpuLoop) -> bool {
        self.comfortable & mask(cpu) == mask(cpu)
    }
}

/// Bad windows needed before acting: `confirm`, or more where `share` allows more to be bad.
pub fn needed(slo: &Slo, cpu: &CpuLoop) -> u8 {
    let of = windows(cpu);
    let allowed = libm::floor((1.0 - slo.share).clamp(0.0, 1.0) * f64::from(of)) as u8;
    cpu.confirm.max(allowed.saturating_add(1)).min(of)
}

/// Windows looked back on.
pub fn windows(cpu: &CpuLoop) -> u8 {
    cpu.confirm_of.clamp(1, 32)
}

fn mask(cpu: &CpuLoop) -> u32 {
    u32::MAX >> (32 - u32::from(windows(cpu)))
}

/// What was seen at a VM whose window is known.
pub fn breach(slo: &Slo, measured: Nanos, vm: &VmState, cpu: &CpuLoop) -> Breach {
    Breach {
        quantile: Quantile::from_share(slo.quantile),
        measured,
        target: slo.threshold,
        bad: vm.history.bad_windows(cpu),
        of: windows(cpu),
    }
}

/// The reason to do nothing that the verdict alone gives.
pub fn reason(verdict: Verdict, slo: Option<&Slo>, vm: &VmState, cpu: &CpuLoop) -> Reason {
    let (measured, slack, slo) = match (verdict, slo) {
        (Verdict::NotMeasured, _) => return Reason::NotMeasured,
        (Verdict::TooFew { have, need }, _) => return Reason::TooFewSamples { have, need },
        (Verdict::NoSlo, _) | (_, None) => return Reason::NoSlo,
        (Verdict::Known { measured, slack }, Some(slo)) => (measured, slack, slo),
    };
    let breach = breach(slo, measured, vm, cpu);
    if slack < cpu.slack_act {
        Reason::Unconfirmed { breach, need: needed(slo, cpu) }
    } else if slack > cpu.slack_relax {
        Reason::WithinSlo(breach)
    } else {
        Reason::LittleSlack(breach)
    }
}

/// Slack as evidence shows it.
pub fn shown(slack: f64) -> f64 {
    rounded(slack.clamp(-1e6, 1e6))
}
