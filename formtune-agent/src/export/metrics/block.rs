//! Metrics of block I/O.

use super::Families;
use crate::export::block::{BlockDevice, BlockNode, Who};
use crate::export::snapshot::{Node, VmState};
use std::fmt;

/// Names that occupants other than VMs have in labels. A VM may be called like that; VMs are
/// told apart by the label `kind`.
const HOST: &str = "host";
const GONE: &str = "gone";
/// Occupants of a device that are named.
const OCCUPANTS: usize = 3;

impl Families<'_> {
    /// All of them.
    pub(super) fn block(&mut self, node: &Node, vms: &[&VmState]) -> fmt::Result {
        let Some(block) = &node.block else { return Ok(()) };
        let used: Vec<(&str, &BlockDevice)> = vms
            .iter()
            .filter_map(|vm| Some((vm.id.as_str(), vm.block.as_ref()?)))
            .flat_map(|(id, state)| state.devices.iter().map(move |device| (id, device)))
            .collect();
        self.counter(
            "formtune_vm_block_device_seconds_total",
            "Time the VM's requests spent in the device, summed over requests",
            used.iter().map(|&(vm, device)| {
                ([("vm", vm), ("device", device.device.as_str())], Some(in_device(device)))
            }),
        )?;
        self.gauge(
            "formtune_vm_block_occupant_ratio",
            "Who had requests in a device that the VM uses, as share of all in it over the last \
             10 s; the top three",
            used.iter().flat_map(|&(vm, device)| {
                device.occupants.iter().take(OCCUPANTS).map(move |occupant| {
                    let (kind, name) = match &occupant.who {
                        Who::Host => (HOST, HOST),
                        Who::Gone => (GONE, GONE),
                        Who::Vm(id) => ("vm", id.as_str()),
                    };
                    let device = device.device.as_str();
                    let labels =
                        [("vm", vm), ("device", device), ("kind", kind), ("occupant", name)];
                    (labels, Some(occupant.share))
                })
            }),
        )?;
        self.block_host(block)?;
        self.block_counters(block)
    }

    fn block_host(&mut self, block: &BlockNode) -> fmt::Result {
        self.histograms(
            "formtune_host_block_latency_seconds",
            "The same for block requests that are no VM's",
            |each| {
                for device in &block.host {
                    for (op, phase, counts) in device.phases() {
                        let device = device.device.as_str();
                        each(&[("device", device), ("op", op), ("phase", phase)], counts);
                    }
                }
            },
        )?;
        self.counter(
            "formtune_host_block_device_seconds_total",
            "Time of requests that are no VM's in the device, summed over requests",
            block
                .host
                .iter()
                .map(|device| ([("device", device.device.as_str())], Some(in_device(device)))),
        )
    }

    fn block_counters(&mut self, block: &BlockNode) -> fmt::Result {
        self.one(
            "formtune_block_up",
            "1 while block requests are measured, 0 where the kernel does not allow it",
            Some(f64::from(u8::from(block.method.is_some()))),
        )?;
        self.one(
            "formtune_block_unmeasured_vms",
            "VMs whose block I/O is charged to no cgroup of theirs",
            Some(block.unmeasured_vms as f64),
        )?;
        self.one(
            "formtune_block_unmeasured_cgroups",
            "cgroups of VMs that found no room in the probe's table",
            Some(block.unmeasured_cgroups as f64),
        )?;
        let help = "Rows of the probe: one for each VM (and the host), device and operation";
        self.one("formtune_block_rows", help, Some(block.rows as f64))?;
        let help = "Of these, how many are taken";
        self.one("formtune_block_rows_used", help, Some(block.rows_used as f64))?;
        let counters = &block.counters;
        self.counter(
            "formtune_block_unattributed_total",
            "Block requests that lead to no cgroup, and so count for the host",
            [("no_bio", counters.no_bio), ("no_cgroup", counters.no_cgroup)]
                .map(|(why, count)| ([("reason", why)], Some(count as f64))),
        )?;
        self.counter(
            "formtune_block_untimed_total",
            "Block requests whose time in a phase is not known",
            [("total", counters.no_queued), ("device", counters.no_issued)]
                .map(|(phase, count)| ([("phase", phase)], Some(count as f64))),
        )?;
        self.counter(
            "formtune_block_lost_total",
            "Block requests that are in no histogram: impossible times, no row free, of a disk that \
             is gone, of a cgroup that may be a VM's, not seen",
            [
                ("no_disk", Some(counters.no_disk)),
                ("discarded", Some(counters.discarded)),
                ("full", Some(counters.full)),
                ("unknown_cgroup", Some(counters.unknown_cgroup)),
                ("missed", counters.missed),
            ]
            .map(|(why, count)| ([("reason", why)], count.map(|count| count as f64))),
        )?;
        self.counter(
            "formtune_block_special_total",
            "Block requests that are not counted one by one: drivers' own commands (not counted), \
             and those merged, tried again or done in parts (counted once)",
            [
                ("passthrough", counters.passthrough),
                ("merged", counters.merged),
                ("requeued", counters.requeued),
                ("partial", counters.partial),
            ]
            .map(|(kind, count)| ([("kind", kind)], Some(count as f64))),
        )
    }
}

fn in_device(device: &BlockDevice) -> f64 {
    device.ops.iter().map(|op| op.in_device.sum_ns).sum::<u64>() as f64 / 1e9
}
