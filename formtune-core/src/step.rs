//! The only way from a [`Sample`] to a [`Plan`].

use crate::decide::cpu;
use crate::decide::verdict::{self, Verdict};
use crate::estimate::rounded;
use crate::plan::{Action, Decision, Evidence, Plan, Reason};
use crate::policy::{Class, Mode, Policy};
use crate::sample::{Sample, VmSample};
use crate::state::{State, VmState};
use crate::units::{ClassName, Nanos};
use alloc::vec::Vec;
use formtune_common::sampling::MAX_SHIFT;

/// Window over which a VM that is promised nothing is counted.
const WINDOW_WITHOUT_SLO: Nanos = Nanos::from_secs(1);

/// One VM in one step.
pub(crate) struct View<'a> {
    pub class: Option<&'a Class>,
    pub verdict: Verdict,
    pub answer: Option<(Action, Reason)>,
    /// CPUs used lately.
    pub uses: Option<f64>,
    /// The knob was moved, is stuck or is being judged: more to see to than the window. Most
    /// VMs have none of that, and their state need not be looked at again.
    pub eventful: bool,
}

/// Takes one reading of the node and says what is to be done, and why.
///
/// Depends on nothing but its arguments. Samples must come in the order of `at`; one that is
/// not newer than the last changes nothing except that its outcomes are noted.
pub fn step(state: &mut State, policy: &Policy, sample: &Sample) -> Plan {
    for outcome in &sample.outcomes {
        if let Some(index) = state.find(&outcome.vm) {
            state.vms[index].knob.outcome(outcome);
        }
    }
    let stale = state.last_at.is_some_and(|last| sample.at <= last);
    if stale {
        return hold_all(sample, &Reason::StaleSample);
    }
    state.first_at.get_or_insert(sample.at);
    state.last_at = Some(sample.at);
    state.join(sample);
    let mut views = estimate(state, policy, sample);
    let setpoints = match policy.modes.cpu_weight {
        Mode::Observe => {
            for view in &mut views {
                view.answer = Some((Action::Hold, Reason::Observing));
            }
            Vec::new()
        }
        _ => cpu::decide(state, policy, sample, &mut views),
    };
    let decisions = sample
        .vms
        .values()
        .zip(&state.vms)
        .zip(views)
        .map(|((sample, vm), view)| {
            let evidence = evidence(&view, vm, sample, policy);
            let slo = view.class.and_then(|class| class.slo.as_ref());
            let (action, reason) = view.answer.unwrap_or_else(|| {
                (Action::Hold, verdict::reason(view.verdict, slo, vm, &policy.cpu))
            });
            Decision { vm: vm.id.clone(), evidence, action, reason }
        })
        .collect();
    let sampling_shift = sample
        .host
        .probe_cost
        .and_then(|cost| state.budget.step(sample.at, cost, policy.probe_budget, MAX_SHIFT as u8));
    Plan { seq: sample.seq, at: sample.at, setpoints, sampling_shift, decisions }
}

fn hold_all(sample: &Sample, reason: &Reason) -> Plan {
    let decisions = sample.vms.keys().map(|id| Decision {
        vm: id.clone(),
        evidence: Evidence::default(),
        action: Action::Hold,
        reason: reason.clone(),
    });
    let decisions = decisions.collect();
    Plan { seq: sample.seq, at: sample.at, setpoints: Vec::new(), sampling_shift: None, decisions }
}

/// Brings windows, rates and knobs up to date and judges each VM's window.
fn estimate<'a>(state: &mut State, policy: &'a Policy, sample: &Sample) -> Vec<View<'a>> {
    let (at, cpu) = (sample.at, &policy.cpu);
    state.busy.read(at, sample.host.cpu_busy_ns);
    let blind = sample.host.blind.is_some();
    let shift = u32::from(sample.host.sampling_shift).min(MAX_SHIFT);
    state.blind_since = blind.then(|| state.blind_since.unwrap_or(at));
    let mut classes = Classes { policy, last: None };
    let vms = sample.vms.values().zip(&mut state.vms);
    vms.map(|(reading, vm)| {
        let class = classes.find(&reading.class);
        let slo = class.and_then(|class| class.slo.as_ref());
        let window = slo.map_or(WINDOW_WITHOUT_SLO, |slo| slo.window);
        vm.usage.read(at, reading.cpu_usage_ns);
        vm.throttled.read(at, reading.throttled_ns, window);
        vm.knob.read(at, policy.tick, cpu.cooldown, reading);
        let runq = reading.runq.as_ref().filter(|_| !blind);
        let verdict = if let Some(interval) = runq {
            vm.blind_since = None;
            vm.window.push(at, interval, window, policy.tick);
            vm.holders.push(at, reading.held.as_ref(), window, policy.tick);
            slo.map_or(Verdict::NoSlo, |slo| Verdict::of(slo, &mut vm.window, shift))
        } else {
            vm.blind_since.get_or_insert(at);
            vm.window.clear();
            vm.holders.clear();
            vm.history.clear();
            vm.trial = None;
            // Blindness is not calm: what is not seen does not count as idle either.
            vm.known_at = at;
            Verdict::NotMeasured
        };
        if let Some(measured) = verdict.measured() {
            vm.known_at = at;
            vm.recent.rotate_left(1);
            vm.recent[2] = measured;
        }
        vm.history.push(verdict, cpu);
        let eventful = vm.trial.is_some() || vm.knob.is_eventful(at);
        View { class, verdict, answer: None, uses: vm.usage.get(), eventful }
    })
    .collect()
}

fn evidence(view: &View<'_>, vm: &VmState, sample: &VmSample, policy: &Policy) -> Evidence {
    Evidence {
        samples: vm.window.samples(),
        measured: view.verdict.measured(),
        target: view.class.and_then(|class| class.slo.as_ref()).map(|slo| slo.threshold),
        slack: view.verdict.slack().map(verdict::shown),
        bad_windows: vm.history.bad_windows(&policy.cpu),
        cpus_used: view.uses.map(rounded),
        cpu_weight: sample.cpu_weight,
    }
}

/// Finds classes by name; neighbours nearly always have the same one.
struct Classes<'a> {
    policy: &'a Policy,
    last: Option<(&'a ClassName, &'a Class)>,
}

impl<'a> Classes<'a> {
    /// The class, or the default class, or nothing where not even that exists.
    fn find(&mut self, name: &ClassName) -> Option<&'a Class> {
        if let Some((last, class)) = self.last
            && last == name
        {
            return Some(class);
        }
        let classes = &self.policy.classes;
        let found = classes
            .get_key_value(name)
            .or_else(|| classes.get_key_value(&self.policy.default_class))?;
        self.last = Some(found);
        Some(found.1)
    }
}
