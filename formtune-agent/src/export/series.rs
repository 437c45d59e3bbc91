//! Which latencies are measured of a VM: one list, from which metrics, JSON and interval logs
//! are made alike.

use super::latency::LatencyCounts;
use super::snapshot::{Snapshot, VmState};
use formtune_core::units::Nanos;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most histograms of one answer or log interval. The first ones, by VM, are shown; how many
/// are not is said.
pub const MOST: usize = 20_000;

/// A latency that is measured per VM. New ones go here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Latency {
    /// From runnable to running.
    RunQueue,
    /// Block requests, until they were done.
    Block,
}

impl Latency {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::RunQueue, Self::Block];

    /// Short name, as in JSON and interval logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RunQueue => "runqueue_latency",
            Self::Block => "block_latency",
        }
    }

    /// Name and help of its metric family.
    pub const fn family(self) -> (&'static str, &'static str) {
        match self {
            Self::RunQueue => (
                "formtune_vm_runqueue_latency_seconds",
                "Time from runnable to running of all threads of the VM, since it was first seen",
            ),
            Self::Block => (
                "formtune_vm_block_latency_seconds",
                "Time of the VM's block requests until they were done, from being queued (phase \
                 total) or given to the device (phase device)",
            ),
        }
    }

    /// Calls `each` with every histogram of a VM, and its labels, `vm` first.
    pub fn of<'a>(
        self,
        vm: &'a VmState,
        mut each: impl FnMut(&[(&'static str, &'a str)], &'a LatencyCounts),
    ) {
        match self {
            Self::RunQueue => {
                if let Some(runq) = &vm.runq {
                    each(&[("vm", vm.id.as_str())], runq);
                }
            }
            Self::Block => {
                for device in vm.block.iter().flat_map(|block| &block.devices) {
                    for (op, phase, counts) in device.phases() {
                        let vm = vm.id.as_str();
                        let device = device.device.as_str();
                        each(
                            &[("vm", vm), ("device", device), ("op", op), ("phase", phase)],
                            counts,
                        );
                    }
                }
            }
        }
    }
}

/// All latency histograms at one moment: the answer of `/v1/histograms`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histograms {
    /// `CLOCK_MONOTONIC`.
    pub at: Nanos,
    /// The same, as milliseconds since 1970 UTC.
    pub unix_ms: u64,
    /// By VM.
    pub histograms: Vec<Series>,
    /// Histograms that there was no room for.
    pub left_out: u64,
}

/// One latency histogram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Series {
    /// See [`Latency::name`].
    pub metric: String,
    /// Labels; `vm` always.
    pub labels: BTreeMap<String, String>,
    /// `CLOCK_MONOTONIC` when its VM was first seen.
    pub seen_at: Nanos,
    /// Since then.
    #[serde(flatten)]
    pub counts: LatencyCounts,
}

impl Histograms {
    /// Those of a snapshot; of one VM where one is named.
    pub fn of(snapshot: &Snapshot, vm: Option<&str>) -> Self {
        let mut all = Self { at: snapshot.at, unix_ms: snapshot.unix_ms, ..Self::default() };
        let wanted =
            snapshot.vms.values().filter(|state| vm.is_none_or(|vm| state.id.as_str() == vm));
        for state in wanted {
            for latency in Latency::ALL {
                latency.of(state, |labels, counts| {
                    if all.histograms.len() == MOST {
                        all.left_out += 1;
                        return;
                    }
                    let owned = |(name, value): &(&str, &str)| ((*name).into(), (*value).into());
                    all.histograms.push(Series {
                        metric: latency.name().into(),
                        labels: labels.iter().map(owned).collect(),
                        seen_at: state.seen_at,
                        counts: counts.clone(),
                    });
                });
            }
        }
        all
    }
}
