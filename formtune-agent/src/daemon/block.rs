//! Block I/O in a snapshot.

use super::Agent;
use crate::export::block::{
    BlockCounters, BlockDevice, BlockNode, BlockOccupant, BlockOp, BlockState, OCCUPANTS, Op, Who,
};
use crate::export::latency::LatencyCounts;
use crate::sense::ProbeState;
use crate::sense::block::{BlockTotals, LatencyTotals, Occupant, SPAN};
use formtune_common::block::{READ, WRITE};
use formtune_core::units::{Nanos, VmId};
use std::collections::BTreeMap;

impl Agent {
    /// A VM's block I/O. `occupants`: of every device.
    pub(super) fn block_state(
        &self,
        id: &VmId,
        now: Nanos,
        totals: BlockTotals<'_>,
        occupants: &BTreeMap<u32, Vec<BlockOccupant>>,
    ) -> BlockState {
        let mut devices = self.block_devices(totals);
        for (number, device) in &mut devices {
            device.occupants = occupants.get(number).cloned().unwrap_or_default();
        }
        let devices = devices.into_values().collect();
        BlockState { recent: self.recent_block.runq(id, now), devices }
    }

    /// The largest occupants of every device that is in use.
    pub(super) fn block_occupants(&self, now: Nanos) -> BTreeMap<u32, Vec<BlockOccupant>> {
        let largest = |all: Vec<(Occupant<'_>, u64)>| -> Vec<BlockOccupant> {
            let sum: u64 = all.iter().map(|(_, ns)| ns).sum();
            let largest = all.into_iter().take(OCCUPANTS);
            largest.map(|(who, ns)| self.occupant(who, ns, sum)).collect()
        };
        let all = self.sense.block().occupants(now).into_iter();
        all.map(|(device, all)| (device, largest(all))).collect()
    }

    /// The sensor, and what is no VM's.
    pub(super) fn block_node(&self) -> BlockNode {
        let health = self.sense.block().health();
        let (method, unsupported) = match health.probe {
            ProbeState::Loaded if health.notes => (Some("stamps and map".into()), None),
            ProbeState::Loaded => (Some("stamps".into()), None),
            ProbeState::Unavailable { program, why, remedy } => {
                (None, Some(format!("program {program} is not loaded: {why} ({remedy})")))
            }
        };
        let host = self.sense.block().totals_of_host().unwrap_or_default();
        let counters = health.counters;
        BlockNode {
            method,
            unsupported,
            host: self.block_devices(host).into_values().collect(),
            unmeasured_vms: health.not_attributed.into(),
            unmeasured_cgroups: health.cgroups_not_counted.into(),
            rows: health.rows.into(),
            rows_used: health.rows_taken.into(),
            span: SPAN,
            counters: BlockCounters {
                no_bio: counters.no_bio,
                no_cgroup: counters.no_cgroup,
                no_disk: counters.no_disk,
                no_queued: counters.no_queued,
                no_issued: counters.no_issued,
                discarded: counters.discarded,
                full: counters.full,
                unknown_cgroup: counters.unknown_cgroup,
                missed: health.missed,
                passthrough: counters.passthrough,
                merged: counters.merged,
                requeued: counters.requeued,
                partial: counters.partial,
                unsampled: counters.unsampled,
            },
        }
    }

    /// By device number.
    fn block_devices(&self, totals: BlockTotals<'_>) -> BTreeMap<u32, BlockDevice> {
        let mut devices = BTreeMap::new();
        for ((number, op), totals) in totals {
            let device = devices.entry(number).or_insert_with(|| BlockDevice {
                device: self.sense.block().device(number),
                ops: Vec::new(),
                occupants: Vec::new(),
            });
            device.ops.push(BlockOp {
                op: match op {
                    READ => Op::Read,
                    WRITE => Op::Write,
                    _ => Op::Flush,
                },
                requests: totals.requests,
                total: counts(&totals.total),
                in_device: counts(&totals.device),
            });
        }
        devices
    }

    fn occupant(&self, who: Occupant<'_>, ns: u64, of: u64) -> BlockOccupant {
        let who = match who {
            Occupant::Host => Who::Host,
            // One that has no name yet is none of the VMs that are shown.
            Occupant::Vm(path) => {
                self.sense.vm_of(path).map_or(Who::Host, |id| Who::Vm(id.clone()))
            }
            Occupant::Gone => Who::Gone,
        };
        BlockOccupant { who, requests: ns as f64 / SPAN.0 as f64, share: ns as f64 / of as f64 }
    }
}

fn counts(totals: &LatencyTotals) -> LatencyCounts {
    LatencyCounts::from_range(totals.range().start, totals.counts(), totals.sum_ns)
}
