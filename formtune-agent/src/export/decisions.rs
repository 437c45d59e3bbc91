//! The last decisions, and how many there were of each kind.
//!
//! There is a decision per VM and tick, most of them to do nothing. The log keeps every
//! decision to do something, and of the others those that give a new reason, at most one
//! per VM and ten seconds: a thousand idle VMs must not push out the one that matters. That
//! somebody else turned a knob is entered at once, and once: it stays so.

use super::snapshot::{Change, Counters, DecisionCount, DecisionRecord, VmState, result_name};
use formtune_core::plan::{Action, Decision, Outcome, OutcomeResult, Plan, Reason};
use formtune_core::policy::Mode;
use formtune_core::units::{Nanos, VmId, Weight};
use std::collections::{BTreeMap, VecDeque};
use std::mem::{Discriminant, discriminant};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Decisions kept.
pub const CAPACITY: usize = 1_000;
/// Least time between two entries about one VM that say why nothing was done.
const HOLD_EVERY: Nanos = Nanos::from_secs(10);

/// The last [`CAPACITY`] decisions; owned by the daemon's loop.
#[derive(Debug, Default)]
pub struct DecisionLog {
    seq: u64,
    records: VecDeque<Arc<DecisionRecord>>,
    vms: BTreeMap<VmId, PerVm>,
    counters: Counters,
}

/// What is remembered of a VM.
#[derive(Debug, Default)]
struct PerVm {
    /// When something was last entered about it, and with which reason.
    entered: Option<(Nanos, Discriminant<Reason>)>,
    last_action: Option<Arc<DecisionRecord>>,
    /// Somebody else's value, once it was entered.
    yielded: Option<Weight>,
}

impl PerVm {
    fn is_news(&self, decision: &Decision, at: Nanos) -> bool {
        if let Reason::Yielded { found } = decision.reason {
            return self.yielded != Some(found);
        }
        decision.action != Action::Hold
            || self.entered.is_none_or(|(entered, why)| {
                why != discriminant(&decision.reason) && at.since(entered) >= HOLD_EVERY
            })
    }
}

impl DecisionLog {
    /// Enters what is new in a plan; `mode` is that of the knob. Returns the entries made,
    /// so that the daemon logs the same ones.
    pub fn note(&mut self, plan: &Plan, mode: Mode, now: SystemTime) -> Vec<Arc<DecisionRecord>> {
        let unix_ms = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let mut entered = Vec::new();
        for decision in &plan.decisions {
            self.count(decision.action, mode);
            let vm = match self.vms.get_mut(&decision.vm) {
                Some(vm) => vm,
                None => self.vms.entry(decision.vm.clone()).or_default(),
            };
            if vm.is_news(decision, plan.at) {
                self.seq += 1;
                let record = Arc::new(record(self.seq, decision, plan, mode, unix_ms));
                vm.entered = Some((plan.at, discriminant(&decision.reason)));
                if let Reason::Yielded { found } = decision.reason {
                    vm.yielded = Some(found);
                }
                if decision.action != Action::Hold {
                    vm.last_action = Some(record.clone());
                }
                if self.records.len() == CAPACITY {
                    self.records.pop_front();
                }
                self.records.push_back(record.clone());
                entered.push(record);
            }
        }
        entered
    }

    /// Enters what became of a setpoint.
    pub fn outcome(&mut self, outcome: &Outcome) {
        *self.counters.outcomes.entry(result_name(&outcome.result).into()).or_default() += 1;
        if let OutcomeResult::Yielded { found } = outcome.result
            && let Some(vm) = self.vms.get_mut(&outcome.vm)
        {
            vm.yielded = Some(found);
        }
        let record = self.records.iter_mut().rev().find(|record| {
            record.plan_seq == outcome.plan_seq
                && record.vm == outcome.vm
                && record.change.is_some()
        });
        if let Some(record) = record {
            Arc::make_mut(record).outcome = Some(outcome.result.clone());
            let vm = self.vms.get_mut(&outcome.vm);
            if let Some(last) = vm.and_then(|vm| vm.last_action.as_mut())
                && last.seq == record.seq
            {
                *last = record.clone();
            }
        }
    }

    /// Sets a VM's last action.
    pub fn fill(&self, vm: &mut VmState) {
        if let Some(per_vm) = self.vms.get(&vm.id) {
            vm.last_action = per_vm.last_action.clone();
        }
    }

    /// Drops what is remembered of a VM that is gone; its entries stay.
    pub fn forget(&mut self, vm: &VmId) {
        self.vms.remove(vm);
    }

    /// The entries, oldest first.
    pub fn records(&self) -> Vec<Arc<DecisionRecord>> {
        self.records.iter().cloned().collect()
    }

    /// Counts since the start.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    fn count(&mut self, action: Action, mode: Mode) {
        let counts = &mut self.counters.decisions;
        match counts.iter_mut().find(|entry| entry.action == action && entry.mode == mode) {
            Some(entry) => entry.count += 1,
            None => counts.push(DecisionCount { action, mode, count: 1 }),
        }
    }
}

fn record(seq: u64, decision: &Decision, plan: &Plan, mode: Mode, unix_ms: u64) -> DecisionRecord {
    let setpoint = plan.setpoints.iter().find(|setpoint| setpoint.vm == decision.vm);
    DecisionRecord {
        seq,
        plan_seq: plan.seq,
        at: plan.at,
        unix_ms,
        vm: decision.vm.clone(),
        action: decision.action,
        mode: setpoint.map_or(mode, |setpoint| setpoint.mode),
        change: setpoint.map(|setpoint| Change { from: setpoint.from, to: setpoint.to }),
        victim: setpoint.and_then(|setpoint| setpoint.victim.clone()),
        evidence: decision.evidence.clone(),
        reason: decision.reason.clone(),
        sentence: decision.reason.to_string(),
        outcome: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use formtune_core::plan::{Evidence, Knob, Setpoint};

    fn plan(seq: u64, action: Action) -> Plan {
        let vm = VmId::from("web-1");
        let evidence = Evidence::default();
        let setpoint = Setpoint {
            vm: vm.clone(),
            knob: Knob::CpuWeight,
            from: Weight::DEFAULT,
            to: Weight::MAX,
            mode: Mode::Enforce,
            victim: None,
            reason: Reason::NoSlo,
        };
        Plan {
            seq,
            at: Nanos::from_millis(seq * 250),
            sampling_shift: None,
            setpoints: if action == Action::Hold { vec![] } else { vec![setpoint] },
            decisions: vec![Decision { vm, evidence, action, reason: Reason::NoSlo }],
        }
    }

    #[test]
    fn holding_for_the_same_reason_is_entered_once_and_counted_always() {
        let mut log = DecisionLog::default();
        for seq in 1..=100 {
            let entered = log.note(&plan(seq, Action::Hold), Mode::Shadow, UNIX_EPOCH);
            assert_eq!(entered.len(), usize::from(seq == 1));
        }
        assert_eq!(log.records().len(), 1);
        assert_eq!(log.counters().decisions[0].count, 100);
    }

    #[test]
    fn somebody_elses_value_is_entered_at_once_and_once() {
        let yielded = |seq, found: u32| {
            let mut plan = plan(seq, Action::Hold);
            let found = Weight::new(found).unwrap();
            plan.decisions[0].reason = Reason::Yielded { found };
            plan
        };
        let mut log = DecisionLog::default();
        let mut enter = |plan: Plan| log.note(&plan, Mode::Enforce, UNIX_EPOCH).len();
        assert_eq!(enter(plan(1, Action::Lower)), 1);
        assert_eq!(enter(yielded(2, 777)), 1, "not only after ten seconds");
        // Minutes later, and with other reasons in between.
        assert_eq!(enter(plan(400, Action::Hold)), 1);
        assert_eq!(enter(yielded(800, 777)), 0);
        assert_eq!(enter(yielded(1_200, 778)), 1, "another value is another matter");

        // One that an outcome has told of already.
        let mut log = DecisionLog::default();
        log.note(&plan(1, Action::Lower), Mode::Enforce, UNIX_EPOCH);
        let found = Weight::new(777).unwrap();
        log.outcome(&Outcome {
            plan_seq: 1,
            vm: VmId::from("web-1"),
            knob: Knob::CpuWeight,
            asked: Weight::MAX,
            result: OutcomeResult::Yielded { found },
        });
        assert!(log.note(&yielded(2, 777), Mode::Enforce, UNIX_EPOCH).is_empty());
    }

    #[test]
    fn the_ring_is_bounded_and_counts_on() {
        let mut log = DecisionLog::default();
        for seq in 1..=CAPACITY as u64 + 10 {
            log.note(&plan(seq, Action::Raise), Mode::Enforce, UNIX_EPOCH);
        }
        let records = log.records();
        assert_eq!((records.len(), records[0].seq), (CAPACITY, 11));
    }

    #[test]
    fn an_outcome_finds_its_decision_and_the_vm_its_last_action() {
        let mut log = DecisionLog::default();
        log.note(&plan(1, Action::Raise), Mode::Enforce, UNIX_EPOCH);
        log.note(&plan(2, Action::Raise), Mode::Enforce, UNIX_EPOCH);
        let vm = VmId::from("web-1");
        let result = OutcomeResult::Yielded { found: Weight::MIN };
        let outcome = |plan_seq| Outcome {
            plan_seq,
            vm: vm.clone(),
            knob: Knob::CpuWeight,
            asked: Weight::MAX,
            result: result.clone(),
        };
        log.outcome(&outcome(1));
        assert_eq!(log.records()[0].outcome, Some(result.clone()));
        assert_eq!(log.records()[1].outcome, None);
        assert_eq!(log.vms[&vm].last_action.as_ref().unwrap().outcome, None);
        log.outcome(&outcome(2));
        assert_eq!(log.vms[&vm].last_action.as_ref().unwrap().outcome, Some(result.clone()));
        assert_eq!(log.counters().outcomes["yielded"], 2);
        log.forget(&vm);
        assert!(log.vms.is_empty());
    }
}
