//! Who held the CPUs during each VM's long waits: of the last seconds for people, since it
//! was first seen for metrics. VMs that do not wait cost nothing.

use super::recent::SPAN;
use formtune_core::sample::HeldInterval;
use formtune_core::units::{Nanos, VmId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Culprits named per VM; the rest is summed up.
pub const NAMED: usize = 3;
/// Intervals are added up to slots of this length.
const SLOT: Nanos = Nanos::from_secs(1);

/// Somebody who held a CPU.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", content = "name", rename_all = "snake_case")]
pub enum Holder {
    /// Another VM.
    Vm(VmId),
    /// The waiting VM itself: it has more runnable threads than CPUs.
    Itself,
    /// Tasks that are no VM's.
    Host,
    /// Nobody: the CPU was idle.
    Idle,
    /// Nobody knows.
    Unknown,
}

impl Holder {
    /// Kind and name, for labels.
    pub fn labels(&self) -> (&'static str, &str) {
        match self {
            Self::Vm(vm) => ("vm", &vm.0),
            Self::Itself => ("itself", ""),
            Self::Host => ("host", ""),
            Self::Idle => ("idle", ""),
            Self::Unknown => ("unknown", ""),
        }
    }
}

/// Time of long waits during which somebody held the CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Who.
    pub holder: Holder,
    /// For how long.
    pub time: Nanos,
}

/// Long waits of one VM, by who held the CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blamed {
    /// All of them.
    pub total: Nanos,
    /// The [`NAMED`] who held it longest, longest first.
    pub top: Vec<Held>,
}

impl Blamed {
    fn of(vm: &VmId, held: &HeldInterval) -> Self {
        let who = |id: &VmId| if id == vm { Holder::Itself } else { Holder::Vm(id.clone()) };
        let mut top: Vec<Held> = held
            .by_vm
            .iter()
            .map(|(id, ns)| (who(id), *ns))
            .chain([
                (Holder::Host, held.by_host_ns),
                (Holder::Idle, held.idle_ns),
                (Holder::Unknown, held.unknown_ns),
            ])
            .filter(|(_, ns)| *ns > 0)
            .map(|(holder, ns)| Held { holder, time: Nanos(ns) })
            .collect();
        top.sort_by(|a, b| b.time.cmp(&a.time).then_with(|| a.holder.cmp(&b.holder)));
        top.truncate(NAMED);
        Self { total: Nanos(held.total_ns()), top }
    }

    /// Share of all long waits, 0 to 1.
    pub fn share(&self, held: &Held) -> f64 {
        held.time.0 as f64 / self.total.0.max(1) as f64
    }
}

/// The long waits of every VM that had some.
#[derive(Debug, Default)]
pub struct Culprits {
    vms: BTreeMap<VmId, Waited>,
}

#[derive(Debug, Default)]
struct Waited {
    slots: VecDeque<(Nanos, HeldInterval)>,
    total: HeldInterval,
}

impl Culprits {
    /// Adds what ended between the last sample and `now`.
    pub fn add(&mut self, vm: &VmId, now: Nanos, held: &HeldInterval) {
        if held.total_ns() == 0 {
            return;
        }
        if !self.vms.contains_key(vm) {
            self.vms.insert(vm.clone(), Waited::default());
        }
        let waited = self.vms.get_mut(vm).expect("inserted above");
        waited.total.add(held);
        while waited.slots.front().is_some_and(|(began, _)| now.since(*began) >= SPAN) {
            waited.slots.pop_front();
        }
        match waited.slots.back_mut() {
            Some((began, slot)) if now.since(*began) < SLOT => slot.add(held),
            _ => waited.slots.push_back((now, held.clone())),
        }
    }

    /// Drops a VM that is gone, also as a culprit: its name may come to mean another one.
    pub fn forget(&mut self, vm: &VmId) {
        self.vms.remove(vm);
        for waited in self.vms.values_mut() {
            let slots = waited.slots.iter_mut().map(|(_, held)| held);
            for held in slots.chain([&mut waited.total]) {
                if let Some(ns) = held.by_vm.remove(vm) {
                    held.unknown_ns = held.unknown_ns.saturating_add(ns);
                }
            }
        }
    }

    /// Of the last [`SPAN`]; empty for a VM that did not wait long.
    pub fn recent(&self, vm: &VmId, now: Nanos) -> Blamed {
        let mut sum = HeldInterval::default();
        let slots = self.vms.get(vm).into_iter().flat_map(|waited| &waited.slots);
        slots.filter(|(began, _)| now.since(*began) < SPAN).for_each(|(_, held)| sum.add(held));
        Blamed::of(vm, &sum)
    }

    /// Since the VM was first seen.
    pub fn total(&self, vm: &VmId) -> Blamed {
        self.vms.get(vm).map(|waited| Blamed::of(vm, &waited.total)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(by_vm: &[(&str, u64)], by_host_ns: u64) -> HeldInterval {
        let by_vm = by_vm.iter().map(|(vm, ns)| (VmId::from(*vm), *ns)).collect();
        HeldInterval { by_vm, by_host_ns, ..HeldInterval::default() }
    }

    #[test]
    fn the_worst_are_named_and_the_gone_are_not() {
        let vm = VmId::from("web");
        let mut culprits = Culprits::default();
        let second = |n: u64| Nanos::from_secs(n);
        culprits.add(&vm, second(1), &held(&[("old", 500)], 0));
        let now = held(&[("a", 10), ("b", 40), ("web", 30), ("c", 5)], 15);
        culprits.add(&vm, second(12), &now);
        let recent = culprits.recent(&vm, second(12));
        let names: Vec<_> = recent.top.iter().map(|held| held.holder.labels()).collect();
        assert_eq!(names, [("vm", "b"), ("itself", ""), ("host", "")]);
        assert_eq!((recent.total, recent.share(&recent.top[0])), (Nanos(100), 0.4));
        let first = |culprits: &Culprits| culprits.total(&vm).top[0].holder.clone();
        assert_eq!(first(&culprits), Holder::Vm("old".into()));
        culprits.forget(&"old".into());
        assert_eq!(first(&culprits), Holder::Unknown);
        assert_eq!(culprits.total(&vm).total, Nanos(600));
        let idle = HeldInterval { idle_ns: 1_000, by_host_ns: 1, ..HeldInterval::default() };
        culprits.add(&vm, second(13), &idle);
        assert_eq!(first(&culprits).labels(), ("idle", ""));
        culprits.forget(&vm);
        assert_eq!(culprits.total(&vm), Blamed::default());
        assert!(culprits.vms.is_empty());
    }
}
