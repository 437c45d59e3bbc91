//! Why something was done or not done, as data for machines and as a sentence for people.

use crate::units::{Nanos, VmId, Weight};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use serde::{Deserialize, Serialize};

/// Why something was done or not done. `Display` gives the sentence that logs,
/// `explain` and the page show; the serialised form is stable for machines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reason {
    // What was seen, and needs nothing done.
    /// The class promises nothing and nobody suffers from this VM.
    NoSlo,
    /// The promise is kept.
    WithinSlo(Breach),
    /// Slack between acting and relaxing: hold.
    LittleSlack(Breach),
    /// Bad, but not in enough windows yet.
    Unconfirmed {
        /// What was seen.
        #[serde(flatten)]
        breach: Breach,
        /// Bad windows needed.
        need: u8,
    },

    // What is done.
    /// A victim's weight goes up, or neighbours' go down for it, or both.
    Victim {
        /// What was seen.
        #[serde(flatten)]
        breach: Breach,
        /// Its own new weight; `None` where its own cannot go up (further).
        to: Option<Weight>,
        /// Who is lowered in the same step, most to blame first; empty where nobody can be.
        lowering: Vec<Culprit>,
    },
    /// A VM that uses more than its entitlement while a neighbour waits is lowered.
    Polluter {
        /// Who waits.
        victim: VmId,
        /// What was seen at the victim.
        #[serde(flatten)]
        breach: Breach,
        /// CPUs used and entitled to; `None` where nobody's usage is known.
        usage: Option<Usage>,
        /// Share of the victim's long waits for which it held the CPU, rounded to three
        /// decimals; `None` where nobody knows.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        caused: Option<f64>,
    },
    /// Step back towards the original: the victim has slack and the node has room.
    Relaxing {
        /// Where it goes in the end.
        original: Weight,
        /// Share of the node's CPUs in use, rounded to three decimals.
        busy: Option<f64>,
    },
    /// Step back towards the original: whoever it was done for is gone or idle.
    NoLongerNeeded {
        /// Where it goes in the end.
        original: Weight,
    },
    /// Step back towards the original: the probe has been blind for too long.
    BlindDecay {
        /// Where it goes in the end.
        original: Weight,
        /// How long it has been blind.
        blind_for: Nanos,
    },
    /// A change is taken back: it did not help the victim.
    DidNotHelp {
        /// For whose sake it was made.
        victim: VmId,
        /// The victim's indicator before the change.
        before: Nanos,
        /// And after.
        after: Nanos,
    },

    // What keeps it from being done.
    /// The knob's mode is `observe`: nothing is decided.
    Observing,
    /// The sample is not newer than the one before it.
    StaleSample,
    /// The probe's counts cannot be relied on.
    Blind {
        /// Why.
        cause: String,
        /// For how long already.
        blind_for: Nanos,
    },
    /// This VM is not measured (yet).
    NotMeasured,
    /// Too few waits in the window to say anything.
    TooFewSamples {
        /// Waits in the window.
        have: u64,
        /// Waits needed.
        need: u32,
    },
    /// The VM has no weight, or it cannot be read.
    NoKnob,
    /// The knob was changed a short while ago.
    Cooldown {
        /// Time left.
        left: Nanos,
    },
    /// A setpoint's outcome is still to come.
    AwaitingOutcome {
        /// The value asked for.
        asked: Weight,
    },
    /// The last change is being judged.
    Verifying {
        /// Time left.
        left: Nanos,
    },
    /// The last change helped, and is kept.
    Helped {
        /// The indicator before the change.
        before: Nanos,
        /// And after.
        after: Nanos,
    },
    /// A change for this victim did not help a while ago.
    Barred {
        /// Time left.
        left: Nanos,
    },
    /// The knob changed direction too often.
    Frozen {
        /// Direction changes that led to it.
        reversals: u8,
        /// Time left.
        left: Nanos,
    },
    /// Somebody else changed the knob: it is theirs.
    Yielded {
        /// The value they left.
        found: Weight,
    },
    /// The last write was refused.
    Refused {
        /// What the actuator said.
        cause: String,
        /// Time until the next try.
        left: Nanos,
    },
    /// The VM's own quota held it back within the window.
    Throttled {
        /// For how long, over the window.
        throttled: Nanos,
    },
    /// The VM asks for more than its entitlement gives, and nobody asks for more.
    OverEntitlement {
        /// CPUs used and entitled to.
        usage: Usage,
    },
    /// The VM waits for itself: its own vCPUs held the CPU.
    OwnVcpus {
        /// Share of its long waits, rounded to three decimals.
        share: f64,
    },
    /// Tasks of the host held the CPU, which no VM's weight changes.
    HostTasks {
        /// Share of its long waits, rounded to three decimals.
        share: f64,
    },
    /// The CPU was idle meanwhile: the VM was stopped, or it took long to wake it up. No
    /// neighbour's doing.
    IdleCpu {
        /// Share of its long waits, rounded to three decimals.
        share: f64,
    },
    /// The agent has only just begun to look: nobody's CPU usage is known yet.
    UsageUnknown,
    /// Nobody of the same or a lower priority uses more than its entitlement.
    NoCulprit {
        /// Share of the node's CPUs in use, rounded to three decimals.
        busy: Option<f64>,
    },
    /// All that may be done has been done.
    AtBounds {
        /// Bounds of the VM's own weight.
        floor: Weight,
        /// See `floor`.
        ceiling: Weight,
    },
    /// The weight is kept low for a neighbour's sake.
    LoweredFor {
        /// Who needs it.
        victim: VmId,
    },
    /// The weight is kept up because the VM still needs it.
    RaisedFor {
        /// Why it does not go back yet.
        hold: RelaxHold,
    },
}

/// Why a changed weight is not taken back yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "hold", rename_all = "snake_case")]
pub enum RelaxHold {
    /// The victim's slack is not (confirmed to be) large enough.
    Slack,
    /// The node is too busy.
    Busy {
        /// Share of the node's CPUs in use, rounded to three decimals; `None`: unknown,
        /// which is not taken for room.
        busy: Option<f64>,
    },
    /// The weight was needed again soon after an earlier step back: wait longer this time.
    Relapse {
        /// Time left.
        left: Nanos,
    },
}

/// What the windows said about an SLO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Breach {
    /// The SLO's quantile.
    #[serde(with = "quantile_permyriad")]
    pub quantile: Quantile,
    /// Its value in the last window.
    pub measured: Nanos,
    /// The threshold.
    pub target: Nanos,
    /// Bad windows among the last `of`.
    pub bad: u8,
    /// Windows looked back on.
    pub of: u8,
}

/// A quantile in hundredths of a per cent: `9900` is p99, `9990` is p99.9.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantile(pub u16);

impl Quantile {
    /// Of a share, `0 < q < 1`.
    pub fn from_share(q: f64) -> Self {
        Self(libm::round((q * 10_000.0).clamp(0.0, 10_000.0)) as u16)
    }
}

impl fmt::Display for Quantile {
    /// As people write it: `p99`, `p99.9`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 100, self.0 % 100);
        match rest {
            0 => write!(f, "p{whole}"),
            _ if rest % 10 == 0 => write!(f, "p{whole}.{}", rest / 10),
            _ => write!(f, "p{whole}.{rest:02}"),
        }
    }
}

mod quantile_permyriad {
    use super::Quantile;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(q: &Quantile, s: S) -> Result<S::Ok, S::Error> {
        (f64::from(q.0) / 10_000.0).serialize(s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Quantile, D::Error> {
        f64::deserialize(d).map(Quantile::from_share)
    }
}

/// CPUs used against CPUs entitled to, both rounded to three decimals.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// CPUs used lately.
    pub uses: f64,
    /// The entitlement's share of the node among the VMs that run at all.
    pub entitled: f64,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uses {:.2} CPUs, entitled to {:.2}", self.uses, self.entitled)
    }
}

/// Somebody who is lowered for a victim's sake.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Culprit {
    /// Who.
    pub vm: VmId,
    /// `None` where nobody's usage is known.
    pub usage: Option<Usage>,
    /// Share of the victim's long waits for which it held the CPU, rounded to three
    /// decimals; `None` where nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caused: Option<f64>,
}

/// A share as people read it.
struct Percent(f64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} %", self.0 * 100.0)
    }
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "run-queue {} {} against {}", self.quantile, self.measured, self.target)
    }
}

impl Breach {
    /// `… in 3 of 5 windows`, where there is more to say than the last one.
    fn in_windows(self) -> InWindows {
        InWindows(self)
    }
}

struct InWindows(Breach);

impl fmt::Display for InWindows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {} of {} windows", self.0, self.0.bad, self.0.of)
    }
}

/// Time left, as people read it: `2.1 s`, `8 min`.
struct Left(Nanos);

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.0.div_ceil(1_000_000_000) {
            0..100 => write!(f, "{:.1} s left", self.0.as_secs_f64()),
            s => write!(f, "{} min left", s.div_ceil(60)),
        }
    }
}

struct Busy(Option<f64>);

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(busy) => write!(f, "node {:.0} % busy", busy * 100.0),
            None => f.write_str("node's load unknown"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSlo => f.write_str("no SLO, and nobody suffers from it"),
            Self::WithinSlo(breach) => write!(f, "within its SLO: {breach}"),
            Self::LittleSlack(breach) => write!(f, "within its SLO, with little slack: {breach}"),
            Self::Unconfirmed { breach, need } => {
                write!(f, "{}; acting from {need} on", breach.in_windows())
            }
            Self::Victim { breach, to, lowering } => {
                write!(f, "{}", breach.in_windows())?;
                if let Some(to) = to {
                    write!(f, "; raising it to {to}")?;
                }
                for (i, culprit) in lowering.iter().enumerate() {
                    let glue = if i == 0 { "; lowering" } else { " and" };
                    write!(f, "{glue} {}", culprit.vm)?;
                    match (culprit.caused, culprit.usage) {
                        (Some(share), _) => {
                            write!(f, " (held the CPU for {} of its waits)", Percent(share))?;
                        }
                        (None, Some(usage)) => write!(f, " ({usage})")?,
                        (None, None) => {}
                    }
                }
                Ok(())
            }
            Self::Polluter { victim, breach, usage, caused } => {
                write!(f, "{victim} waits: {}; lowering this one", breach.in_windows())?;
                match (caused, usage) {
                    (Some(share), _) => {
                        write!(f, " (held the CPU for {} of those waits)", Percent(*share))
                    }
                    (None, Some(usage)) => write!(f, " ({usage})"),
                    (None, None) => f.write_str(" (nobody's CPU usage is known)"),
                }
            }
            Self::Relaxing { original, busy } => {
                write!(f, "slack again, {}; a step back towards {original}", Busy(*busy))
            }
            Self::NoLongerNeeded { original } => {
                write!(f, "no longer needed; a step back towards {original}")
            }
            Self::BlindDecay { original, blind_for } => {
                write!(f, "blind for {blind_for}; a step back towards {original}")
            }
            Self::DidNotHelp { victim, before, after } => {
                write!(f, "did not help {victim} ({before} before, {after} after); taking it back")
            }
            Self::Observing => f.write_str("observing only"),
            Self::StaleSample => f.write_str("the sample is not newer than the one before it"),
            Self::Blind { cause, blind_for } => {
                write!(f, "blind for {blind_for} ({cause}); holding")
            }
            Self::NotMeasured => f.write_str("not measured yet"),
            Self::TooFewSamples { have, need } => write!(f, "too few samples ({have} of {need})"),
            Self::NoKnob => f.write_str("it has no CPU weight that can be read"),
            Self::Cooldown { left } => write!(f, "cooldown, {}", Left(*left)),
            Self::AwaitingOutcome { asked } => write!(f, "waiting for {asked} to be written"),
            Self::Verifying { left } => {
                write!(f, "seeing whether the last change helps, {}", Left(*left))
            }
            Self::Helped { before, after } => {
                write!(f, "the last change helped ({before} before, {after} after); kept")
            }
            Self::Barred { left } => {
                write!(f, "barred: the last change for it did not help, {}", Left(*left))
            }
            Self::Frozen { reversals, left } => {
                write!(f, "frozen: its weight changed direction {reversals} times, {}", Left(*left))
            }
            Self::Yielded { found } => {
                write!(f, "somebody else set the weight to {found}: it is theirs")
            }
            Self::Refused { cause, left } => {
                write!(f, "the last write was refused ({cause}); next try: {}", Left(*left))
            }
            Self::Throttled { throttled } => {
                write!(f, "held back by its own quota for {throttled} of the window")
            }
            Self::OverEntitlement { usage } => {
                write!(f, "asks for more than anybody else ({usage}): its wait is its own")
            }
            Self::OwnVcpus { share } => {
                let share = Percent(*share);
                write!(f, "waits for itself: its own vCPUs held the CPU for {share} of its waits")
            }
            Self::HostTasks { share } => {
                write!(f, "tasks of the host held the CPU for {} of its waits", Percent(*share))
            }
            Self::IdleCpu { share } => {
                write!(
                    f,
                    "no neighbour's doing: the CPU was idle for {} of its waits",
                    Percent(*share)
                )
            }
            Self::UsageUnknown => {
                f.write_str("waiting for the first readings of who uses how much CPU")
            }
            Self::NoCulprit { busy } => {
                write!(f, "nobody uses more than it is entitled to ({})", Busy(*busy))
            }
            Self::AtBounds { floor, ceiling } => {
                write!(
                    f,
                    "all done that may be: its weight may move within {floor} to {ceiling}, and nobody can be lowered further"
                )
            }
            Self::LoweredFor { victim } => write!(f, "kept low for the sake of {victim}"),
            Self::RaisedFor { hold } => match hold {
                RelaxHold::Slack => f.write_str("kept up: too little slack yet to give it back"),
                RelaxHold::Busy { busy } => write!(f, "kept up: {}", Busy(*busy)),
                RelaxHold::Relapse { left } => {
                    write!(
                        f,
                        "kept up: it was needed again soon after the last step back, {}",
                        Left(*left)
                    )
                }
            },
        }
    }
}
