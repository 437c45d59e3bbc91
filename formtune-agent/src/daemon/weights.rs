//! The weight of each VM as last read. Reading is a system call or three per VM, so those
//! that run are read once per second and those that sleep rarely: a sleeping VM's weight
//! matters to nobody.

use crate::act::Act;
use crate::vm::Vm;
use formtune_core::plan::{Outcome, OutcomeResult};
use formtune_core::units::{Nanos, VmId, Weight};
use std::collections::BTreeMap;

const ACTIVE_EVERY: Nanos = Nanos::from_secs(1);
const IDLE_EVERY: Nanos = Nanos::from_secs(30);

#[derive(Debug, Default)]
pub(super) struct Weights {
    now: Nanos,
    vms: BTreeMap<VmId, Known>,
}

#[derive(Debug)]
struct Known {
    read_at: Nanos,
    weight: Option<Weight>,
    /// As first read; outlives a failed reading.
    original: Option<Weight>,
    /// A failure is said once.
    failed: bool,
}

impl Weights {
    /// A new tick.
    pub fn begin(&mut self, now: Nanos) {
        self.now = now;
    }

    /// The weight of a VM, at most a second old while it runs, and as first read.
    pub fn get(&mut self, act: &Act, vm: &Vm, active: bool) -> (Option<Weight>, Option<Weight>) {
        let every = if active { ACTIVE_EVERY } else { IDLE_EVERY };
        if let Some(known) = self.vms.get(&vm.id)
            && self.now.since(known.read_at) < every
        {
            return (known.weight, known.original);
        }
        let read = act.read_weight(vm);
        let known = self.vms.entry(vm.id.clone()).or_insert(Known {
            read_at: self.now,
            weight: None,
            original: None,
            failed: false,
        });
        known.read_at = self.now;
        match read {
            Ok(weight) => {
                known.weight = Some(weight);
                known.original.get_or_insert(weight);
                known.failed = false;
            }
            Err(error) => {
                known.weight = None;
                if !std::mem::replace(&mut known.failed, true) {
                    tracing::debug!("{error}");
                }
            }
        }
        (known.weight, known.original)
    }

    /// The weight as first read.
    pub fn original(&self, vm: &VmId) -> Option<Weight> {
        self.vms.get(vm)?.original
    }

    /// As last read, for a snapshot.
    pub fn last(&self, vm: &VmId) -> Option<Weight> {
        self.vms.get(vm)?.weight
    }

    /// What a setpoint left behind need not be read again; a value that was refused or
    /// somebody else's is.
    pub fn outcome(&mut self, outcome: &Outcome) {
        let Some(known) = self.vms.get_mut(&outcome.vm) else { return };
        match outcome.result {
            OutcomeResult::Applied { value } | OutcomeResult::Clamped { value } => {
                known.weight = Some(value);
                known.read_at = self.now;
            }
            OutcomeResult::Yielded { found } => known.weight = Some(found),
            OutcomeResult::Unchanged => known.weight = Some(outcome.asked),
            OutcomeResult::Refused { .. } => known.read_at = Nanos(0),
        }
    }

    pub fn forget(&mut self, vm: &VmId) {
        self.vms.remove(vm);
    }
}
