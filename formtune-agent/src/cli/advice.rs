//! What would change a VM's lot: one or more sentences per reason.

use super::style::latency;
use crate::export::snapshot::{Node, VmState};
use formtune_core::plan::Reason;
use formtune_core::policy::Mode;
use formtune_core::reason::RelaxHold;

/// What would change the last decision, the likeliest first; empty where all is well.
pub fn would_change(vm: &VmState, node: &Node) -> Vec<String> {
    let mut advice = Vec::new();
    if let (None, Some(why)) = (&node.probe.method, &node.probe.blind) {
        return vec![format!("Nothing is decided for anybody: {why}. See `formtune doctor`.")];
    }
    if let Some(why) = &node.enforce_blocked {
        advice.push(format!("Writing is held back on this node: {why}. See `formtune doctor`."));
    }
    match &vm.decision {
        None if node.modes.cpu_weight == Mode::Observe => advice.push(
            "Set `cpu_weight = \"shadow\"` (decide only) or `\"enforce\"` under [mode] to have \
             formtune decide."
                .into(),
        ),
        None => advice.push("Nothing yet: wait for its first window.".into()),
        Some(decision) => advice.extend(for_reason(vm, &decision.reason)),
    }
    if node.modes.cpu_weight == Mode::Shadow && vm.last_action.is_some() {
        advice.push(
            "Mode is shadow: decisions are announced, nothing is written. Set `cpu_weight = \
             \"enforce\"` under [mode] to have them carried out."
                .into(),
        );
    }
    advice
}

fn for_reason(vm: &VmState, reason: &Reason) -> Option<String> {
    let class = &vm.class;
    let text = match reason {
        Reason::WithinSlo(_) | Reason::LittleSlack(_) | Reason::StaleSample => return None,
        Reason::NoSlo if vm.slo.is_none() => format!(
            "Give its class a promise, [classes.{class}.slo], if it is to be protected. Its weight \
             goes down only while it makes a VM with a promise wait."
        ),
        Reason::NoSlo => return None,
        Reason::Unconfirmed { need, .. } => {
            format!(
                "It is acted upon as soon as {need} windows are bad; `confirm` under [cpu] sets that."
            )
        }
        Reason::Victim { .. } => {
            "The next windows tell whether this helps; if it does not, it is taken back.".into()
        }
        Reason::Polluter { victim, .. } | Reason::LoweredFor { victim } => format!(
            "It gets its weight back when {victim} has slack again, or when it uses less CPU. A \
             higher `priority` or `floor_ratio` of [classes.{class}] protects it more."
        ),
        Reason::Relaxing { original, .. } | Reason::NoLongerNeeded { original } => {
            format!("Its weight goes on towards {original} by itself.")
        }
        Reason::BlindDecay { .. } | Reason::Blind { .. } => {
            "Nothing is done for anybody while the probe is blind: see `formtune doctor`.".into()
        }
        Reason::DidNotHelp { .. } | Reason::Barred { .. } => {
            "Weights do not cure this wait. Look for another cause: the VM's own load, pinning, \
             interrupts, or too many VMs on the node; moving a VM away helps then."
                .into()
        }
        Reason::Observing => {
            "Set `cpu_weight = \"shadow\"` or `\"enforce\"` under [mode] to have formtune decide."
                .into()
        }
        Reason::NotMeasured => {
            "Wait a second; if it stays so, `formtune doctor` says what is missing.".into()
        }
        Reason::TooFewSamples { need, .. } => {
            let window = vm.slo.as_ref().map(|slo| slo.window);
            format!(
                "It is judged again once it waits {need} times in {}; an idle VM needs no help. \
                 `min_samples` of [classes.{class}.slo] sets that.",
                latency(window)
            )
        }
        Reason::NoKnob => "Its cgroup has no CPU weight: enable the cpu controller for it.".into(),
        Reason::Cooldown { .. }
        | Reason::AwaitingOutcome { .. }
        | Reason::Verifying { .. }
        | Reason::UsageUnknown => "Time: this ends by itself.".into(),
        Reason::Helped { .. } => "Nothing: it helped, and stays while it is needed.".into(),
        Reason::Frozen { .. } => {
            "It thaws by itself. Its load changes faster than weights can follow: a longer \
             `cooldown` under [cpu] or a laxer threshold calms it."
                .into()
        }
        Reason::Yielded { .. } => {
            "Whoever set it owns it now. To give it back: stop them from writing (see `formtune \
             doctor` for rivals), then restart the VM or formtune."
                .into()
        }
        Reason::Refused { .. } => "Remove the cause that is named; it is tried again.".into(),
        Reason::Throttled { .. } => {
            "Its own CPU quota stops it; no neighbour is to blame. Raise the quota (`virsh \
             schedinfo`: vcpu_quota, global_quota), or let it do less."
                .into()
        }
        Reason::IdleCpu { .. } => {
            "No neighbour is to blame. Look at its quota, and at what keeps an idle CPU from waking \
             up at once: deep sleep states (cpuidle), or a node that is itself a virtual machine."
                .into()
        }
        Reason::OverEntitlement { .. } => format!(
            "It waits for itself. Give it fewer busy vCPUs, a larger `cpu_weight` of \
             [classes.{class}], or a node with more room."
        ),
        Reason::NoCulprit { .. } => {
            "The node is short of CPU, or something outside of the VMs takes it; weights cannot \
             help. Move a VM away, or look for the host's own load."
                .into()
        }
        Reason::AtBounds { .. } => format!(
            "Move a VM away, or widen the bounds: `ceiling_ratio` of [classes.{class}], or \
             `floor_ratio` of its neighbours' classes."
        ),
        Reason::RaisedFor { hold } => match hold {
            RelaxHold::Slack => "It goes back when there is more slack.".into(),
            RelaxHold::Busy { .. } => {
                "It goes back when the node is less busy (`relax_below_busy` under [cpu]).".into()
            }
            RelaxHold::Relapse { .. } => {
                "It goes back after this time, if it is still calm.".into()
            }
        },
        _ => return None,
    };
    Some(text)
}
