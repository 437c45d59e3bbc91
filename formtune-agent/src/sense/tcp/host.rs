//! What the host's own TCP sends again for a VM's processes.
//!
//! A socket belongs to the cgroup in which it was made, in the v2 hierarchy, also where
//! `cpu` is on v1: libvirt makes the same path in every hierarchy, so a VM's cgroups there
//! are those at and below its path in the `cpu` hierarchy.

use super::super::ProbeState;
use super::super::cgroup::{self, Hierarchies};
use super::super::probes::{
    Kernel, ProbeError, RetransmitProbe, RetransmitSizes, TCP_RETRANSMIT_SKB,
};
use super::super::table::Table;
use super::unavailable;
use crate::vm::CgroupVersion;
use formtune_common::tcp::{HostRow, NO_VM, host_row};
use formtune_core::units::Nanos;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::Path;

/// What is missing without it.
pub(super) const WITHOUT: &str = "without it retransmissions of the host's own TCP are not counted";
/// cgroups to make room for per VM: scope, `libvirt`, `emulator`, vCPUs, I/O threads.
const CGROUPS_PER_VM: u32 = 16;
/// A freed slot rests this long, as a segment under way may still count for it.
const REST: Nanos = Nanos::from_secs(1);
/// A VM's cgroups in the other hierarchy are looked for again after this, doubled each time:
/// they are made one hierarchy after the other, and nobody tells of them.
const LOOK_FIRST: Nanos = Nanos::from_millis(250);
const LOOK_LAST: Nanos = Nanos::from_secs(32);
/// How far below a VM's directory they are looked for.
const MAX_DEPTH: u8 = 6;

/// A VM's counts since it was first seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounts {
    /// Segments sent again, SYN-ACKs among them.
    pub retransmitted: u64,
    /// Of these, SYN-ACKs.
    pub syn_acks: u64,
}

impl From<HostRow> for HostCounts {
    fn from(row: HostRow) -> Self {
        Self { retransmitted: row.segments + row.syn_acks, syn_acks: row.syn_acks }
    }
}

/// What is seen and what is not.
#[derive(Clone, Debug)]
pub struct HostHealth {
    /// The probe.
    pub state: ProbeState,
    /// What sockets of no VM sent again since the start.
    pub no_vm: HostCounts,
    /// VMs that are known and not measured, as all slots are taken.
    pub not_measured: u32,
    /// cgroups that the probe has no room for.
    pub cgroups_not_measured: u32,
}

pub(super) struct Host {
    state: ProbeState,
    probe: Option<RetransmitProbe>,
    hierarchies: Hierarchies,
    table: Table,
    free: BTreeSet<u32>,
    resting: VecDeque<(Nanos, u32)>,
    /// By cgroup; as bytes, which are fast to compare.
    vms: BTreeMap<OsString, Vm>,
    /// Nothing is to be done before.
    look_due: Nanos,
}

#[derive(Default)]
struct Vm {
    slot: Option<u32>,
    /// Wanted.
    ids: BTreeSet<u64>,
    /// Known to the probe.
    counted: BTreeSet<u64>,
    look_at: Nanos,
    look_next: Nanos,
    /// What had been counted in its slot before.
    before: HostRow,
}

impl Host {
    pub fn open(
        kernel: Result<&Kernel, &ProbeError>,
        hierarchies: &Hierarchies,
        max_vms: u32,
    ) -> Self {
        let slots = max_vms.max(1);
        let cgroups = slots.saturating_mul(CGROUPS_PER_VM);
        let sizes = RetransmitSizes {
            slots,
            table: cgroups.next_power_of_two().clamp(1 << 12, 1 << 16),
            spill: cgroups.max(1 << 12),
        };
        let loaded = match (kernel, &hierarchies.unified) {
            (_, None) => Err(no_unified()),
            (Err(error), _) => Err(unavailable(TCP_RETRANSMIT_SKB, error, WITHOUT)),
            (Ok(kernel), _) => RetransmitProbe::load(kernel, sizes)
                .map_err(|error| unavailable(TCP_RETRANSMIT_SKB, &error, WITHOUT)),
        };
        let (probe, state) = match loaded {
            Ok(probe) => (Some(probe), ProbeState::Loaded),
            Err(state) => (None, state),
        };
        Self {
            state,
            probe,
            hierarchies: hierarchies.clone(),
            table: Table::new(sizes.table),
            free: (0..slots).collect(),
            resting: VecDeque::new(),
            vms: BTreeMap::new(),
            look_due: Nanos(0),
        }
    }

    /// The probe's programs, to be asked what they cost.
    pub fn programs(&self) -> Vec<OwnedFd> {
        self.probe.as_ref().map_or_else(Vec::new, RetransmitProbe::programs)
    }

    pub fn track(&mut self, path: &Path, ids: &BTreeSet<u64>, now: Nanos) {
        self.look_due = now;
        let vm = self.vms.entry(path.into()).or_default();
        if self.hierarchies.version == CgroupVersion::V2 {
            vm.ids.clone_from(ids);
            vm.look_at = Nanos(u64::MAX);
        } else {
            vm.look_at = now;
            vm.look_next = LOOK_FIRST;
        }
    }

    pub fn untrack(&mut self, path: &Path, now: Nanos) {
        let Some(vm) = self.vms.remove(path.as_os_str()) else { return };
        // Without a slot nothing is counted for it.
        if let Some(slot) = vm.slot {
            for id in vm.counted {
                self.forget(id, slot);
            }
            self.resting.push_back((now, slot));
        }
    }

    /// Looks for cgroups that may have come, and tells the probe of them.
    pub fn look(&mut self, now: Nanos) {
        if self.probe.is_none() || now < self.look_due {
            return;
        }
        while let Some((_, slot)) = self.resting.pop_front_if(|(at, _)| now.since(*at) >= REST) {
            self.free.insert(slot);
        }
        self.look_due = Nanos(u64::MAX);
        let mut vms = std::mem::take(&mut self.vms);
        for (path, vm) in &mut vms {
            self.update(Path::new(path), vm, now);
            // What does not fit is tried again with the next reading.
            let due = if vm.counted.len() < vm.ids.len() { now } else { vm.look_at };
            self.look_due = self.look_due.min(due);
        }
        self.vms = vms;
    }

    fn update(&mut self, path: &Path, vm: &mut Vm, now: Nanos) {
        if now >= vm.look_at {
            vm.ids = self.groups(path);
            vm.look_at = Nanos(now.0 + vm.look_next.0);
            vm.look_next = Nanos(vm.look_next.0 * 2).min(LOOK_LAST);
        }
        if vm.slot.is_none() {
            vm.slot = self.free.pop_first();
            if let (Some(slot), Some(probe)) = (vm.slot, &self.probe) {
                vm.before = probe.row(host_row(slot));
            }
        }
        let Some(slot) = vm.slot else { return };
        for id in vm.counted.difference(&vm.ids).copied().collect::<Vec<_>>() {
            vm.counted.remove(&id);
            self.forget(id, slot);
        }
        let Some(probe) = &mut self.probe else { return };
        for id in vm.ids.difference(&vm.counted).copied().collect::<Vec<_>>() {
            if self.table.insert(&mut probe.cgroups, id, slot).is_ok() {
                vm.counted.insert(id);
            }
        }
    }

    /// As of now.
    pub fn counts(&self, path: &Path) -> Option<HostCounts> {
        let vm = self.vms.get(path.as_os_str()).filter(|vm| !vm.counted.is_empty())?;
        let row = self.probe.as_ref()?.row(host_row(vm.slot?));
        let since = HostRow {
            segments: row.segments.wrapping_sub(vm.before.segments),
            syn_acks: row.syn_acks.wrapping_sub(vm.before.syn_acks),
        };
        Some(since.into())
    }

    pub fn health(&self) -> HostHealth {
        let vms = self.vms.values();
        HostHealth {
            state: self.state.clone(),
            no_vm: self.probe.as_ref().map(|probe| probe.row(NO_VM)).unwrap_or_default().into(),
            not_measured: vms.clone().filter(|vm| vm.slot.is_none()).count() as u32,
            cgroups_not_measured: vms.map(|vm| vm.ids.difference(&vm.counted).count() as u32).sum(),
        }
    }

    fn forget(&mut self, id: u64, slot: u32) {
        if let Some(probe) = &mut self.probe
            && let Err(error) = self.table.remove(&mut probe.cgroups, id, slot)
        {
            tracing::warn!("cgroup {id} may be counted on: {error}");
        }
    }

    /// Ids of the cgroups in the v2 hierarchy at and below a path of the `cpu` hierarchy.
    fn groups(&self, path: &Path) -> BTreeSet<u64> {
        let mut ids = BTreeSet::new();
        if let (Some(unified), Ok(relative)) =
            (&self.hierarchies.unified, path.strip_prefix(&self.hierarchies.cpu))
        {
            look_below(&unified.join(relative), &mut ids, 0);
        }
        ids
    }
}

fn look_below(dir: &Path, ids: &mut BTreeSet<u64>, depth: u8) {
    // Gone, or not made yet: the next look sees it as it is then.
    let Ok(id) = cgroup::id(dir) else { return };
    ids.insert(id);
    if depth == MAX_DEPTH {
        return;
    }
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            look_below(&entry.path(), ids, depth + 1);
        }
    }
}

/// Why there is nothing to know sockets by.
pub(super) fn no_unified() -> ProbeState {
    ProbeState::Unavailable {
        program: TCP_RETRANSMIT_SKB,
        why: "no cgroup v2 hierarchy is mounted, by which the kernel knows sockets".into(),
        remedy: format!("mount cgroup2, e.g. at /sys/fs/cgroup/unified; {WITHOUT}"),
    }
}
