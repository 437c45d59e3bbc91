//! The CPU loop: weights go up for those who wait and down for those who make them wait.

use super::blame::{AT_ONCE, Blame, Claim, MOST, Polluter};
use super::knob::{Revert, step_size, worthwhile};
use super::relax::{self, Need};
use super::verdict::breach;
use super::verify::{Progress, Trial};
use crate::estimate::rounded;
use crate::plan::{Action, Culprit, Knob, Reason, Setpoint};
use crate::policy::{CpuLoop, Mode, Policy, Priority, Slo};
use crate::sample::{HeldInterval, Sample};
use crate::state::State;
use crate::step::View;
use crate::units::{Nanos, VmId, Weight};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// Most victims served in one step, the most important and the worst first; the others have
/// their turn at the next tick. Bounds a step on a node where everybody suffers.
const VICTIMS_AT_ONCE: usize = 32;

/// Most victims noted at one culprit. Should they all go, so does the reason to keep it low.
const NOTED_VICTIMS: usize = 8;

/// Most bars kept per victim; beyond, the oldest goes.
const BARRED: usize = 4 * AT_ONCE;

/// Usage is a rate over two readings about a second apart; until the first can be there,
/// "nobody's usage is known" is no reason to hold everybody guilty.
const USAGE_SETTLES: Nanos = Nanos::from_secs(3);

/// What all parts of one decision share.
struct Cpu<'s, 'v, 'p> {
    state: &'s mut State,
    views: &'v mut [View<'p>],
    policy: &'p Policy,
    cpu: &'p CpuLoop,
    seq: u64,
    now: Nanos,
    cpus: u32,
    /// Share of the node's CPUs in use.
    busy: Option<f64>,
    setpoints: Vec<Setpoint>,
}

/// Decides for all VMs: answers go into `views`, writes are returned.
pub fn decide<'p>(
    state: &mut State,
    policy: &'p Policy,
    sample: &Sample,
    views: &mut [View<'p>],
) -> Vec<Setpoint> {
    let cpus = sample.host.cpus.max(1);
    let busy = state.busy.get().map(|busy| rounded((busy / f64::from(cpus)).clamp(0.0, 1.0)));
    let mut cpu = Cpu {
        views,
        policy,
        cpu: &policy.cpu,
        seq: sample.seq,
        now: sample.at,
        cpus,
        busy,
        setpoints: Vec::new(),
        state,
    };
    match &sample.host.blind {
        Some(cause) => cpu.blind(cause),
        None => {
            cpu.judge_trials();
            cpu.take_back();
            cpu.serve_victims();
            cpu.give_back();
        }
    }
    cpu.setpoints
}

impl Cpu<'_, '_, '_> {
    /// Blind: hold, and after a while go back to the originals.
    fn blind(&mut self, cause: &str) {
        let blind_for = self.now.since(self.state.blind_since.unwrap_or(self.now));
        for index in 0..self.state.vms.len() {
            self.state.vms[index].knob.revert = None;
            if blind_for >= self.cpu.blind_decay_after && self.state.vms[index].knob.is_changed() {
                self.relax(index, Need::Blind { blind_for });
            }
            let reason = Reason::Blind { cause: cause.into(), blind_for };
            self.views[index].answer.get_or_insert((Action::Hold, reason));
        }
    }

    /// Looks whether changes helped; those that did not are marked to be taken back.
    fn judge_trials(&mut self) {
        for index in 0..self.state.vms.len() {
            if !self.views[index].eventful {
                continue;
            }
            let Some(mut trial) = self.state.vms[index].trial.take() else { continue };
            let Some(slo) = self.views[index].class.and_then(|class| class.slo.as_ref()) else {
                continue;
            };
            let good = Nanos((slo.threshold.0 as f64 * (1.0 - self.cpu.slack_act)).max(0.0) as u64);
            let measured = self.views[index].verdict.measured();
            let tick = self.policy.tick;
            match trial.progress(self.now, tick, slo.window, measured, good, self.cpu) {
                Progress::Waiting => self.state.vms[index].trial = Some(trial),
                Progress::Unknown => {}
                Progress::Helped { before, after } => {
                    self.answer(index, Action::Hold, Reason::Helped { before, after });
                }
                Progress::Failed { before, after } => {
                    self.mark_reverts(index, &trial, before, after);
                }
            }
        }
    }

    /// Marks the trial's changes that still stand, and that serve nobody else, to be taken
    /// back, and bars their repetition.
    fn mark_reverts(&mut self, victim: usize, trial: &Trial, before: Nanos, after: Nanos) {
        let (now, until) = (self.now, Nanos(self.now.0 + self.cpu.bar.0));
        let victim_id = self.state.vms[victim].id.clone();
        self.state.vms[victim].barred.retain(|(_, until)| *until > now);
        for (id, from) in &trial.changes {
            let Some(index) = self.state.find(id) else { continue };
            let vm = &mut self.state.vms[index];
            vm.lowered_for.retain(|other| *other != victim_id);
            let stands =
                vm.knob.changed_at() == Some(trial.started()) && vm.knob.expected() != Some(*from);
            if stands && vm.lowered_for.is_empty() {
                let revert = Revert { to: *from, victim: victim_id.clone(), before, after };
                vm.knob.revert = Some(Box::new(revert));
                let barred = &mut self.state.vms[victim].barred;
                if barred.len() >= BARRED {
                    barred.remove(0);
                }
                barred.push((id.clone(), until));
            }
        }
    }

    /// Takes back what did not help, as soon as the knob may move.
    fn take_back(&mut self) {
        for index in 0..self.state.vms.len() {
            if !self.views[index].eventful {
                continue;
            }
            let knob = &mut self.state.vms[index].knob;
            let Some(revert) = knob.revert.take() else { continue };
            let Some(from) = knob.expected().filter(|from| *from != revert.to) else { continue };
            if let Some(obstacle) = knob.obstacle(self.now, self.cpu) {
                if !knob.is_yielded() {
                    knob.revert = Some(revert);
                }
                self.answer(index, Action::Hold, obstacle);
                continue;
            }
            let Revert { to, victim, before, after } = *revert;
            let reason = Reason::DidNotHelp { victim: victim.clone(), before, after };
            self.change(index, from, to, Some(victim), Action::Revert, reason);
        }
    }

    /// Acts for those whose promise is broken, the most important and the worst first.
    fn serve_victims(&mut self) {
        let mut victims: Vec<(Priority, f64, usize)> = Vec::new();
        for (index, (view, vm)) in self.views.iter().zip(&self.state.vms).enumerate() {
            if let (Some(slack), Some(class)) = (view.verdict.slack(), view.class)
                && slack < self.cpu.slack_act
                && view.answer.is_none()
                && class.slo.as_ref().is_some_and(|slo| vm.history.confirmed_bad(slo, self.cpu))
            {
                victims.push((class.priority, slack, index));
            }
        }
        if victims.is_empty() {
            return;
        }
        victims.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
        let claims = self.claims();
        let young = self.now.since(self.state.first_at.unwrap_or(self.now)) < USAGE_SETTLES;
        if young && claims.iter().all(|claim| claim.uses.is_none()) {
            for (_, _, index) in victims {
                self.answer(index, Action::Hold, Reason::UsageUnknown);
            }
            return;
        }
        let blame = Blame::new(self.cpus, &claims);
        let mut served = 0;
        for (_, slack, index) in victims {
            if self.views[index].answer.is_some() {
                continue; // lowered for the sake of somebody more important
            }
            if let Some(reason) = self.needs_nothing(index, &blame, &claims[index]) {
                self.answer(index, Action::Hold, reason);
            } else if served < VICTIMS_AT_ONCE {
                served += 1;
                self.serve(index, slack, &blame, &claims);
            }
        }
    }

    fn claims(&self) -> Vec<Claim> {
        let vms = self.views.iter().zip(&self.state.vms);
        vms.map(|(view, vm)| Claim {
            entitlement: view
                .class
                .and_then(|class| class.cpu_weight)
                .or(vm.knob.original())
                .unwrap_or(Weight::DEFAULT)
                .get()
                .into(),
            uses: view.uses,
            priority: view.class.map_or(Priority::default(), |class| class.priority),
        })
        .collect()
    }

    /// Why nothing is to be done for a victim, whatever its neighbours do.
    fn needs_nothing(&self, index: usize, blame: &Blame, claim: &Claim) -> Option<Reason> {
        let vm = &self.state.vms[index];
        if let Some(trial) = &vm.trial {
            let class = self.views[index].class?;
            let window = class.slo.as_ref()?.window;
            return Some(Reason::Verifying {
                left: trial.left(self.now, self.policy.tick, window, self.cpu),
            });
        }
        match vm.throttled.get() {
            Nanos(0) => {}
            throttled => return Some(Reason::Throttled { throttled }),
        }
        let held = vm.holders.sum();
        let share = |ns: fn(&HeldInterval, &VmId) -> u64| {
            let held = held.as_ref()?;
            Some(rounded(ns(held, &vm.id) as f64 / held.total_ns().max(1) as f64))
        };
        if let Some(share) = share(|held, _| held.idle_ns).filter(|share| *share >= MOST) {
            return Some(Reason::IdleCpu { share });
        }
        let own = share(|held, id| held.by_vm.get(id).copied().unwrap_or_default());
        if let Some(share) = own.filter(|share| *share >= MOST) {
            return Some(Reason::OwnVcpus { share });
        }
        if let Some(usage) = blame.own_fault(index, claim).filter(|_| own.is_none()) {
            return Some(Reason::OverEntitlement { usage });
        }
        let low = vm.knob.expected() < vm.knob.original();
        let victim = vm.lowered_for.first().filter(|_| low)?;
        Some(Reason::LoweredFor { victim: victim.clone() })
    }

    /// Lowers culprits and raises the victim, as far as their knobs may move.
    fn serve(&mut self, victim: usize, slack: f64, blame: &Blame, claims: &[Claim]) {
        let Some(slo) = self.views[victim].class.and_then(|class| class.slo.as_ref()) else {
            return;
        };
        let Some(measured) = self.views[victim].verdict.measured() else { return };
        let breach = breach(slo, measured, &self.state.vms[victim], self.cpu);
        let severe = slack < self.cpu.slack_severe;
        let (id, claim) = (self.state.vms[victim].id.clone(), &claims[victim]);

        let held = self.state.vms[victim].holders.sum();
        let mut polluters: Vec<Polluter> = match &held {
            Some(held) => blame.holders(victim, claims, held, |id| self.state.find(id)),
            None => Vec::new(),
        };
        // Where the CPU was the host's, for all the probe knows, those of a lower priority who
        // use it may still be asked: should they be innocent, the trial clears them.
        if polluters.is_empty() {
            let asked = |polluter: &&Polluter| held.is_none() || polluter.priority < claim.priority;
            polluters.extend(blame.polluters(victim, claim).filter(asked));
        }
        let culprits = self.culprits(victim, &id, slack, &polluters, claim.priority);
        if let Some(wait) = culprits.wait {
            return self.answer(victim, Action::Hold, wait);
        }
        let to_blame = culprits.any
            || (held.is_none()
                && blame.anybody_below(claim.priority)
                && self.busy.is_none_or(|busy| busy >= self.cpu.relax_below_busy));
        if !to_blame {
            let host = held.map(|held| held.by_host_ns as f64 / held.total_ns().max(1) as f64);
            let reason = match (culprits.barred, host) {
                (Some(left), _) => Reason::Barred { left },
                (None, Some(share)) if share >= MOST => Reason::HostTasks { share: rounded(share) },
                (None, _) => Reason::NoCulprit { busy: self.busy },
            };
            return self.answer(victim, Action::Hold, reason);
        }
        let raise = self.raised(victim, severe);
        let mut changes = Vec::new();
        let mut lowering = Vec::new();
        for (Polluter { index, usage, caused, .. }, to) in culprits.lower {
            let Some(from) = self.state.vms[index].knob.expected() else { continue };
            changes.push((self.state.vms[index].id.clone(), from));
            lowering.push(Culprit { vm: self.state.vms[index].id.clone(), usage, caused });
            let reason = Reason::Polluter { victim: id.clone(), breach, usage, caused };
            self.change(index, from, to, Some(id.clone()), Action::Lower, reason);
        }
        match raise {
            Ok((from, to)) => {
                changes.push((id.clone(), from));
                let reason = Reason::Victim { breach, to: Some(to), lowering };
                self.change(victim, from, to, Some(id), Action::Raise, reason);
            }
            Err(_) if !lowering.is_empty() => {
                let reason = Reason::Victim { breach, to: None, lowering };
                self.answer(victim, Action::Hold, reason);
            }
            Err(obstacle) => return self.answer(victim, Action::Hold, obstacle),
        }
        self.begin_trial(victim, slo, changes);
    }

    /// Who is lowered for a victim's sake, and to what: those of the lowest priority of whom
    /// at least one can be.
    fn culprits(
        &mut self,
        victim: usize,
        id: &VmId,
        slack: f64,
        polluters: &[Polluter],
        priority: Priority,
    ) -> Culprits {
        let mut found = Culprits { lower: Vec::new(), wait: None, barred: None, any: false };
        let mut group = None;
        for polluter in polluters {
            let moved = !found.lower.is_empty() || found.wait.is_some();
            if moved && group != Some(polluter.priority) || found.lower.len() >= AT_ONCE {
                break;
            }
            group = Some(polluter.priority);
            let vm = &self.state.vms[polluter.index];
            let Some(class) = self.views[polluter.index].class else { continue };
            let (Some(bounds), Some(from)) = (vm.knob.bounds(class), vm.knob.expected()) else {
                continue;
            };
            // Of equal rank and suffering itself: lowering one for the other goes in circles.
            let its_slack = self.views[polluter.index].verdict.slack();
            let suffers = its_slack.is_some_and(|slack| slack < self.cpu.slack_act);
            if suffers && polluter.priority == priority {
                continue;
            }
            if let Some(left) = self.state.vms[victim].barred(&vm.id, self.now) {
                found.barred = found.barred.max(Some(left));
                continue;
            }
            let vm = &mut self.state.vms[polluter.index];
            found.any = true;
            match vm.knob.obstacle(self.now, self.cpu) {
                None => {}
                Some(wait @ (Reason::Cooldown { .. } | Reason::AwaitingOutcome { .. })) => {
                    if self.policy.modes.cpu_weight == Mode::Enforce
                        && Some(from) < vm.knob.original()
                    {
                        note(&mut vm.lowered_for, id);
                    }
                    found.wait.get_or_insert(wait);
                    continue;
                }
                Some(_) => continue,
            }
            // A weight takes nothing from those who are alone, and the probe or the trial tells
            // who is not to blame: a lower priority gives way at once where a promise is broken.
            let at_once = if polluter.priority < priority { 0.0 } else { self.cpu.slack_severe };
            let to = if slack < at_once {
                bounds.floor
            } else {
                let step = step_size(from, from, 1.0 - self.cpu.lower_factor, self.cpu);
                Weight::clamped(u64::from(from.get().saturating_sub(step))).max(bounds.floor)
            };
            if to < from && worthwhile(from, to, self.cpu) {
                found.lower.push((*polluter, to));
            } else if Some(from) < vm.knob.original() {
                // Already as low as may be: keep it there for this victim too.
                note(&mut vm.lowered_for, id);
            }
        }
        if !found.lower.is_empty() {
            found.wait = None;
        }
        found
    }

    /// From where to where the victim's own weight goes, or why it does not.
    fn raised(&self, victim: usize, severe: bool) -> Result<(Weight, Weight), Reason> {
        let knob = &self.state.vms[victim].knob;
        if let Some(obstacle) = knob.obstacle(self.now, self.cpu) {
            return Err(obstacle);
        }
        let vm = &self.state.vms[victim];
        if let Some(left) = vm.barred(&vm.id, self.now) {
            return Err(Reason::Barred { left });
        }
        let bounds = self.views[victim].class.and_then(|class| knob.bounds(class));
        let (Some(bounds), Some(from)) = (bounds, knob.expected()) else {
            return Err(Reason::NoKnob);
        };
        let to = if severe {
            bounds.ceiling
        } else {
            let step = step_size(from, bounds.entitlement, self.cpu.raise_ratio, self.cpu);
            Weight::clamped(u64::from(from.get() + step)).min(bounds.ceiling)
        };
        if to > from && worthwhile(from, to, self.cpu) {
            Ok((from, to))
        } else {
            Err(Reason::AtBounds { floor: bounds.floor, ceiling: bounds.ceiling })
        }
    }

    fn begin_trial(&mut self, victim: usize, slo: &Slo, changes: Vec<(VmId, Weight)>) {
        if self.policy.modes.cpu_weight != Mode::Enforce {
            return;
        }
        let vm = &mut self.state.vms[victim];
        vm.backoff.acted(self.now);
        let mut recent = vm.recent;
        recent.sort_unstable();
        let trial = Trial::new(self.now, self.policy.tick, slo.window, recent[1], changes);
        vm.trial = Some(Box::new(trial));
    }

    /// Steps back where nobody needs the change any more.
    fn give_back(&mut self) {
        for index in 0..self.state.vms.len() {
            if self.views[index].answer.is_some() || !self.views[index].eventful {
                continue;
            }
            let knob = &self.state.vms[index].knob;
            let stuck = knob.stuck(self.now);
            let needed = if knob.is_changed() { self.still_needed(index) } else { Err(None) };
            match needed {
                Ok(need) => self.relax(index, need),
                Err(why) => {
                    if let Some(reason) = stuck.or(why) {
                        self.answer(index, Action::Hold, reason);
                    }
                }
            }
        }
    }

    /// Why a change may be given back; or that it may not, and what there is to say of that.
    fn still_needed(&self, index: usize) -> Result<Need, Option<Reason>> {
        let vm = &self.state.vms[index];
        if vm.knob.expected() > vm.knob.original() {
            return match self.need(index) {
                Need::Still(hold) => {
                    // A VM that suffers says so itself; that tells more.
                    let slack = self.views[index].verdict.slack();
                    let well = slack.is_none_or(|slack| slack >= self.cpu.slack_act);
                    Err(well.then_some(Reason::RaisedFor { hold }))
                }
                need => Ok(need),
            };
        }
        // Lowered: the victim that needs it most decides.
        let mut least = Need::Gone;
        for id in &vm.lowered_for {
            let Some(victim) = self.state.find(id) else { continue };
            match self.need(victim) {
                Need::Still(_) => return Err(Some(Reason::LoweredFor { victim: id.clone() })),
                Need::Gone => {}
                need => least = need,
            }
        }
        Ok(least)
    }

    fn need(&self, index: usize) -> Need {
        let promised = self.views[index].class.is_some_and(|class| class.slo.is_some());
        relax::need(&self.state.vms[index], promised, self.now, self.busy, self.cpu)
    }

    /// One step back towards the original, if the knob may move.
    fn relax(&mut self, index: usize, need: Need) {
        let vm = &self.state.vms[index];
        let (Some(from), Some(original)) = (vm.knob.expected(), vm.knob.original()) else {
            return;
        };
        let Some(reason) = relax::reason(&need, original, self.busy) else { return };
        if let Some(obstacle) = vm.knob.obstacle_back(self.now, self.cpu) {
            return self.answer(index, Action::Hold, obstacle);
        }
        let bounds = self.views[index].class.and_then(|class| vm.knob.bounds(class));
        let entitlement = bounds.map_or(original, |bounds| bounds.entitlement);
        let step = step_size(from, entitlement, self.cpu.relax_ratio, self.cpu);
        let to = relax::step_back(from, original, step);
        let mut relaxed_for = if to == original {
            core::mem::take(&mut self.state.vms[index].lowered_for)
        } else {
            self.state.vms[index].lowered_for.clone()
        };
        relaxed_for.push(self.state.vms[index].id.clone());
        for id in relaxed_for {
            if let Some(victim) = self.state.find(&id) {
                self.state.vms[victim].backoff.relaxed(self.now);
            }
        }
        self.change(index, from, to, None, Action::Relax, reason);
    }

    /// Announces a write, and notes it at the knob.
    fn change(
        &mut self,
        index: usize,
        from: Weight,
        to: Weight,
        victim: Option<VmId>,
        action: Action,
        reason: Reason,
    ) {
        let mode = self.policy.modes.cpu_weight;
        let enforced = mode == Mode::Enforce;
        let vm = &mut self.state.vms[index];
        vm.knob.asked(self.now, self.seq, to, enforced, self.cpu);
        if let Some(victim) = victim.as_ref().filter(|_| enforced && action == Action::Lower) {
            note(&mut vm.lowered_for, victim);
        }
        self.setpoints.push(Setpoint {
            vm: vm.id.clone(),
            knob: Knob::CpuWeight,
            from,
            to,
            mode,
            victim,
            reason: reason.clone(),
        });
        self.answer(index, action, reason);
    }

    fn answer(&mut self, index: usize, action: Action, reason: Reason) {
        self.views[index].answer = Some((action, reason));
    }
}

/// See [`Cpu::culprits`].
struct Culprits {
    /// Who, and the new weight.
    lower: Vec<(Polluter, Weight)>,
    /// Why those who could be lowered cannot be just now.
    wait: Option<Reason>,
    /// Time left of the longest bar, where some were left out for one.
    barred: Option<Nanos>,
    /// Whether anybody is to blame at all.
    any: bool,
}

fn note(victims: &mut Vec<VmId>, victim: &VmId) {
    if victims.len() < NOTED_VICTIMS && !victims.contains(victim) {
        victims.push(victim.clone());
    }
}
