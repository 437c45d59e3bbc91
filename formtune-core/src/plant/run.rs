//! One scenario, lived through with the loop closed, and what became of it.

use super::{Event, Host, Scenario};
use crate::plan::{Plan, Reason};
use crate::policy::Mode;
use crate::sample::Sample;
use crate::units::{Nanos, VmId, Weight};
use crate::{State, step};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Everything that was sampled and planned.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// One per tick.
    pub samples: Vec<Sample>,
    /// One per sample.
    pub plans: Vec<Plan>,
    /// What became of it.
    pub report: Report,
}

/// Figures of one run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Writes asked for.
    pub setpoints: u32,
    /// Direction changes of the knob that had most.
    pub direction_changes: u32,
    /// Knobs that were frozen.
    pub frozen: u32,
    /// From the onset of the noise to the first setpoint.
    pub reaction: Option<Nanos>,
    /// From the onset of the noise until the first victim that broke its promise keeps it
    /// again, and does so for two seconds.
    pub recovery: Option<Nanos>,
    /// Windows of the victims while the neighbours were noisy, the first five seconds left
    /// out: those that broke the promise, and all.
    pub bad_windows: (u32, u32),
    /// Mean of the victims' p99 over those windows.
    pub mean_p99: Nanos,
    /// Knobs that are not back at their original at the end.
    pub left_changed: u32,
}

/// Lives through a scenario in a mode.
pub fn run(scenario: &Scenario, mode: Mode) -> Run {
    let mut policy = scenario.policy.clone();
    policy.modes.cpu_weight = mode;
    let mut host = scenario.host.clone();
    let mut state = State::default();
    let mut run = Run::default();
    let mut events = scenario.events.iter().peekable();
    let start = host.now;
    // Without the loop nothing is left to be seen once the noise is over.
    let length = if mode == Mode::Enforce { scenario.length } else { scenario.noisy.1 };
    while host.now.since(start) < length {
        while let Some(timed) = events.next_if(|timed| timed.at <= host.now.since(start)) {
            happen(&mut host, &timed.event);
        }
        let sample = host.tick(policy.tick);
        let plan = step(&mut state, &policy, &sample);
        host.act(&plan);
        run.samples.push(sample);
        run.plans.push(plan);
    }
    run.report = report(scenario, start, &run.plans);
    run.report.left_changed =
        host.vms.values().filter(|vm| vm.weight != vm.original).count() as u32;
    run
}

fn happen(host: &mut Host, event: &Event) {
    match event {
        Event::Start(id, vm) => {
            host.vms.insert(id.clone(), vm.clone());
        }
        Event::Stop(id) => {
            host.vms.remove(id);
        }
        Event::Load(id, load) => {
            if let Some(vm) = host.vms.get_mut(id) {
                vm.load = *load;
            }
        }
        Event::Foreign(id, weight) => {
            if let Some(vm) = host.vms.get_mut(id) {
                vm.weight = *weight;
            }
        }
        Event::Blind(cause) => host.blind = cause.clone(),
    }
}

fn report(scenario: &Scenario, start: Nanos, plans: &[Plan]) -> Report {
    let (from, to) = scenario.noisy;
    let mut report = Report::default();
    let mut last: BTreeMap<&VmId, (Weight, Option<bool>, u32)> = BTreeMap::new();
    let (mut sum, mut kept_since, mut broken) = (0_u64, None, false);
    for plan in plans {
        let at = plan.at.since(start);
        for setpoint in &plan.setpoints {
            report.setpoints += 1;
            if at >= from {
                report.reaction.get_or_insert(at.since(from));
            }
            let up = setpoint.to > setpoint.from;
            let entry = last.entry(&setpoint.vm).or_insert((setpoint.to, None, 0));
            if entry.1.replace(up).is_some_and(|before| before != up) {
                entry.2 += 1;
            }
        }
        let (mut bad, mut known) = (0, 0);
        for decision in &plan.decisions {
            if matches!(decision.reason, Reason::Frozen { .. }) {
                report.frozen += 1;
            }
            let evidence = &decision.evidence;
            if let (Some(measured), Some(target)) = (evidence.measured, evidence.target)
                && at >= from
                && at < to
                && scenario.victims.contains(&decision.vm)
            {
                known += 1;
                bad += u32::from(measured > target);
                if at.since(from) > Nanos::from_secs(5) {
                    report.bad_windows.0 += u32::from(measured > target);
                    report.bad_windows.1 += 1;
                    sum += measured.0;
                }
            }
        }
        if known > 0 && report.recovery.is_none() {
            broken |= bad > 0;
            if bad > 0 {
                kept_since = None;
            } else if broken {
                let since = *kept_since.get_or_insert(at);
                if at.since(since) >= Nanos::from_secs(2) {
                    report.recovery = Some(since.since(from));
                }
            }
        }
    }
    report.direction_changes = last.values().map(|(_, _, changes)| *changes).max().unwrap_or(0);
    report.mean_p99 = Nanos(sum / u64::from(report.bad_windows.1.max(1)));
    report
}
