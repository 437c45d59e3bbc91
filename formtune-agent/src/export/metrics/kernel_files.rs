//! What the kernel's files say: pressure, quota periods, memory events, and how far probe and
//! kernel agree.

use super::{Families, Labels, by_vm};
use crate::export::snapshot::{Node, VmState};
use crate::sense::{Pressure, Stall};
use std::fmt;

impl Families<'_> {
    /// Families from the kernel's files.
    pub(super) fn kernel_files(&mut self, node: &Node, vms: &[&VmState]) -> fmt::Result {
        let seconds = |stall: Stall| stall.total_us as f64 / 1e6;
        self.counter(
            "formtune_node_pressure_seconds_total",
            "Time that some or all (full) tasks of the node stalled for want of a resource",
            lines(&node.pressure).map(|(resource, kind, stall)| {
                ([("resource", resource), ("kind", kind)], stall.map(seconds))
            }),
        )?;
        self.counter(
            "formtune_vm_pressure_seconds_total",
            "Time that some or all (full) tasks of the VM stalled for want of a resource",
            vms.iter().flat_map(|vm| {
                lines(&vm.pressure).map(|(resource, kind, stall)| {
                    (with(vm, [("resource", resource), ("kind", kind)]), stall.map(seconds))
                })
            }),
        )?;
        self.counter(
            "formtune_vm_cpu_periods_total",
            "Periods of the VM's CPU quota in which it had something to run",
            vms.iter().map(|vm| (by_vm(vm), vm.quota_periods.map(|periods| periods.all as f64))),
        )?;
        self.counter(
            "formtune_vm_cpu_throttled_periods_total",
            "Of these, periods in which the quota was used up",
            vms.iter()
                .map(|vm| (by_vm(vm), vm.quota_periods.map(|periods| periods.throttled as f64))),
        )?;
        self.counter(
            "formtune_vm_memory_events_total",
            "How often the VM's memory limits were met, and processes ended for it",
            vms.iter().flat_map(|vm| {
                vm.memory_events.by_event().map(|(event, count)| {
                    ([("vm", vm.id.as_str()), ("event", event)], count.map(|count| count as f64))
                })
            }),
        )?;
        self.gauge(
            "formtune_vm_runqueue_divergence_ratio",
            "Waits counted by the probe against the kernel's run_delay of the same threads and \
             time: their difference as a share of the larger one, negative where the probe has less",
            vms.iter().map(|vm| (by_vm(vm), vm.runq_check.map(|check| check.divergence_ratio))),
        )
    }
}

/// Both lines of each resource.
fn lines(
    pressure: &Pressure,
) -> impl Iterator<Item = (&'static str, &'static str, Option<Stall>)> + use<> {
    pressure.by_resource().into_iter().flat_map(|(resource, stalls)| {
        let stalls = stalls.unwrap_or_default();
        [(resource, "some", stalls.some), (resource, "full", stalls.full)]
    })
}

fn with<'a>(vm: &'a VmState, [a, b]: Labels<'static, 2>) -> Labels<'a, 3> {
    [("vm", vm.id.as_str()), a, b]
}
