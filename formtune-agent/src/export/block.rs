//! Block I/O in a [`Snapshot`](super::Snapshot): plain owned data, as everything there.

use super::latency::LatencyCounts;
use super::snapshot::RecentRunq;
use formtune_core::units::{Nanos, VmId};
use serde::{Deserialize, Serialize};

/// Block I/O of one VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockState {
    /// Percentiles of the times from queued to done of the last seconds, over all devices and
    /// operations.
    pub recent: RecentRunq,
    /// Every device that the VM ever used.
    pub devices: Vec<BlockDevice>,
}

/// One device, as used by one VM or by the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockDevice {
    /// e.g. `sda`.
    pub device: String,
    /// Operations that there were requests of.
    pub ops: Vec<BlockOp>,
    /// Who had requests in the device in the last seconds, most first; at most
    /// [`OCCUPANTS`]. Empty if nobody had.
    pub occupants: Vec<BlockOccupant>,
}

impl BlockDevice {
    /// Operation, phase and counts of every histogram that holds something.
    pub fn phases(&self) -> impl Iterator<Item = (&'static str, &'static str, &LatencyCounts)> {
        let both = |op: &'_ BlockOp| op.op.name();
        self.ops
            .iter()
            .flat_map(move |op| {
                [(both(op), "total", &op.total), (both(op), "device", &op.in_device)]
            })
            .filter(|(_, _, counts)| counts.count() > 0)
    }
}

/// Occupants that are named.
pub const OCCUPANTS: usize = 4;

/// Requests of one operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockOp {
    /// Which.
    pub op: Op,
    /// Requests done, with or without times.
    pub requests: u64,
    /// From queued to done.
    pub total: LatencyCounts,
    /// From given to the device to done.
    pub in_device: LatencyCounts,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// No data of its own: flush, discard, secure erase, write zeroes, zones.
    Flush,
}

impl Op {
    /// As in JSON and in metric labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
        }
    }
}

/// Somebody whose requests are in a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockOccupant {
    /// Whose.
    pub who: Who,
    /// Requests in the device, on average.
    pub requests: f64,
    /// Of all that were in it, 0 to 1.
    pub share: f64,
}

/// Whose requests they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Who {
    /// No VM's.
    Host,
    /// This one's.
    Vm(VmId),
    /// Those of a VM that is gone.
    Gone,
}

/// The sensor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockNode {
    /// `stamps`: requests carry their times; `stamps and map`: those of some devices do not,
    /// and are noted in a map. `None` while not loaded.
    pub method: Option<String>,
    /// Why it is not loaded, and what would help.
    pub unsupported: Option<String>,
    /// Requests that are no VM's, by device; `occupants` is empty here.
    pub host: Vec<BlockDevice>,
    /// VMs whose block I/O cannot be told from the host's.
    pub unmeasured_vms: u64,
    /// cgroups of VMs that found no room in the probe's table.
    #[serde(default)]
    pub unmeasured_cgroups: u64,
    /// Rows there are: one for each VM (and the host), device and operation.
    #[serde(default)]
    pub rows: u64,
    /// Of these, how many are taken.
    #[serde(default)]
    pub rows_used: u64,
    /// Time looked back on for occupants.
    pub span: Nanos,
    /// Since the agent started.
    pub counters: BlockCounters,
}

/// Requests that are not in the histograms, or not where one would look for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockCounters {
    /// Without a bio: counted for the host.
    pub no_bio: u64,
    /// Without a block cgroup: counted for the host.
    pub no_cgroup: u64,
    /// Of a disk that is gone; not counted.
    #[serde(default)]
    pub no_disk: u64,
    /// Not known when queued; not in `total`.
    pub no_queued: u64,
    /// Not known when given to the device; not in `in_device`.
    pub no_issued: u64,
    /// Impossible times; not counted.
    pub discarded: u64,
    /// No row was free; not counted.
    pub full: u64,
    /// Of a cgroup that may be a VM's for which there was no room; not counted.
    #[serde(default)]
    pub unknown_cgroup: u64,
    /// Not seen, as the probe was busy on the same CPU; `None` where the kernel does not say.
    pub missed: Option<u64>,
    /// Drivers' own commands; not counted.
    pub passthrough: u64,
    /// Several merged into one; counted once.
    pub merged: u64,
    /// Tried again; counted once.
    pub requeued: u64,
    /// Done in parts; counted once.
    pub partial: u64,
    /// Not looked at, to stay within `probe_budget`; others count for them.
    #[serde(default)]
    pub unsampled: u64,
}
