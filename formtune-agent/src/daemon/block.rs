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
use std::path::Path;

impl Agent {
    /// A VM's block I/O; `None` while it is not measured.
    pub(super) fn block_state(&self, id: &VmId, now: Nanos) -> Option<BlockState> {
        let cgroup = &self.sense.vms().get(id)?.cgroup;
        let totals = self.sense.block().totals(cgroup)?;
        let mut devices = self.block_devices(totals);
        if !devices.is_empty() {
            let names: BTreeMap<&Path, &VmId> =
                self.sense.vms().iter().map(|(id, vm)| (vm.cgroup.as_path(), id)).collect();
            for (number, device) in &mut devices {
                device.occupants = self.occupants(*number, now, &names);
            }
        }
        let devices = devices.into_values().collect();
        Some(BlockState { recent: self.recent_block.runq(id, now), devices })
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
            span: SPAN,
            counters: BlockCounters {
                no_bio: counters.no_bio,
                no_cgroup: counters.no_cgroup,
                no_queued: counters.no_queued,
                no_issued: counters.no_issued,
                discarded: counters.discarded,
                full: counters.full,
                missed: health.missed,
                passthrough: counters.passthrough,
                merged: counters.merged,
                requeued: counters.requeued,
                partial: counters.partial,
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

    fn occupants(
        &self,
        device: u32,
        now: Nanos,
        names: &BTreeMap<&Path, &VmId>,
    ) -> Vec<BlockOccupant> {
        let all = self.sense.block().occupants(device, now);
        let sum: u64 = all.iter().map(|(_, ns)| ns).sum();
        let named = all.into_iter().take(OCCUPANTS).map(|(who, ns)| BlockOccupant {
            who: match who {
                Occupant::Host => Who::Host,
                // One that has no name yet is none of the VMs that are shown.
                Occupant::Vm(path) => {
                    names.get(path).map_or(Who::Host, |id| Who::Vm((*id).clone()))
                }
                Occupant::Gone => Who::Gone,
            },
            requests: ns as f64 / SPAN.0 as f64,
            share: ns as f64 / sum as f64,
        });
        named.collect()
    }
}

fn counts(totals: &LatencyTotals) -> LatencyCounts {
    LatencyCounts::from_dense(&totals.dense(), totals.sum_ns)
}
